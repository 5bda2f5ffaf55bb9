"""BatchAugment: a batch of views through kornia, on their device."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from densessl._tensors import check_tensor
from densessl.augment._draws import drawn_from
from densessl.augment._inputs import refuse_values
from densessl.augment.views import MaskedView, View
from densessl.geometry import cell_centers, compose, coords_from_kornia, is_dense, sample_dense, warp

AnyView = TypeVar("AnyView", View, MaskedView)


class BatchAugment(nn.Module):
    """A kornia augmentation on a batch of views, on the views' device; coords are composed.

    Images come in as uint8, which is scaled to 0..1 once, or as float in 0..1. They go out as the augmentation returns
    them: normalised if it ends with ``Normalize``. Everything runs in float32, outside autocast.

    Args:
        augmentation: One of kornia's 2D augmentations, or an ``AugmentationSequential`` of them. The matrix that kornia
            reports is applied to the coords that the view already has.

    Raises:
        ValueError: If the augmentation has no such matrix (elastic, thin-plate, fisheye, jigsaw, mixes, RandAugment),
            is another kind of container (kornia's ImageSequential reports no matrix), is told to skip the matrix, or
            pads with mirrored pixels, which coords cannot describe.

    Examples:
        >>> import kornia.augmentation as K
        >>> augment = BatchAugment(K.RandomHorizontalFlip(p=1.0))
        >>> view = View(torch.rand(2, 3, 64, 64), torch.eye(3).expand(2, 3, 3), torch.tensor([[64, 64], [64, 64]]))
        >>> augment(view).coords[0, 0].tolist()
        [-1.0, 0.0, 1.0]
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
            mode = _mirrors(leaf)
            if mode is not None:
                raise ValueError(
                    f"augmentation: {type(leaf).__name__} with {mode!r} padding cannot be tracked: it shows mirrored "
                    "pixels where the coords of a crop continue into the source image; pad with a constant"
                )
        self.augmentation = augmentation
        # On other devices than the CPU the values are checked in the first batch only: reading one back stalls a GPU.
        self._looked = False
        # Looked up by name, because not every version of kornia has all of them.
        self._colour = [name for leaf in leaves if (name := type(leaf).__name__) in _COLOUR_STEPS]
        # Without a geometric part there is nothing to compose, and no matrix to multiply with.
        self._moves = any(not isinstance(leaf, K.IntensityAugmentationBase2D) for leaf in leaves)
        for module in augmentation.modules():
            if self._moves and getattr(module, "_transformation_matrix_arg", None) == "skip":
                raise ValueError(
                    "augmentation: expected one that reports its transform_matrix, got "
                    f"{type(module).__name__} with transformation_matrix_mode='skip'; leave it at 'silent'"
                )

    def forward(self, view: AnyView, *, seed: int | None = None) -> AnyView:
        """Augments a batch.

        Args:
            view: A batch of views with images ``(B, C, H, W)``, uint8 or float in 0..1.
            seed: Seed that alone determines the draw. The global generators of all devices are left as they were. None
                draws from the global generators.

        Returns:
            The same kind of view, with a float32 image.

        Raises:
            ValueError: If the view is not such a batch; if its values are not in 0..1 (checked in every batch on the
                CPU, in the first one on another device, never in a compiled graph); or if it does not have the 3
                channels that a colour step needs.
        """
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**64):
            raise ValueError(f"seed: expected an int of at least 0, below 2**64, got {seed!r}")
        if not isinstance(view, (View, MaskedView)):
            raise ValueError(
                f"view: expected a View or a MaskedView, as MultiView gives them, got {type(view).__name__}"
            )
        image = view.image
        check_tensor(image, "view.image", "uint8 or floating point (B, C, H, W)")
        if image.ndim != 4 or not (image.dtype == torch.uint8 or image.is_floating_point()):
            raise ValueError(
                f"view.image: expected uint8 or floating point (B, C, H, W), got {image.dtype} {tuple(image.shape)}"
                f"{'; default_collate makes a batch of views' if image.ndim == 3 else ''}"
            )
        if image.numel() == 0:
            raise ValueError(f"view.image: expected (B, C, H, W) with at least one view, got {tuple(image.shape)}")
        if image.shape[3] <= 4 < min(image.shape[1:3]):
            raise ValueError(
                f"view.image: expected (B, C, H, W), got {tuple(image.shape)}, which looks like (B, H, W, C): "
                "permute(0, 3, 1, 2) it"
            )
        _check_batch(view)
        if not torch.compiler.is_compiling() and (image.device.type == "cpu" or not self._looked):
            # Bicubic resizing overshoots by some hundredths.
            refuse_values(image, "view.image", slack=0.1)
            self._looked = True
        if self._colour and image.shape[1] != 3:
            raise ValueError(
                f"view.image: expected (B, C, H, W) with C = 3 channels, for {', '.join(self._colour)}; "
                f"multichannel_photometric takes any number; got C = {image.shape[1]}"
            )
        old_size = image.shape[-2:]
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        with drawn_from(seed, image.device), torch.autocast(image.device.type, enabled=False):
            image = self.augmentation(image)
        view = view._replace(image=image)
        if not self._moves:
            return view
        matrix = cast("Tensor | None", getattr(self.augmentation, "transform_matrix", None))
        if matrix is None:
            raise ValueError(f"augmentation: expected one that reports a transform_matrix, got {self.augmentation!r}")
        moved = coords_from_kornia(matrix.to(image.device).float(), old_size, image.shape[-2:])
        return _moved(view, moved.to(view.coords.dtype))  # float32, or float64 where a view of one's own has that


def _check_batch(view: AnyView) -> None:
    """Raises ValueError, with the name of the view's part, unless all parts are batches of one size."""
    batch, device = view.image.shape[0], view.image.device
    is_dense(view.coords)
    for name in ("coords", *(["mask"] if isinstance(view, MaskedView) else [])):
        other = getattr(getattr(view, name), "device", device)
        if other != device:
            raise ValueError(f"view.{name}: expected a tensor on {device} as view.image, got {other}; view.to(device)")
    if view.coords.shape[0] != batch:
        raise ValueError(f"view.coords: expected as many as images, B = {batch}, got {view.coords.shape[0]}")
    check_tensor(view.source_size, "view.source_size", f"(B, 2) = ({batch}, 2)")
    if tuple(view.source_size.shape) != (batch, 2):
        raise ValueError(f"view.source_size: expected (B, 2) = ({batch}, 2), got {tuple(view.source_size.shape)}")
    if isinstance(view, MaskedView):
        check_tensor(view.mask, "view.mask", "(B, H, W) or (B, 1, H, W)")
        shape: tuple[int, ...] = tuple(view.mask.shape)
        size: tuple[int, ...] = tuple(view.image.shape[-2:])
        if shape not in ((batch, *size), (batch, 1, *size)):
            raise ValueError(f"view.mask: expected (B, H, W) = {(batch, *size)} or (B, 1, H, W), got {shape}")


def _mirrors(augmentation: nn.Module) -> str | None:
    """The mode of a kornia augmentation that pads with mirrored pixels."""
    flags = getattr(augmentation, "flags", {})
    for key in ("padding_mode", "pad_mode"):
        mode = flags.get(key)
        name = str(getattr(mode, "name", mode)).lower()
        if name in ("reflect", "reflection", "symmetric", "circular"):
            return name
    return None


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


# kornia's augmentations that accept 3 channels only; they fail where they are drawn, not where they are made.
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
