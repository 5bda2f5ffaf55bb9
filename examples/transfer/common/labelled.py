"""Lists of labelled images for semi-supervised recipes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def labelled(ids: Sequence[int], share: float, seed: int) -> list[int]:
    """A share of the images, a function of ``(ids, share, seed)`` alone.

    Images are ranked by a hash of seed and id, so the list depends on no library's random numbers and not on the order
    of ``ids``, and the 1 % of a seed are among its 10 %.

    Args:
        ids: Numbers of all images.
        share: Share of them to keep, in (0, 1]; rounded, at least one image.
        seed: Seed of the choice; every number gives another list.

    Returns:
        The drawn ids, sorted.

    Raises:
        ValueError: If the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"data.share: expected a share in (0, 1], got {share}")
    ranked = sorted(ids, key=lambda number: hashlib.sha256(f"{seed}:{number}".encode()).digest())
    return sorted(ranked[: max(1, round(share * len(ids)))])
