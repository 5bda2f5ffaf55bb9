"""Finds steps of a pipeline that take an image alone, before the first image comes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import nn
from torchvision.transforms import v2

from densessl.augment._steps import children, steps

_CONTAINERS = (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder)


def refuse_images_alone(transform: Callable[..., Any]) -> None:
    """Raises ValueError where a step would be called with the image and its coords and takes one argument."""
    for step in _called_with_coords(transform):
        called = _called(step)
        name = getattr(step, "__name__", type(step).__name__)
        if _signature(called) is None and not isinstance(_code(called), FunctionType):
            raise ValueError(
                "transforms: expected steps that take the image and its coords, as torchvision's v2.Transform do; "
                f"{name} does not say what it takes. If it moves no pixel, give v2.Lambda(f, tv_tensors.Image) with it "
                "as f; else write a step around it (see Compose your own, A transform of your own)"
            )
        if _takes(step, 1) and not _takes(step, 2):
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


def _called(step: Callable[..., Any]) -> Any:
    """What runs where a step is called; the module itself if its hooks may change the arguments."""
    if isinstance(step, nn.Module) and type(step).__call__ is nn.Module.__call__ and not step._forward_pre_hooks:
        return step.forward
    return step


def _signature(called: Any) -> inspect.Signature | None:
    """The arguments; None if they cannot be read, as of functions that are not written in Python."""
    try:
        # A decorated function is called as its wrapper, whatever the wrapped one takes.
        return inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):
        return None


def _code(called: Any) -> Any:
    return inspect.getattr_static(type(called), "__call__", None)


def _takes(step: Callable[..., Any], count: int) -> bool:
    """Whether a step can be called with so many arguments; True if it does not say."""
    called = _called(step)
    if called is step and isinstance(step, nn.Module) and type(step).__call__ is nn.Module.__call__:
        return True  # its hooks may change the arguments
    signature = _signature(called)
    if signature is None:
        signature, count = _signature(_code(called)), count + 1  # with self
    if signature is None:
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True
