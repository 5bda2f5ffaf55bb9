"""Torchvision pipelines from the inside: what they consist of, what cannot be tracked, and one tracked step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torchvision.transforms as v1
from PIL import Image as PILImage
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl.coords import DenseCoords, MovingMask, ViewCoords

# Transforms that move pixels without calling any functional's kernel for the coords, or that do not return one view.
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
}
_STRIPS = "it strips the coords of their type, and what follows would not be tracked"
# torchvision's old transforms move pixels, except for these: a step of the user's own may hold them to change colours.
_OLD_COLOURS = (
    "ColorJitter",
    "Compose",
    "ConvertImageDtype",
    "GaussianBlur",
    "Grayscale",
    "Lambda",
    "Normalize",
    "PILToTensor",
    "RandomAdjustSharpness",
    "RandomApply",
    "RandomAutocontrast",
    "RandomChoice",
    "RandomEqualize",
    "RandomErasing",
    "RandomGrayscale",
    "RandomInvert",
    "RandomOrder",
    "RandomPosterize",
    "RandomSolarize",
    "ToPILImage",
    "ToTensor",
)


def children(transform: Any) -> tuple[Any, ...]:
    """What a container of torchvision's kind, or an ``nn.Sequential``, hands its inputs to."""
    if isinstance(transform, nn.Sequential):
        return tuple(transform)
    inner = getattr(transform, "transforms", None)
    return tuple(inner) if isinstance(inner, (list, tuple, nn.ModuleList)) else ()


def nested(transform: Any) -> Iterator[Any]:
    """A transform and every transform inside it, in order, also those that it holds as attributes.

    Args:
        transform: A torchvision transform, an ``nn.Sequential`` of them, or any callable.
    """
    yield from _nested(transform, set())


def _nested(transform: Any, seen: set[int]) -> Iterator[Any]:
    if id(transform) in seen:
        return
    seen.add(id(transform))
    yield transform
    for child in (*children(transform), *_held(transform)):
        yield from _nested(child, seen)


def _held(transform: Any) -> Iterator[Any]:
    """Callables in an object's attributes, a function's variables and defaults, or a partial's arguments."""
    values: list[Any] = list(getattr(transform, "__dict__", {}).values())
    if isinstance(transform, functools.partial):
        values += [transform.func, transform.args, transform.keywords]
    values += [getattr(transform, "__self__", None), getattr(transform, "__wrapped__", None)]
    for cell in getattr(transform, "__closure__", None) or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not bound yet
            continue
    values += [getattr(transform, "__defaults__", None), getattr(transform, "__kwdefaults__", None)]
    named = getattr(getattr(transform, "__code__", None), "co_names", ())
    variables = [getattr(transform, "__globals__", {}).get(name) for name in named]
    values += [value for value in variables if isinstance(value, nn.Module)]  # functions would lead anywhere
    while values:
        value = values.pop(0)
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, (list, tuple, set)):
            values += value
        elif callable(value) and not isinstance(value, (type, Tensor)):
            yield value


def steps(transform: Any) -> Iterator[Callable[..., Any]]:
    """The steps that a pipeline always takes one after the other: what ``Compose`` and ``nn.Sequential`` hold.

    A container with its own forward, call or hooks is one step: what it does with its children is its own affair.

    Args:
        transform: A torchvision transform, an ``nn.Sequential`` of them, or any callable.
    """
    if _runs_children_in_order(transform):
        for child in children(transform):
            yield from steps(child)
    else:
        yield transform


def _runs_children_in_order(transform: Any) -> bool:
    for container in (v2.Compose, nn.Sequential):
        if isinstance(transform, container):
            own = type(transform)
            hooked = any(getattr(transform, name, None) for name in ("_forward_hooks", "_forward_pre_hooks"))
            iterates = isinstance(transform, v2.Compose) or own.__iter__ is nn.Sequential.__iter__
            same = own.forward is container.forward and own.__call__ is nn.Module.__call__
            return same and iterates and not hooked and "forward" not in vars(transform)
    return False


def is_foreign(step: Any) -> bool:
    """Whether something in a step is neither torchvision's nor this library's: it may do anything to an image."""
    return any(
        not type(part).__module__.startswith(("torchvision.", "densessl.", "torch.nn.")) for part in nested(step)
    )


def scales_values(transform: Any) -> bool:
    """Whether a pipeline divides whole numbers by the largest one of their type, as ``ToDtype(scale=True)`` does.

    Before that, a first step of the user's own may give the image another type.
    """
    if is_foreign(next(steps(transform), None)):
        return False
    return any(
        isinstance(part, v2.ConvertImageDtype) or (isinstance(part, v2.ToDtype) and part.scale)
        for part in nested(transform)
    )


