"""Switches kornia's colour changes off for a check of tracking, because the tracer's colours are positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_CALLED = ("apply_transform", "apply_non_transform", "apply_func", "transform_tensor", "transform_inputs", "forward")


@contextmanager
def colours_untouched(augment: nn.Module) -> Iterator[None]:
    """Makes kornia's own intensity augmentations draw as always but return their input.

    Derived classes that change images in their own way run as they are: they may move pixels.
    """
    import kornia.augmentation as K

    def unchanged(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input

    def foreign(module: Any) -> bool:
        own = [cls for cls in type(module).__mro__ if not cls.__module__.startswith(("kornia.", "torch.", "densessl."))]
        return any(name in vars(holder) for holder in (module, *own) for name in _CALLED)

    intensity = [m for m in augment.modules() if isinstance(m, K.IntensityAugmentationBase2D) and not foreign(m)]
    for module in intensity:
        module.apply_transform = unchanged  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in intensity:
            del module.apply_transform
