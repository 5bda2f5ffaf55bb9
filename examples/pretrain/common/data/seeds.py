"""Seeds of single draws."""

from __future__ import annotations

import numpy as np


def seed_of(*numbers: int) -> int:
    """One seed that is a function of these numbers alone."""
    # With their count: SeedSequence takes (0, 1) and (0, 1, 0) for the same.
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))
