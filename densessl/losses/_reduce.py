"""Options that the dense losses share, and the mean over images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from densessl._tensors import check_number

Reduction = Literal["mean", "none"]
NoMatch = Literal["zero", "skip"]


def check_options(reduction: str, no_match: str) -> None:
    """Raises ValueError on unknown options."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    if no_match not in ("zero", "skip"):
        raise ValueError(f"no_match: expected 'zero' or 'skip', got {no_match!r}")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is positive."""
    check_number(temperature, "temperature", "a positive number", lambda value: value > 0)


def reduce_images(per_image: Tensor, matched: Tensor, reduction: Reduction, no_match: NoMatch) -> Tensor:
    """Mean over images; per_image (B,) is 0 where matched (B,) bool is False."""
    if reduction == "none":
        return per_image
    if no_match == "zero" and len(per_image):  # the mean of none is NaN
        return per_image.mean()
    return per_image.sum() / matched.sum().clamp(min=1)