def writes_in_place(transform: Any) -> bool:
    """Whether a pipeline may write into its input image, as the user's own steps and ``inplace=True`` may."""
    return is_foreign(transform) or any(
        getattr(part, "inplace", False) and not type(part).__module__.startswith("densessl.")
        for part in nested(transform)
    )


def refuse_untrackable(transform: Any, dense: bool) -> None:
    in_order = {id(step) for step in _containers_in_order(transform)}
    handed = {id(part) for part in _handed_all_parts(transform)}
    for part in nested(transform):
        name = type(part).__name__
        reason = next((why for cls, why in _UNTRACKABLE.items() if isinstance(part, cls)), None)
        old = type(part).__module__.startswith(f"{v1.__name__}.") and not type(part).__module__.startswith(v2.__name__)
        if isinstance(part, v2.ElasticTransform) and not dense:
            reason = "it is no homography; use MultiView(..., dense=True)"
        if old and name not in _OLD_COLOURS:
            reason = _NO_KERNEL
        if _fills_masks(part):
            reason = "it fills masks with a value of its own; masks are 0 where a view shows nothing"
        if id(part) in handed:
            if isinstance(part, v2.ToPureTensor):
                reason = _STRIPS
            if isinstance(part, v2.Lambda) and issubclass(ViewCoords, part.types):
                reason = "it takes the coords too; restrict it, v2.Lambda(f, tv_tensors.Image), where f moves no pixel"
            if old:
                reason = "it is of torchvision's old transforms and takes no coords; take torchvision.transforms.v2's"
            if type(part) is nn.Sequential and id(part) not in in_order:
                reason = "inside another transform it takes one value, and not image and coords; use v2.Compose there"
        if reason is not None:
            raise ValueError(f"transforms: {name} cannot be tracked: {reason}")


def _fills_masks(part: Any) -> bool:
    fill = getattr(part, "fill", None)
    return isinstance(fill, dict) and fill.get(tv_tensors.Mask, 0) not in (0, None)


def _containers_in_order(transform: Any) -> Iterator[Any]:
    if _runs_children_in_order(transform):
        yield transform
        for child in children(transform):
            yield from _containers_in_order(child)


def _handed_all_parts(transform: Any) -> Iterator[Any]:
    """The transforms that get image and coords, and not only an image, as the user's own steps may hand on."""
    yield transform
    for child in children(transform):
        yield from _handed_all_parts(child)


def tracked_step(step: Callable[..., Any], parts: Sequence[Any]) -> list[Any]:
    """Runs one transform and raises where image, coords and mask have come apart.

    Args:
        step: A transform that takes the parts and returns them.
        parts: The image, its coords and optionally a mask.

    Returns:
        The parts after the step.

    Raises:
        ValueError: If the step returns something else, if coords or a mask lost their type, or if the size of an image
            or a mask is not the coords' ``canvas_size``.
    """
    out = step(*parts)
    if not isinstance(out, (tuple, list)) or len(out) != len(parts):
        got = type(out).__name__ if not isinstance(out, (tuple, list)) else f"{len(out)} values"
        raise ValueError(f"{step!r}: expected {len(parts)} values back, image and coords among them, got {got}")
    image, coords = out[0], out[1]
    if not isinstance(coords, (ViewCoords, DenseCoords)):
        raise ValueError(f"{step!r} returned coords as {type(coords).__name__}: it cannot be tracked")
    if not hasattr(coords, "canvas_size"):
        raise ValueError(
            f"{step!r} returned coords without canvas_size, as tv_tensors.wrap leaves them: it cannot be tracked; make "
            "them with ViewCoords(matrix, canvas_size=(H, W))"
        )
    if not (is_pil(image) or (isinstance(image, Tensor) and image.ndim >= 3)):
        raise ValueError(f"{step!r}: expected an image back, got {type(image).__name__}")
    if tuple(F.get_size(image)) != coords.canvas_size:
        raise ValueError(
            f"{step!r} moved pixels and not the coords: the image is now {tuple(F.get_size(image))}, the coords "
            f"are those of {coords.canvas_size}"
        )
    return [image, coords, *(_checked_mask(step, mask, coords.canvas_size) for mask in out[2:])]


def _checked_mask(step: Callable[..., Any], mask: Any, size: tuple[int, int]) -> MovingMask:
    if not isinstance(mask, tv_tensors.Mask):
        raise ValueError(
            f"{step!r} returned the mask as {type(mask).__name__}: what follows would not move it. Give it its type "
            "back, tv_tensors.wrap(changed, like=mask)"
        )
    if mask.ndim < 2 or tuple(mask.shape[-2:]) != size:
        raise ValueError(
            f"{step!r} moved pixels and not the mask: the image is now {size}, the mask {tuple(mask.shape)}"
        )
    return mask if isinstance(mask, MovingMask) else mask.as_subclass(MovingMask)


def is_pil(image: Any) -> bool:
    return isinstance(image, PILImage.Image)
