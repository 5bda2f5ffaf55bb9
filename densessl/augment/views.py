"""Views that know where they come from, and MultiView, which draws them from one image by torchvision v2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.augment._start import carried, checked_source_size, checked_start
from densessl.augment._steps import is_pil, nested, refuse_untrackable, steps, tracked_step
from densessl.coords import DenseCoords, ViewCoords

Size = Tensor | Sequence[int]


class View(NamedTuple):
    """An augmented image that knows where it was taken from; ``default_collate`` makes a batch of it.

    Attributes:
        image: ``(C, H, W)``, in a batch ``(B, C, H, W)``.
        coords: ``(3, 3)`` ``image_from_view``, or dense ``(2, H, W)``; in a batch with a leading B.
        source_size: int64 ``(2,)``, height and width of the source image; in a batch ``(B, 2)``.
    """

    image: Tensor
    coords: Tensor
    source_size: Tensor


class MaskedView(NamedTuple):
    """A ``View`` with a mask that moved along.

    Attributes:
        image: ``(C, H, W)``.
        coords: ``(3, 3)`` or ``(2, H, W)``.
        source_size: int64 ``(2,)``.
        mask: ``(H, W)`` or ``(1, H, W)``, of the dtype that came in: segments, labels, validity.
    """

    image: Tensor
    coords: Tensor
    source_size: Tensor
    mask: Tensor


class MultiView(nn.Module):
    """Several views of one image, each with its coords.

    One pipeline of torchvision v2 transforms makes one view. Geometric transforms move the coords through torchvision's
    own dispatch, so any nesting of Compose, RandomApply, RandomChoice and RandomOrder works, and so do transforms of
    one's own that call torchvision's functionals. What cannot be followed raises ValueError, here or at the latest when
    it runs; prove a pipeline with transforms of your own with ``densessl.check_tracking``.

    Args:
        *transforms: one per view; each takes and returns ``(image, coords)``, with a mask ``(image, coords, mask)``.
        dense: track with dense coords ``(2, H, W)``, which follow elastic transforms too and know padding wherever it
            came in; costs memory and about a resize per geometric step.

    Raises:
        ValueError: if there is no transform, or one that cannot be tracked.
    """

    def __init__(self, *transforms: Callable[..., Any], dense: bool = False) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("transforms: expected at least one, one per view, got none")
        for transform in transforms:
            if not callable(transform):
                raise ValueError(f"transforms: expected callables, one per view, got {type(transform).__name__}")
            refuse_untrackable(transform, dense)
        self.transforms = transforms
        self.dense = dense
        # PIL and tensors round the enlarged canvas of a rotation differently, by a pixel now and then; the coords
        # follow the tensors' way.
        self._expands = [any(getattr(part, "expand", False) for part in nested(t)) for t in transforms]

    def extra_repr(self) -> str:
        return "\n".join([*map(repr, self.transforms), f"dense={self.dense}"])

    def forward(
        self, image: Any, mask: Any = None, coords: Tensor | None = None, *, source_size: Size | None = None
    ) -> list[View] | list[MaskedView]:
        """Draws one view per transform.

        Args:
            image: PIL image or tensor ``(C, H, W)``.
            mask: optional PIL image or tensor ``(H, W)`` or ``(1, H, W)`` of the image's size; moves along by nearest
                neighbour, 0 where the view shows nothing.
            coords: optional ``(3, 3)`` or dense ``(2, H, W)``, with or without a leading 1: where the image's pixels
                lie in another image, as ``coords_from_flow`` gives it. The views then carry positions in that image,
                dense ones where these are dense.
            source_size: height and width of that other image; None: the same as this image's.

        Returns:
            One ``View`` per transform, ``MaskedView`` where a mask was given.

        Raises:
            ValueError: on other shapes, or if a transform moves or strips the coords in a way that cannot be followed;
                on start coords whose values lie in no unit square (pixels, a flow), or which are a homography where a
                view reaches beyond the image and ``dense`` is False.
        """
        source = _as_image(image)
        height, width = F.get_size(source)
        start = None if coords is None else checked_start(coords, (height, width))
        source_size = checked_source_size((height, width) if source_size is None else source_size)
        extra = [] if mask is None else [_as_mask(mask, (height, width))]
        views: list[Any] = []
        for transform, expands in zip(self.transforms, self._expands, strict=True):
            first = tv_tensors.Image(F.pil_to_tensor(source)) if expands and is_pil(source) else source
            parts = [first, (DenseCoords if self.dense else ViewCoords)(canvas_size=(height, width)), *extra]
            for step in steps(transform):
                parts = tracked_step(step, parts)
            pixels = F.pil_to_tensor(parts[0]) if is_pil(parts[0]) else parts[0].as_subclass(Tensor)
            place = parts[1] if start is None else carried(parts[1], start)
            if mask is None:
                views.append(View(pixels, place, source_size))
            else:
                views.append(MaskedView(pixels, place, source_size, parts[2].as_subclass(Tensor)))
        return views


def _as_image(image: Any) -> Any:
    if is_pil(image):
        # Palettes would be interpolated as if they were colours.
        return image.convert("RGB") if image.mode in ("P", "PA", "RGBA", "CMYK", "YCbCr", "LAB", "HSV") else image
    if not isinstance(image, Tensor) or image.ndim != 3 or 0 in image.shape:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image: expected a PIL image or a tensor (C, H, W), got {got}")
    return image if isinstance(image, tv_tensors.TVTensor) else tv_tensors.Image(image)


def _as_mask(mask: Any, size: tuple[int, int]) -> tv_tensors.Mask:
    mask = tv_tensors.Mask(F.pil_to_tensor(mask)[0] if is_pil(mask) else mask)
    if mask.ndim not in (2, 3) or tuple(mask.shape[-2:]) != size:
        raise ValueError(f"mask: expected (H, W) = {size}, the image's size, got {tuple(mask.shape)}")
    return mask
