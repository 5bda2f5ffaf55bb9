"""Refuses what is no tensor, by the argument's name."""

from __future__ import annotations

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
