"""Proves or refutes that a pipeline's coords follow its pixels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from densessl._recoloured import recoloured_step
from densessl._sightings import (
    OR_COLOURS,
    Seen,
    Where,
    compared_carried,
    compared_image,
    compared_images,
    compared_mask,
    largest_excess,
)
from densessl._tracer import (
    Tracer,
    source_steps,
    tracers,
    tracing_masks,
)
from densessl._untouched import colours_untouched
from densessl.augment import BatchAugment, MaskedView, MultiView
from densessl.augment._draws import drawn_from, generator_states, set_generators
from densessl.augment._start import Start, carried
from densessl.augment._steps import nested, steps, tracked_step
from densessl.coords import DenseCoords, MovingMask, ViewCoords

_SIZES = ((240, 320), (320, 240), (300, 300), (181, 403))
_LEAST_SHARE = 0.05  # of all that the views show of their sources
_BATCH = 4


class TrackingReport(NamedTuple):
    """What ``check_tracking`` saw.

    Attributes:
        max_error: Largest distance between where a pixel came from and where its coords say it came from, in source
            pixels, less the half step that nearest-neighbour interpolation may take.
        mean_error: Mean of these distances over all pixels in source pixels, without taking off that half step.
        draws: Number of views that were looked at.
        pixels: Number of pixels that were compared.
        share: Compared pixels as a share of the pixels that show the source, rims included.

    Examples:
        >>> report = check_tracking(byol_views(64), draws=2)
        >>> report.draws, report.max_error < 1
        (4, True)
    """

    max_error: float
    mean_error: float
    draws: int
    pixels: int
    share: float


def check_tracking(
    transform: Callable[..., Any],
    *,
    tolerance: float = 1.0,
    draws: int = 100,
    seed: int = 0,
    coords: Tensor | None = None,
    source_size: Tensor | Sequence[int] | None = None,
) -> TrackingReport:
    """Sends a tracer through a whole pipeline and compares its pixels, and those of a mask, with the coords.

    The tracer's colours are positions. torchvision's photometric functionals and kornia's intensity augmentations leave
    it alone, so published pipelines can be checked as they are. Each draw is made twice, with different marks in the
    tracer's third channel: a pixel that stays the same is fill (padding), and a pixel that changes, but not to the new
    mark, has had its colours changed. Where pixels seem moved, the draw is made once more with the tracer's channels
    swapped and inverted, which makes no difference to a move, but does to a change of colours. A step of your own that
    changes colours without torchvision's functionals can therefore not be compared and is an error: leave it out of the
    check. If the pipeline takes a mask, one is sent along in the same way. A BatchAugment gets views that were cropped
    and flipped before; there the third draw is not made.

    Three things are not compared: fill; a rim of two pixels around the view and around fill, where interpolation has
    too few neighbours; and padding that mirrors or repeats the source's pixels, because the coords place it outside of
    the source, where nothing matches.

    Some errors are not found: those that happen less often than once in ``draws``; those that depend on the image's
    content or dtype, or need a source larger than 403 pixels; those within the rim alone; colour changes in seams or
    specks only as wide as the rim; and errors below the tolerance.

    Args:
        transform: A MultiView, a pipeline as MultiView takes it, or a BatchAugment.
        tolerance: Largest error allowed, in source pixels. If a step interpolates by nearest neighbour, half a source
            step is added (a source step is the number of source pixels that one view pixel spans).
        draws: How often each pipeline is drawn.
        seed: Seed of the draws. The generators of torch, ``random`` and NumPy are left as they were.
        coords: Optional coords ``(3, 3)`` or dense ``(2, H, W)`` that say where the image's pixels lie in another
            image, as MultiView takes them. The positions that the views get there are then compared too, in that
            image's pixels, except beside unknown pixels and beside jumps, such as the edges of moving objects. The
            tracer has the size of dense coords.
        source_size: Height and width of that other image in pixels; None means those of the image.

    Returns:
        A report of the largest error, the mean error and the share of pixels that could be compared.

    Raises:
        ValueError: If pixels moved and coords did not follow (the message names the error, the draw and the size of the
            source); if colours or labels changed and cannot be compared; if less than 5 % of what the views show of
            their sources, or less than a quarter of one view without its rims, could be compared; if MultiView refuses
            the coords; or if coords are given for a BatchAugment.

    Examples:
        >>> report = check_tracking(byol_views(64), draws=2)
        >>> report.max_error < 1
        True
    """
    if isinstance(transform, MultiView):
        pipelines, dense = transform.transforms, transform.dense
    elif isinstance(transform, BatchAugment):
        pipelines, dense = (transform,), False
    else:
        pipelines, dense = MultiView(transform).transforms, False
    if coords is not None and isinstance(transform, BatchAugment):
        raise ValueError("coords: expected None for a BatchAugment, whose views hold their coords already")
    sizes = _SIZES if coords is None or coords.shape[-2:] == (3, 3) else ((coords.shape[-2], coords.shape[-1]),)
    worst, total, pixels, shown, carried_pixels = 0.0, 0.0, 0, 0, 0
    for draw in range(draws):
        size = sizes[draw % len(sizes)]
        start = None if coords is None else Start.of(coords, size, source_size)
        for pipeline in pipelines:
            where = Where(size, draw, pipeline)
            if isinstance(pipeline, BatchAugment):
                views, look = _batch_draw(pipeline, size, seed + draw, where), where
            else:
                views = _draw(pipeline, size, dense, seed + draw, where, start)
                look = where._replace(recoloured=partial(recoloured_step, pipeline, size, dense, seed + draw))
            for image, mask, carried_on in views:
                worst = max(worst, largest_excess(image, tolerance, "pixels", look))
                if mask is not None:
                    largest_excess(mask, tolerance, "the mask's pixels", where)
                if carried_on is not None:
                    worst = max(worst, largest_excess(carried_on, tolerance, "positions in the other image", where))
                    carried_pixels += len(carried_on.errors)
                total, pixels = total + float(image.errors.sum()), pixels + len(image.errors)
                shown += image.shown
    if pixels == 0:
        raise ValueError(
            f"transform: no pixel of {draws} draws could be compared: the views show nothing but fill, {OR_COLOURS}"
        )
    if coords is not None and carried_pixels == 0:
        raise ValueError(
            f"coords: no pixel of {draws} draws could be compared in the other image: its place is unknown"
        )
    share = pixels / shown
    if share < _LEAST_SHARE:
        raise ValueError(
            f"transform: only {share:.1%} of what the views show of their sources could be compared, at least "
            f"{_LEAST_SHARE:.0%} expected: the coords know nothing of the rest, it lies in the rims, {OR_COLOURS}"
        )
    return TrackingReport(worst, total / pixels, draws * len(pipelines), pixels, share)


_Views = list[tuple[Seen, "Seen | None", "Seen | None"]]


def _draw(
    pipeline: Callable[..., Any], size: tuple[int, int], dense: bool, seed: int, where: Where, start: Start | None
) -> _Views:
    masked = all(_takes_a_mask(step) for step in steps(pipeline))
    try:
        with drawn_from(seed):
            return _steps_drawn(pipeline, size, dense, masked, where, start)
    except ValueError as error:
        if not masked or "to unpack" not in str(error):
            raise
    with drawn_from(seed):  # a step that unpacks image and coords, and nothing else
        return _steps_drawn(pipeline, size, dense, False, where, start)


def _takes_a_mask(step: Callable[..., Any]) -> bool:
    try:
        inspect.signature(step.forward if isinstance(step, torch.nn.Module) else step).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # something without a signature
        return True
    return True


def _steps_drawn(
    pipeline: Callable[..., Any],
    size: tuple[int, int],
    dense: bool,
    masked: bool,
    where: Where,
    start: Start | None,
) -> _Views:
    """One draw, taken twice, step after step, because the rim's width in view pixels follows from each step."""
    kind = DenseCoords if dense else ViewCoords
    masks = [mask.as_subclass(MovingMask) for mask in tracing_masks(size)]
    parts: list[list[Any]] = [
        [image.as_subclass(Tracer), kind(canvas_size=size), *([mask] if masked else [])]
        for image, mask in zip(tracers(size), masks, strict=True)
    ]
    span, coarsest, largest, apart = 1.0, 0.0, 1.0, 0.0
    for transform in steps(pipeline):
        state, versions = generator_states(), [(id(part[0]), part[0]._version) for part in parts]
        first = tracked_step(transform, parts[0])
        set_generators(state)
        second = tracked_step(transform, parts[1])
        for image in (first[0], second[0]):
            if not isinstance(image, Tensor):
                raise ValueError(f"{transform!r}: expected a tensor image back, got {type(image).__name__}")
        moved = first[1].shape != parts[0][1].shape or not torch.equal(first[1], parts[0][1])
        before, span = span, max(source_steps(first[1], first[1].canvas_size, size, span))
        largest = max(largest, span)
        if _by_nearest(transform):
            coarsest = max(coarsest, before, span)
        if moved:
            apart += before  # a mask is picked again, up to half a pixel away
        kept = [first[0], second[0]]
        if [(id(image), image._version) for image in kept] != versions:  # else the step left them alone
            least = min(source_steps(first[1], first[1].canvas_size, size, span))
            kept = compared_images(
                kept[0], kept[1], max(1.0, before / span), max(1.0, before / least), where._replace(step=transform)
            )
        parts = [[image.as_subclass(Tracer), *rest] for image, rest in zip(kept, (first[1:], second[1:]), strict=True)]
    slack = 2 + 2 * largest
    image = compared_image(parts[0][0], parts[1][0], parts[0][1], size, _half(coarsest), slack, where)
    labels = None
    if masked:
        labels = compared_mask(parts[0][2], parts[1][2], parts[0][1], size, _half(apart), slack, where)
    if start is None:
        return [(image, labels, None)]
    place = carried(parts[0][1], start.coords)
    positions = compared_carried(parts[0][0], parts[1][0], place, start.dense, start.other, _half(coarsest))
    return [(image, labels, positions)]


