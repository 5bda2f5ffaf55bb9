"""Finds the step that changed a tracer's colours in a way that looks like a move of its pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from densessl._tracer import Tracer, classify, eroded, reach_of, tracers
from densessl.augment._draws import drawn_from, generator_states, set_generators
from densessl.augment._steps import steps, tracked_step
from densessl.coords import DenseCoords, ViewCoords

_EXACT, _RIM = 1e-3, 3


def recoloured_step(pipeline: Callable[..., Any], size: tuple[int, int], dense: bool, seed: int) -> Any:
    """The first step of a draw that changed colours, although it left the marks of the tracer alone.

    What moves pixels treats all channels alike and interpolates linearly, so that it gives the same picture for the
    same tracer in other colours (each channel inverted, and in another channel's place), once these are undone. What
    changes colours does not. Fill is left out of the comparison. A step that draws from a generator of its own, and so
    does something else each time, tells nothing.

    Args:
        pipeline: A pipeline as ``MultiView`` takes it.
        size: Height and width of the source in pixels.
        dense: Whether the coords are dense.
        seed: Seed of the draw.

    Returns:
        The step; None if none is found, or a step cannot be run without a mask.
    """
    kind = DenseCoords if dense else ViewCoords
    first, second = tracers(size)
    parts: list[list[Any]] = [
        [image.as_subclass(Tracer), kind(canvas_size=size)] for image in (first, second, _other_colours(first))
    ]
    with drawn_from(seed):
        for step in steps(pipeline):
            state = generator_states()
            after = []
            for part in parts:
                set_generators(state)
                try:
                    after.append(tracked_step(step, part))
                except Exception:  # whatever a step raises that needs a mask; the audit itself has run it with one
                    return None
            if _recoloured([part[0] for part in after], [part[1] for part in after]):
                return step
            parts = [[part[0].as_subclass(Tracer), part[1]] for part in after]
    return None


def _other_colours(image: Tensor) -> Tensor:
    return 1 - image.as_subclass(Tensor).roll(1, -3)


def _recoloured(images: list[Tensor], coords: list[Tensor]) -> bool:
    one, two, other = (image.as_subclass(Tensor) for image in images)
    if not one.shape == two.shape == other.shape or one.shape[-3] != 3:
        return False
    known = classify(one, two).known
    again = ((one - two)[:2].abs() < _EXACT).all(0) & known
    if not torch.equal(again, known) or not all(torch.equal(coords[0], c) for c in coords[1:]):
        return False  # it drew something else
    inner = eroded(known, reach_of(_RIM, one.shape))  # beside fill, pixels are mixed with a little of it
    return bool((((_other_colours(one) - other).abs() > _EXACT).any(0) & inner).any())
