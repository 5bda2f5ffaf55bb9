"""The random crop that all published pipelines begin with, with its settings checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torchvision.transforms import v2


def random_crop(size: Any, scale: Any, ratio: Any, prefix: str = "") -> v2.RandomResizedCrop:
    """torchvision's RandomResizedCrop.

    Args:
        size: Side of the views in pixels, or (height, width).
        scale: Range of the share of the image's area that a crop covers, in 0..1.
        ratio: Range of a crop's width divided by its height.
        prefix: What stands before the names of size and scale, for errors.

    Raises:
        ValueError: If a side or a range is not as described.
    """
    sides = (size,) if isinstance(size, Integral) else size
    if not _are(sides, Integral, (1, 2)) or min(sides) < 1:
        raise ValueError(f"{prefix}size: expected a side in pixels or (height, width), at least 1, got {size!r}")
    if not _are(scale, Real, (2,)) or not 0 <= scale[0] <= scale[1] <= 1 or scale[1] == 0:
        raise ValueError(f"{prefix}scale: expected two shares in 0..1, the lower first, got {scale!r}")
    if not _are(ratio, Real, (2,)) or not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio: expected two positive numbers, the lower first, got {ratio!r}")
    return v2.RandomResizedCrop((sides[0], sides[-1]), scale=tuple(scale), ratio=tuple(ratio), antialias=True)


def _are(values: Any, kind: type, lengths: tuple[int, ...]) -> bool:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) not in lengths:
        return False
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
