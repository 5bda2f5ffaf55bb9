"""Refuses by name what the evaluation cannot score: settings out of range, features and labels that are not such."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from densessl._tensors import check_number, check_tensor


def check_at_least(value: int, least: int, name: str) -> None:
    """Raises ValueError if a setting is smaller than it may be, or no whole number."""
    if not isinstance(value, Integral):
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_probe(classes: int, batch_size: int) -> None:
    """Raises ValueError unless there are classes to tell apart and images to encode."""
    check_at_least(classes, 2, "classes")
    check_at_least(batch_size, 1, "batch_size")


def check_positive(value: float, name: str) -> None:
    """Raises ValueError unless a setting is a finite number greater than 0."""
    check_number(value, name, "a number greater than 0", lambda number: number > 0)


def check_is_pair(item: Any, name: str) -> None:
    """Raises ValueError unless an item of labelled images is a tuple or a list of two things."""
    if isinstance(item, (tuple, list)):
        if len(item) == 2:
            return
        got = "1 thing" if len(item) == 1 else f"{len(item)} things"
    else:
        got = "a tensor alone" if isinstance(item, Tensor) else type(item).__name__
    raise ValueError(f"{name}: expected a pair (image, labels), got {got}")


def check_finite(values: Tensor, name: str) -> None:
    """Raises ValueError if a value is NaN or infinite, since a score of such features would say nothing."""
    # The least and the greatest value tell, without a mask as large as the values; NaN spreads to both.
    if values.numel() and not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def check_maps(maps: Tensor, count: int) -> None:
    """Raises ValueError unless a function of features returned finite maps (B, C, h, w), one for each image."""
    expected = f"it to return maps (B, C, h, w) with B = {count}"
    check_tensor(maps, "features", expected)
    if maps.ndim != 4 or not maps.is_floating_point() or len(maps) != count:
        raise ValueError(f"features: expected {expected}, got {maps.dtype} {tuple(maps.shape)}")
    check_finite(maps, "features")


def check_floating(values: Tensor, shape: tuple[str, ...], name: str) -> None:
    """Raises ValueError unless there are floating point values with so many dimensions, none of length 0."""
    check_tensor(values, name, f"floating point ({', '.join(shape)})")
    if values.ndim != len(shape) or not values.is_floating_point() or 0 in values.shape:
        raise ValueError(
            f"{name}: expected floating point ({', '.join(shape)}), got {values.dtype} {tuple(values.shape)}"
        )


def known_labels(labels: Tensor, classes: int, name: str) -> Tensor:
    """Which labels name a class; -1 and 255 mark what is ignored.

    Raises:
        ValueError: If the dtype is not int64, or a label is neither a class nor an ignored one.
    """
    check_tensor(labels, name, "int64")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {labels.dtype}")
    known = (labels >= 0) & (labels < classes)
    wrong = ~known & (labels != -1) & (labels != 255)
    if bool(wrong.any()):
        found = int(labels[wrong][0])
        raise ValueError(f"{name}: expected 0..{classes - 1}, or -1 or 255 where ignored, got {found}")
    return known
