"""Views and where they come from: MultiView per image (torchvision v2), BatchAugment per batch (kornia)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.coords import DenseCoords, ViewCoords
from densessl.geometry import cell_centers, compose, coords_from_kornia, sample_dense, warp
from densessl.pipeline import is_pil, nested, refuse_untrackable, steps, tracked_step


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


AnyView = TypeVar("AnyView", View, MaskedView)


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

    def forward(self, image: Any, mask: Any = None) -> list[View] | list[MaskedView]:
        """Draws one view per transform.

        Args:
            image: PIL image or tensor ``(C, H, W)``.
            mask: optional PIL image or tensor ``(H, W)`` or ``(1, H, W)`` of the image's size; moves along by nearest
                neighbour, 0 where the view shows nothing.

        Returns:
            One ``View`` per transform, ``MaskedView`` where a mask was given.

        Raises:
            ValueError: on other shapes, or if a transform moves or strips the coords in a way that cannot be followed.
        """
        source = _as_image(image)
        height, width = F.get_size(source)
        source_size = torch.tensor([height, width])
        extra = [] if mask is None else [_as_mask(mask, (height, width))]
        views: list[Any] = []
        for transform, expands in zip(self.transforms, self._expands, strict=True):
            start = tv_tensors.Image(F.pil_to_tensor(source)) if expands and is_pil(source) else source
            parts = [start, (DenseCoords if self.dense else ViewCoords)(canvas_size=(height, width)), *extra]
            for step in steps(transform):
                parts = tracked_step(step, parts)
            pixels = F.pil_to_tensor(parts[0]) if is_pil(parts[0]) else parts[0].as_subclass(Tensor)
            if mask is None:
                views.append(View(pixels, parts[1], source_size))
            else:
                views.append(MaskedView(pixels, parts[1], source_size, parts[2].as_subclass(Tensor)))
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


class BatchAugment(nn.Module):
    """A kornia augmentation on a batch of views, on the views' device; coords are composed.

    Takes uint8 (and scales it to 0..1, once) or float in 0..1; returns what the augmentation returns: normalised, where
    it ends with ``Normalize``. Runs in float32, outside autocast.

    Args:
        augmentation: one of kornia's 2D augmentations, or an ``AugmentationSequential`` of them. The matrix that kornia
            reports moves the coords, on top of whatever happened before.

    Raises:
        ValueError: if it holds an augmentation without such a matrix (elastic, thin-plate, fisheye, jigsaw, mixes,
            RandAugment), or is another container (kornia's ImageSequential does not report a matrix).
    """

    def __init__(self, augmentation: nn.Module) -> None:
        super().__init__()
        import kornia.augmentation as K

        leaves = list(_kornia_leaves(augmentation, K.AugmentationSequential))
        for leaf in leaves:
            if not isinstance(leaf, K.RigidAffineAugmentationBase2D):
                raise ValueError(
                    f"augmentation: {type(leaf).__name__} cannot be tracked: expected kornia's 2D augmentations that "
                    "report a transform_matrix, or an AugmentationSequential of such"
                )
        self.augmentation = augmentation
        # By name, because they came and went with kornia's versions.
        self._colour = [name for leaf in leaves if (name := type(leaf).__name__) in _COLOUR_STEPS]
        # Without a geometric part there is nothing to compose, and no matrix to multiply with.
        self._moves = any(not isinstance(leaf, K.IntensityAugmentationBase2D) for leaf in leaves)

    def forward(self, view: AnyView, *, seed: int | None = None) -> AnyView:
        """Augments a batch.

        Args:
            view: a batch of views, image ``(B, C, H, W)``, uint8 or float in 0..1.
            seed: makes the draw a function of this number alone and leaves the global generators as they were.

        Returns:
            The same kind of view, float32.

        Raises:
            ValueError: if the image is no such batch, or has not the 3 channels that a step on colours needs.
        """
        image = view.image
        if image.ndim != 4 or not (image.dtype == torch.uint8 or image.is_floating_point()):
            raise ValueError(
                f"view.image: expected uint8 or floating point (B, C, H, W), got {image.dtype} {tuple(image.shape)}"
            )
        if self._colour and image.shape[1] != 3:
            raise ValueError(
                f"view.image: expected (B, C, H, W) with C = 3 channels, for {', '.join(self._colour)}; "
                f"multichannel_photometric takes any number; got C = {image.shape[1]}"
            )
        old_size = image.shape[-2:]
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        devices = [image.device] if image.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=seed is not None), torch.autocast(image.device.type, enabled=False):
            if seed is not None:
                torch.manual_seed(seed)
            image = self.augmentation(image)
        view = view._replace(image=image)
        if not self._moves:
            return view
        matrix = cast(Tensor, self.augmentation.transform_matrix)
        return _moved(view, coords_from_kornia(matrix.to(image.device).float(), old_size, image.shape[-2:]))


def _moved(view: AnyView, old_from_new: Tensor) -> AnyView:
    """Coords (and mask) of a view whose image was resampled; old_from_new: (B, 3, 3) between unit squares."""
    size = view.image.shape[-2:]
    if view.coords.ndim == 3:
        coords = compose(view.coords, old_from_new)
    else:
        coords = sample_dense(view.coords, cell_centers(old_from_new, size)).mT.unflatten(2, size)
    view = view._replace(coords=coords)
    if isinstance(view, MaskedView):
        mask = view.mask.unsqueeze(1) if view.mask.ndim == 3 else view.mask
        # float64 holds every integer label exactly.
        moved = warp(mask.double(), old_from_new, size, mode="nearest").to(mask.dtype)
        view = view._replace(mask=moved.squeeze(1) if view.mask.ndim == 3 else moved)
    return view


# kornia's augmentations that take no other number of channels than 3; where they are drawn, and only then, they fail.
_COLOUR_STEPS = {
    "ColorJiggle",
    "ColorJitter",
    "RandomHue",
    "RandomJPEG",
    "RandomPlanckianJitter",
    "RandomRGBShift",
    "RandomSaturation",
    "RandomSnow",
}


def _kornia_leaves(module: nn.Module, container: type) -> Iterator[nn.Module]:
    if isinstance(module, container):
        for child in module.children():
            yield from _kornia_leaves(child, container)
    else:
        yield module
