"""Finds steps of a pipeline that take an image alone, before the first image comes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torchvision.transforms import v2

from densessl.augment._steps import children, steps

_CONTAINERS = (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder)


def refuse_images_alone(transform: Callable[..., Any]) -> None:
    """Raises ValueError where a step would be called with the image and its coords and takes one argument."""
    for step in _called_with_coords(transform):
        if _takes(step, 1) and not _takes(step, 2):
            name = getattr(step, "__name__", type(step).__name__)
            raise ValueError(
                "transforms: expected steps that take the image and its coords, as torchvision's v2.Transform do; "
                f"{name} takes the image alone (see Compose your own, A transform of your own)"
            )


def _called_with_coords(transform: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    for step in steps(transform):
        yield step
        if type(step) in _CONTAINERS:  # what a container of the user's own hands on is its own affair
            for child in children(step):
                yield from _called_with_coords(child)


def _takes(step: Callable[..., Any], count: int) -> bool:
    """Whether a step can be called with so many arguments; True if it does not say."""
    called: Any = step
    if isinstance(step, nn.Module) and type(step).__call__ is nn.Module.__call__:
        if step._forward_pre_hooks:  # they may change the arguments
            return True
        called = step.forward
    try:
        # A decorated function is called as its wrapper, whatever the wrapped one takes.
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):  # something without a signature
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True
