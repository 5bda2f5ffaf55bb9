"""Proves or refutes that a pipeline's coords follow its pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.augment import BatchAugment, MultiView, View
from densessl.augment._steps import nested, steps, tracked_step
from densessl.coords import DenseCoords, ViewCoords
from densessl.coords._functionals import STATIONARY
from densessl.geometry import cell_centers

_MARK = 0.7381  # constant third channel: where it is not this, a pixel is fill, or partly so
_SIZES = ((240, 320), (320, 240), (300, 300), (181, 403))


class TrackingReport(NamedTuple):
    """What ``check_tracking`` saw.

    Attributes:
        max_error: largest distance between where a pixel came from and where its coords say, in source pixels, beyond
            the half step that nearest-neighbour interpolation may take.
        mean_error: mean over pixels, in source pixels, allowance not taken off.
        draws: views looked at.
        pixels: pixels compared.
    """

    max_error: float
    mean_error: float
    draws: int
    pixels: int


class _Tracer(tv_tensors.Image):
    """An image whose pixels say where they are: x, y and a constant; colour changes leave it alone."""


def _identity(image: _Tracer, *args: Any, **kwargs: Any) -> _Tracer:
    return image


for _name in sorted(STATIONARY):
    if hasattr(F, f"{_name}_image"):
        F.register_kernel(_name, _Tracer)(_identity)


def check_tracking(
    transform: Callable[..., Any], *, tolerance: float = 1.0, draws: int = 100, seed: int = 0
) -> TrackingReport:
    """Sends a tracer image through a whole pipeline and compares its pixels with the coords.

    The tracer's colours are positions. torchvision's photometric functionals and kornia's intensity augmentations leave
    it alone, so published pipelines can be audited as they are. A photometric step of one's own that does not go
    through torchvision's functionals changes the tracer's colours and is reported as movement.

    Not compared: fill, and a rim of two pixels around the view and around fill, where interpolation has nothing to
    interpolate with; pixels that the coords place outside the source, because those never match.

    Args:
        transform: a MultiView, a pipeline as MultiView takes it, or a BatchAugment.
        tolerance: in source pixels; where a step interpolates by nearest neighbour, half a source step (the source
            pixels that one view pixel spans) is added.
        draws: how often each pipeline is drawn.
        seed: of the draws; the global generators are left as they were.

    Returns:
        A report of the largest and the mean error.

    Raises:
        ValueError: where pixels moved and coords did not follow, with the error, the draw and the size of the source;
            if no pixel could be compared.
    """
    if isinstance(transform, MultiView):
        pipelines, dense = transform.transforms, transform.dense
    elif isinstance(transform, BatchAugment):
        pipelines, dense = (transform,), False
    else:
        pipelines, dense = MultiView(transform).transforms, False
    worst, total, pixels = 0.0, 0.0, 0
    with torch.random.fork_rng():
        for draw in range(draws):
            size = _SIZES[draw % len(_SIZES)]
            for pipeline in pipelines:
                torch.manual_seed(seed + draw)
                if isinstance(pipeline, BatchAugment):
                    error, allowance = _batch_draw(pipeline, size)
                else:
                    error, allowance = _draw(pipeline, size, dense)
                if error.numel() == 0:
                    continue
                excess = float((error - allowance).max())
                if not excess <= tolerance:
                    raise ValueError(
                        f"transform: pixels moved and coords did not follow: {float(error.max()):.2f} source pixels "
                        f"apart, {tolerance + allowance:.2f} allowed, on a source of {size[0]}x{size[1]} in draw "
                        f"{draw} of {pipeline!r}"
                    )
                worst, total, pixels = max(worst, excess), total + float(error.sum()), pixels + error.numel()
    if pixels == 0:
        raise ValueError(f"transform: no pixel of {draws} draws could be compared: the views show nothing but fill")
    return TrackingReport(worst, total / pixels, draws * len(pipelines), pixels)


def _tracer(size: tuple[int, int]) -> Tensor:
    h, w = size
    x, y = torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy")
    return torch.stack([x, y, torch.full_like(x, _MARK)])


def _draw(pipeline: Callable[..., Any], size: tuple[int, int], dense: bool) -> tuple[Tensor, float]:
    coords = (DenseCoords if dense else ViewCoords)(canvas_size=size)
    parts: list[Any] = [_tracer(size).as_subclass(_Tracer), coords]
    step, coarsest = _source_step(coords, size), 0.0
    for transform in steps(pipeline):
        parts = tracked_step(transform, parts)
        if not isinstance(parts[0], Tensor):
            raise ValueError(f"{transform!r}: expected a tensor image back, got {type(parts[0]).__name__}")
        before, step = step, _source_step(parts[1], size)
        if _by_nearest(transform):
            coarsest = max(coarsest, before, step)
        # Enlarging widens the rim in view pixels.
        parts[0] = _without_rim(parts[0], 2 * max(1.0, before / step))
    traced = parts[0].as_subclass(Tensor)[None]
    return _errors(traced, parts[1].as_subclass(Tensor)[None], size), _allowance(coarsest)


def _batch_draw(augment: BatchAugment, size: tuple[int, int]) -> tuple[Tensor, float]:
    tracer = _tracer(size).expand(4, -1, -1, -1).contiguous()
    view = View(tracer, torch.eye(3).expand(4, 3, 3), torch.tensor(size).expand(4, 2))
    with _colours_untouched(augment):
        view = augment(view)
    step = _source_step(view.coords[0], size)
    marked = torch.stack([_without_rim(image, 2 * max(1.0, 1 / step)) for image in view.image])
    nearest = any(str(getattr(m, "flags", {}).get("resample", "")).endswith("NEAREST") for m in augment.modules())
    return _errors(marked, view.coords, size), _allowance(max(1.0, step) if nearest else 0.0)


@contextmanager
def _colours_untouched(augment: BatchAugment) -> Iterator[None]:
    """kornia's intensity augmentations draw as ever and return their input."""
    import kornia.augmentation as K

    def unchanged(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return input

    intensity = [m for m in augment.modules() if isinstance(m, K.IntensityAugmentationBase2D)]
    for module in intensity:
        module.apply_transform = unchanged  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in intensity:
            del module.apply_transform


def _source_step(coords: Tensor, size: tuple[int, int]) -> float:
    """Source pixels between neighbouring view pixels, the most over the view."""
    canvas = coords.canvas_size if isinstance(coords, ViewCoords | DenseCoords) else (16, 16)
    plain = coords.as_subclass(Tensor)[None]
    grid = (min(canvas[0], 16), min(canvas[1], 16))
    position = cell_centers(plain, grid)[0].unflatten(0, grid) * torch.tensor([size[1], size[0]])
    along = [
        position.diff(dim=axis).norm(dim=-1).nan_to_num(0.0).amax() * grid[axis] / canvas[axis]
        for axis in (0, 1)
        if grid[axis] > 1
    ]
    return max([float(length) for length in along], default=1.0)


def _by_nearest(transform: Any) -> bool:
    # torchvision's versions keep the enum or its value.
    modes = (getattr(part, "interpolation", None) for part in nested(transform))
    return any(getattr(mode, "value", mode) in ("nearest", "nearest-exact") for mode in modes)


def _allowance(coarsest: float) -> float:
    """Half a step along each axis: the diagonal of half a pixel."""
    return coarsest / 2 * math.sqrt(2)


def _without_rim(image: Tensor, width: float) -> Any:
    """The tracer with its mark removed from a rim around the view and around fill."""
    mark = image.as_subclass(Tensor)[2]
    known = ((mark - _MARK).abs() < 1e-3).float()[None]
    reach = math.ceil(width)
    eroded = -nn.functional.max_pool2d(
        -nn.functional.pad(known, [reach] * 4), kernel_size=2 * reach + 1, stride=1, padding=0
    )
    marked = torch.cat([image.as_subclass(Tensor)[:2], torch.where(eroded > 0, _MARK, -1.0)])
    return tv_tensors.wrap(marked, like=image) if isinstance(image, tv_tensors.TVTensor) else marked


def _errors(traced: Tensor, coords: Tensor, size: tuple[int, int]) -> Tensor:
    view_size = traced.shape[-2:]
    claimed = cell_centers(coords, view_size)
    apart = (traced[:, :2].flatten(2).mT - claimed) * torch.tensor([size[1], size[0]])
    known = (traced[:, 2].flatten(1) - _MARK).abs() < 1e-3
    inside = ((claimed >= 0) & (claimed <= 1)).all(-1)
    return apart.norm(dim=-1)[known & inside]
