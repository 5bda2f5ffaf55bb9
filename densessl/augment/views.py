"""Views that know where they come from, and MultiView, which draws them from one image by torchvision v2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.augment._alone import refuse_images_alone
from densessl.augment._draws import generators_kept, seed_generators
from densessl.augment._inputs import as_image, as_mask, checked_seeds, refuse_depth, refuse_values
from densessl.augment._start import carried, checked_source_size, checked_start
from densessl.augment._steps import (
    is_foreign,
    is_pil,
    nested,
    refuse_untrackable,
    scales_values,
    steps,
    tracked_step,
    writes_in_place,
)
from densessl.coords import DenseCoords, ViewCoords

Size = Tensor | Sequence[int]


class View(NamedTuple):
    """An augmented image that knows where it was taken from; ``default_collate`` makes a batch of it.

    Attributes:
        image: Image ``(C, H, W)``, in a batch ``(B, C, H, W)``.
        coords: Homography ``(3, 3)``, ``image_from_view``, or dense coords ``(2, H, W)``; in a batch with a leading B.
        source_size: Height and width of the source image in pixels, int64 ``(2,)``; in a batch ``(B, 2)``.

    Examples:
        >>> view = View(torch.rand(3, 64, 96), torch.eye(3), torch.tensor([64, 96]))
        >>> batch = torch.utils.data.default_collate([view, view])
        >>> batch.coords.shape
        torch.Size([2, 3, 3])
    """

    image: Tensor
    coords: Tensor
    source_size: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> View:
        """The same view with all its tensors on a device."""
        return View(*(part.to(device, non_blocking=non_blocking) for part in self))


class MaskedView(NamedTuple):
    """A ``View`` with a mask that moved along.

    Attributes:
        image: Image ``(C, H, W)``.
        coords: Homography ``(3, 3)`` or dense coords ``(2, H, W)``.
        source_size: Height and width of the source image in pixels, int64 ``(2,)``.
        mask: Segments, labels or validity, ``(H, W)`` or ``(1, H, W)``, in the dtype that came in.

    Examples:
        >>> views = byol_views(64)(torch.rand(3, 80, 100), mask=torch.ones(80, 100, dtype=torch.uint8))
        >>> views[0].mask.shape
        torch.Size([64, 64])
    """

    image: Tensor
    coords: Tensor
    source_size: Tensor
    mask: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskedView:
        """The same view with all its tensors on a device."""
        return MaskedView(*(part.to(device, non_blocking=non_blocking) for part in self))


class MultiView(nn.Module):
    """Several views of one image, each with its coords.

    One pipeline of torchvision v2 transforms makes one view. Geometric transforms move the coords through torchvision's
    own dispatch. Any nesting of Compose, RandomApply, RandomChoice and RandomOrder therefore works, and so do
    transforms of your own that call torchvision's functionals. A transform that cannot be followed raises ValueError,
    here or at the latest when it runs. Check a pipeline that holds transforms of your own with
    ``densessl.check_tracking``.

    Args:
        *transforms: One transform per view. Each takes and returns ``(image, coords)``, or with a mask ``(image,
            coords, mask)``.
        dense: Whether to track with dense coords ``(2, H, W)``. They also follow elastic transforms and know where
            padding came in. They cost memory and, per geometric step, about the time of a resize.

    Raises:
        ValueError: If there is no transform, or one of them cannot be tracked or takes an image without its coords.

    Examples:
        >>> crop = v2.RandomResizedCrop(64, antialias=True)
        >>> view1, view2 = MultiView(crop, crop)(torch.rand(3, 80, 100), seeds=[0, 1])
        >>> view1.image.shape, view1.coords.shape
        (torch.Size([3, 64, 64]), torch.Size([3, 3]))
    """

    def __init__(self, *transforms: Callable[..., Any], dense: bool = False) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("transforms: expected at least one, one per view, got none")
        for transform in transforms:
            if not callable(transform):
                name = type(transform).__name__
                hint = f"; write MultiView(*{name})" if isinstance(transform, (list, tuple)) else ""
                raise ValueError(f"transforms: expected callables, one per view, got {name}{hint}")
            refuse_untrackable(transform, dense)
            refuse_images_alone(transform)
        self.transforms = transforms
        self.dense = dense
        # PIL and tensors sometimes round the enlarged canvas of a rotation differently, by one pixel; the coords round
        # as tensors do.
        self._expands = [any(getattr(part, "expand", False) for part in nested(t)) for t in transforms]
        # A pipeline that writes in place gets a copy: it must not change the caller's image, nor what the other views
        # start from.
        self._writes = [writes_in_place(t) for t in transforms]
        # A first step of the user's own may bring values into 0..1; every other pipeline needs them there already.
        self._needs_unit_values = any(not is_foreign(next(steps(t), None)) for t in transforms)
        self._scales = any(scales_values(t) for t in transforms)

    def extra_repr(self) -> str:
        return "\n".join([*map(repr, self.transforms), f"dense={self.dense}"])

    def forward(
        self,
        image: Any,
        mask: Any = None,
        coords: Tensor | None = None,
        seeds: Sequence[int | Sequence[int]] | None = None,
        *,
        source_size: Size | None = None,
    ) -> list[View] | list[MaskedView]:
        """Draws one view per transform.

        Args:
            image: PIL image or tensor ``(C, H, W)``. Floating-point values lie in 0..1, unless every pipeline begins
                with a step of your own, which may bring other values there. Whole numbers are uint8, or uint16 where a
                pipeline scales them to 0..1.
            mask: Optional PIL image of one channel, or tensor ``(H, W)`` or ``(1, H, W)``, of the image's size. It
                moves along with the image: each pixel of the view takes the label at its centre, and 0 where the view
                shows nothing.
            coords: Optional coords ``(3, 3)`` or ``(2, H, W)``, with or without a leading 1, which say where the
                image's pixels lie in another image, as ``coords_from_flow`` gives them. The views then carry positions
                in that other image, dense ones if these are dense.
            seeds: Optionally one seed per view, each an int of at least 0 or a sequence of such ints (seed, epoch,
                index, ...). Every view then depends on its own seed alone, and the generators are left as they were.
            source_size: Height and width of that other image in pixels; None means those of this image.

        Returns:
            One ``View`` per transform, or one ``MaskedView`` each if a mask was given.

        Raises:
            ValueError: If a shape or value is not as described; if a transform moves or strips the coords or the mask
                in a way that cannot be followed; if the start coords hold pixels or a flow instead of positions in a
                unit square; or if they are a homography, a view reaches beyond the image and ``dense`` is False.
        """
        source = as_image(image)
        if self._needs_unit_values:
            refuse_values(source)
        if self._scales:
            refuse_depth(source)
        size = tuple(F.get_size(source))
        start = None if coords is None else checked_start(coords, size)
        shown_size = checked_source_size(size if source_size is None else source_size)
        labels = None if mask is None else as_mask(mask, size)
        numbers = checked_seeds(seeds, len(self.transforms))
        views: list[Any] = []
        with generators_kept(seeds is not None):
            for index, seed in enumerate(numbers):
                seed_generators(seed)
                pixels, place, *moved = self._drawn(index, source, labels, size)
                place = place if start is None else carried(place, start)
                views.append((MaskedView if moved else View)(pixels, place, shown_size, *moved))
        return views

    def _drawn(self, index: int, source: Any, mask: tv_tensors.Mask | None, size: tuple[int, ...]) -> Any:
        image = source
        if self._writes[index]:
            image, mask = _copied(source), None if mask is None else _copied(mask)
        if self._expands[index] and is_pil(image):
            image = tv_tensors.Image(F.pil_to_tensor(image))
        coords = (DenseCoords if self.dense else ViewCoords)(canvas_size=size)
        parts = [image, coords, *([] if mask is None else [mask])]
        for step in steps(self.transforms[index]):
            parts = tracked_step(step, parts)
        pixels = F.pil_to_tensor(parts[0]) if is_pil(parts[0]) else parts[0].as_subclass(Tensor)
        return (pixels, parts[1], *(part.as_subclass(Tensor) for part in parts[2:]))


def _copied(value: Any) -> Any:
    if is_pil(value):
        return value.copy()
    copied = tv_tensors.wrap(value.as_subclass(Tensor).clone(), like=value)
    copied.__dict__.update(value.__dict__)  # an image of a type of one's own may carry something along
    return copied
