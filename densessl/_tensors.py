"""Refuses what is no tensor, and settings that are no numbers, by the argument's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def check_tensor(value: Any, name: str, expected: str) -> None:
    """Raises ValueError on what is no tensor: arrays, lists, sizes, views as a whole, None.

    Args:
        value: The value that was given.
        name: The argument's name.
        expected: What it should have been, in words.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")


def check_number(value: Any, name: str, expected: str, fits: Callable[[Any], bool], whole: bool = False) -> None:
    """Raises ValueError on a setting that is out of range, not finite, or no number, such as YAML's text ``1e-3``.

    Args:
        value: The value that was given: a number, or a tensor of one element.
        name: The argument's name.
        expected: What it should have been, in words.
        fits: Tells whether a finite number is in the range.
        whole: Whether the number has to be an integer.
    """
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    single = isinstance(value, Tensor) and value.numel() == 1 and not whole
    if not ((number or single) and math.isfinite(value) and fits(value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