def _batch_draw(augment: BatchAugment, size: tuple[int, int], seed: int, where: Where) -> _Views:
    """From views that were cropped and flipped: what follows goes on from coords that are not the whole source's."""
    height, width = round(0.8 * size[0]), round(0.7 * size[1])
    generator = torch.Generator().manual_seed(seed)
    corners = [
        [int(torch.randint(0, room, (), generator=generator)) for room in (size[0] - height, size[1] - width)]
        for _ in range(_BATCH)
    ]
    passes = []
    for traced, labels in zip(tracers(size), tracing_masks(size), strict=True):
        views = []
        for index, (top, left) in enumerate(corners):
            parts = traced.as_subclass(Tracer), ViewCoords(canvas_size=size), labels.as_subclass(MovingMask)
            parts = tuple(F.crop(part, top, left, height, width) for part in parts)
            if index % 2:
                parts = tuple(F.horizontal_flip(part) for part in parts)
            image, coords, mask = (part.as_subclass(Tensor).contiguous() for part in parts)
            views.append(MaskedView(image, coords, torch.tensor(size), mask))
        batch = MaskedView(*(torch.stack(part) for part in zip(*views, strict=True)))
        with colours_untouched(augment), drawn_from(seed):
            passes.append(augment(batch))
    first, second = passes
    nearest = any(str(getattr(m, "flags", {}).get("resample", "")).endswith("NEAREST") for m in augment.modules())
    found: _Views = []
    for index, coords in enumerate(first.coords):
        canvas = (int(first.image.shape[-2]), int(first.image.shape[-1]))
        spans = source_steps(coords, canvas, size, 1.0)
        span, most = max(spans), max(1.0, 1 / min(spans))
        one, two = compared_images(first.image[index], second.image[index], max(1.0, 1 / span), most, where)
        slack = 2 + 2 * max(1.0, span)
        image = compared_image(one, two, coords, size, _half(max(1.0, span) if nearest else 0.0), slack, where)
        mask = compared_mask(first.mask[index], second.mask[index], coords, size, _half(1.0), slack, where)
        found.append((image, mask, None))
    return found


def _by_nearest(transform: Any) -> bool:
    # torchvision's versions keep the enum or its value.
    modes = (getattr(part, "interpolation", None) for part in nested(transform))
    return any(getattr(mode, "value", mode) in ("nearest", "nearest-exact") for mode in modes)


def _half(step: float) -> float:
    """Half a step along each axis: the diagonal of half a pixel."""
    return step / 2 * math.sqrt(2)
