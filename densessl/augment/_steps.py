"""Torchvision pipelines from the inside: what they consist of, what cannot be tracked, and one tracked step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torchvision.transforms as v1
from PIL import Image as PILImage
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl.coords import DenseCoords, ViewCoords

# Transforms that move pixels without any functional's kernel being called for the coords, or return no single view.
_NO_KERNEL = "it moves pixels without telling the coords"
_UNTRACKABLE: dict[type, str] = {
    v2.AutoAugment: _NO_KERNEL,
    v2.RandAugment: _NO_KERNEL,
    v2.TrivialAugmentWide: _NO_KERNEL,
    v2.AugMix: _NO_KERNEL,
    v2.LinearTransformation: "it mixes pixels of all places",
    v2.MixUp: "it mixes images",
    v2.CutMix: "it mixes images",
    v2.FiveCrop: "it returns several views; give MultiView several transforms",
    v2.TenCrop: "it returns several views; give MultiView several transforms",
    v2.ToPureTensor: "it strips the coords of their type, and what follows would not be tracked",
}


def nested(transform: Any) -> Iterator[Any]:
    """A transform and every transform inside it, in order.

    Args:
        transform: a torchvision transform, an ``nn.Sequential`` of them, or any callable.
    """
    yield transform
    inner = getattr(transform, "transforms", None)
    children = inner if isinstance(inner, list | tuple | nn.ModuleList) else ()
    if isinstance(transform, nn.Sequential):
        children = tuple(transform)
    for child in children:
        yield from nested(child)


def steps(transform: Any) -> Iterator[Callable[..., Any]]:
    """The steps that a pipeline always takes one after the other: what ``Compose`` and ``nn.Sequential`` hold.

    Args:
        transform: as for ``nested``.
    """
    if isinstance(transform, v2.Compose | nn.Sequential):
        for child in transform.transforms if isinstance(transform, v2.Compose) else transform:
            yield from steps(child)
    else:
        yield transform


def refuse_untrackable(transform: Any, dense: bool) -> None:
    for part in nested(transform):
        name = type(part).__name__
        reason = next((why for cls, why in _UNTRACKABLE.items() if isinstance(part, cls)), None)
        if isinstance(part, v2.ElasticTransform) and not dense:
            reason = "it is no homography; use MultiView(..., dense=True)"
        if isinstance(part, v2.Lambda) and issubclass(ViewCoords, part.types):
            reason = "it takes the coords too; restrict it, v2.Lambda(f, tv_tensors.Image), where f moves no pixel"
        if type(part).__module__.startswith(f"{v1.__name__}.") and not type(part).__module__.startswith(v2.__name__):
            reason = "it is of torchvision's old transforms and takes no coords; take it from torchvision.transforms.v2"
        if reason is not None:
            raise ValueError(f"transforms: {name} cannot be tracked: {reason}")


def tracked_step(step: Callable[..., Any], parts: Sequence[Any]) -> list[Any]:
    """Runs one transform and raises where image and coords have come apart.

    Args:
        step: takes and returns the parts.
        parts: image, coords and, optionally, a mask.

    Returns:
        The parts after the step.

    Raises:
        ValueError: if the step returns something else, coords that lost their type, or an image whose size is not the
            coords' ``canvas_size``.
    """
    out = step(*parts)
    if not isinstance(out, tuple | list) or len(out) != len(parts):
        got = type(out).__name__ if not isinstance(out, tuple | list) else f"{len(out)} values"
        raise ValueError(f"{step!r}: expected {len(parts)} values back, image and coords among them, got {got}")
    image, coords = out[0], out[1]
    if not isinstance(coords, ViewCoords | DenseCoords):
        raise ValueError(f"{step!r} returned coords as {type(coords).__name__}: it cannot be tracked")
    if not (is_pil(image) or (isinstance(image, Tensor) and image.ndim >= 3)):
        raise ValueError(f"{step!r}: expected an image back, got {type(image).__name__}")
    if tuple(F.get_size(image)) != coords.canvas_size:
        raise ValueError(
            f"{step!r} moved pixels and not the coords: the image is now {tuple(F.get_size(image))}, the coords "
            f"are those of {coords.canvas_size}"
        )
    return list(out)


def is_pil(image: Any) -> bool:
    return isinstance(image, PILImage.Image)
