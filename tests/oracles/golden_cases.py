"""Reads the reference numbers in tests/golden; what they mean is written in tests/golden/README.md."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays.files}


def part(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {key.removeprefix(f"{prefix}."): value for key, value in arrays.items() if key.startswith(f"{prefix}.")}
