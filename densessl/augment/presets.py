"""The published view pipelines, as torchvision v2 transforms on the CPU or as kornia augmentations on the device.

With ``photometric=True`` a ``*_views`` pipeline is whole: it ends in normalised float. With ``photometric=False`` it
holds the geometric part alone and keeps uint8; the matching ``*_photometric()`` does the rest on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl.augment._crop import random_crop
from densessl.augment._pil import ELSE, ExpectChannels, NormalizeOwn, OnPIL, check_statistics
from densessl.augment.batch import BatchAugment
from densessl.augment.views import MultiView

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Range = tuple[float, float]


def byol_views(
    size: int | Sequence[int] = 224,
    photometric: bool = True,
    *,
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    extra: Sequence[nn.Module] = (),
) -> MultiView:
    """BYOL's two views, which PixPro trains with.

    Random resized crop, flip, jitter (0.4, 0.4, 0.2, 0.1; p 0.8), grey (p 0.2), blur (p 1.0 in view 1, 0.1 in view 2),
    solarize (p 0.2, view 2 only). Source: PixPro's published code, option BYOL.

    Args:
        size: Side of the views in pixels, or (height, width).
        photometric: Whether the photometric steps are included. If False, the views are only cropped and flipped;
            ``byol_photometric`` does the rest on the device.
        scale: Range of the share of the image's area that a crop covers, in 0..1.
        ratio: Range of a crop's width divided by its height.
        mean: Mean of each channel, for images in 0..1 (default: ImageNet's); used if ``photometric``.
        std: Standard deviation of each channel, for images in 0..1 (default: ImageNet's); used if ``photometric``.
        extra: Further geometric steps (vertical flips, quarter turns), put after crop and flip and before the
            photometric steps of both views.

    Returns:
        A MultiView of two views.

    Examples:
        >>> view1, view2 = byol_views(size=64)(torch.rand(3, 80, 100))
        >>> view1.image.shape
        torch.Size([3, 64, 64])
    """
    first = pil_steps((0.4, 0.4, 0.2, 0.1), blur_p=1.0, solarize_p=0.0, mean=mean, std=std) if photometric else []
    second = pil_steps((0.4, 0.4, 0.2, 0.1), blur_p=0.1, solarize_p=0.2, mean=mean, std=std) if photometric else []
    return two_views(size, scale, ratio, first, second, extra)


def mocov2_views(
    size: int | Sequence[int] = 224,
    photometric: bool = True,
    *,
    scale: Range = (0.2, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    extra: Sequence[nn.Module] = (),
) -> MultiView:
    """MoCo v2's two views, both alike: jitter (0.4, 0.4, 0.4, 0.1; p 0.8), grey (p 0.2), blur (p 0.5).

    Arguments and return value as in ``byol_views``; the device half is ``mocov2_photometric``.

    Examples:
        >>> view1, view2 = mocov2_views(size=64)(torch.rand(3, 80, 100))
    """
    part = pil_steps((0.4, 0.4, 0.4, 0.1), blur_p=0.5, solarize_p=0.0, mean=mean, std=std) if photometric else []
    return two_views(size, scale, ratio, part, part, extra)


def simclr_views(
    size: int | Sequence[int] = 224,
    photometric: bool = True,
    *,
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    extra: Sequence[nn.Module] = (),
) -> MultiView:
    """SimCLR's two views, both alike: jitter (0.8, 0.8, 0.8, 0.2; p 0.8), grey (p 0.2), blur (p 0.5).

    Arguments and return value as in ``byol_views``; the device half is ``simclr_photometric``.

    Examples:
        >>> view1, view2 = simclr_views(size=64)(torch.rand(3, 80, 100))
    """
    part = pil_steps((0.8, 0.8, 0.8, 0.2), blur_p=0.5, solarize_p=0.0, mean=mean, std=std) if photometric else []
    return two_views(size, scale, ratio, part, part, extra)


def two_views(
    size: int | Sequence[int],
    scale: Range,
    ratio: Range,
    first: list[nn.Module],
    second: list[nn.Module],
    extra: Sequence[nn.Module] = (),
) -> MultiView:
    """Random resized crop, flip and further steps, one list per view.

    Args:
        size: Side of the views in pixels, or (height, width).
        scale: Range of the share of the image's area that a crop covers, in 0..1.
        ratio: Range of a crop's width divided by its height.
        first: Further steps of the first view.
        second: Further steps of the second view.
        extra: Further geometric steps of both views, put after crop and flip.

    Returns:
        A MultiView of two views.

    Raises:
        ValueError: If the size or a range is not as described.
    """

    def geometric() -> list[nn.Module]:
        return [random_crop(size, scale, ratio), v2.RandomHorizontalFlip(0.5), *extra]

    return MultiView(v2.Compose([*geometric(), *first]), v2.Compose([*geometric(), *second]))


def pil_steps(
    jitter: tuple[float, float, float, float],
    *,
    blur_p: float,
    solarize_p: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[nn.Module]:
    """Jitter, grey, blur and solarize through PIL, then normalisation."""
    check_statistics(mean, std)
    return [
        ExpectChannels((1, 3) if len(mean) == 1 else (3,), f"for ColorJitter, and as mean and std; {ELSE}"),
        OnPIL(
            v2.RandomApply([v2.ColorJitter(*jitter)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([PILGaussianBlur((0.1, 2.0))], p=blur_p),
            v2.RandomSolarize(threshold=128, p=solarize_p),
        ),
        v2.ToDtype(torch.float32, scale=True),
        NormalizeOwn(mean, std, inplace=True),
    ]


class PILGaussianBlur(v2.Transform):
    """Gaussian blur through PIL, as in the published pipelines, where torchvision's is slower on a CPU.

    Tensors go through torchvision's ``gaussian_blur``. Measure: ``python benchmarks/photometric.py``.

    Args:
        sigma: Smallest and largest radius in pixels; one radius is drawn per image.

    Examples:
        >>> from torchvision import tv_tensors
        >>> PILGaussianBlur((0.1, 2.0))(tv_tensors.Image(torch.rand(3, 64, 64))).shape
        torch.Size([3, 64, 64])
    """

    def __init__(self, sigma: Range = (0.1, 2.0)) -> None:
        super().__init__()
        self.sigma = sigma

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the radius, from torch's generator."""
        return {"sigma": float(torch.empty(1).uniform_(*self.sigma))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Blurs images; other inputs are returned as they came."""
        sigma = params["sigma"]
        if isinstance(inpt, Image.Image):
            return inpt.filter(ImageFilter.GaussianBlur(sigma))
        side = 2 * round(3 * sigma + 0.5) + 1
        return self._call_kernel(F.gaussian_blur, inpt, [side, side], [sigma, sigma])


def byol_photometric(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> tuple[BatchAugment, BatchAugment]:
    """The photometric half of ``byol_views``, for the device: one BatchAugment per view, asymmetric as published.

    Args:
        mean: Mean of each channel, for images in 0..1 (default: ImageNet's).
        std: Standard deviation of each channel, for images in 0..1 (default: ImageNet's).

    Returns:
        One BatchAugment for the first view, one for the second.

    Examples:
        >>> views = byol_views(size=64, photometric=False)(torch.rand(3, 80, 100))
        >>> batches = [torch.utils.data.default_collate([view]) for view in views]
        >>> view1, view2 = (augment(batch) for augment, batch in zip(byol_photometric(), batches))
    """
    jitter = (0.4, 0.4, 0.2, 0.1)
    return kornia_steps(jitter, 1.0, 0.0, mean, std), kornia_steps(jitter, 0.1, 0.2, mean, std)


def mocov2_photometric(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> tuple[BatchAugment, BatchAugment]:
    """The photometric half of ``mocov2_views``; arguments and return value as in ``byol_photometric``.

    Examples:
        >>> first, second = mocov2_photometric()
    """
    jitter = (0.4, 0.4, 0.4, 0.1)
    return kornia_steps(jitter, 0.5, 0.0, mean, std), kornia_steps(jitter, 0.5, 0.0, mean, std)


def simclr_photometric(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> tuple[BatchAugment, BatchAugment]:
    """The photometric half of ``simclr_views``; arguments and return value as in ``byol_photometric``.

    Examples:
        >>> first, second = simclr_photometric()
    """
    jitter = (0.8, 0.8, 0.8, 0.2)
    return kornia_steps(jitter, 0.5, 0.0, mean, std), kornia_steps(jitter, 0.5, 0.0, mean, std)


def kornia_steps(
    jitter: tuple[float, float, float, float],
    blur_p: float,
    solarize_p: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> BatchAugment:
    """The same steps by kornia, for batches."""
    import kornia.augmentation as K

    check_statistics(mean, std)
    parts: list[Any] = [
        K.ColorJitter(*jitter, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur_p),
    ]
    if solarize_p > 0:
        # kornia's defaults draw thresholds and add brightness; the published step does neither.
        parts.append(K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=solarize_p))
    parts.append(K.Normalize(torch.tensor(mean), torch.tensor(std)))
    return BatchAugment(K.AugmentationSequential(*parts))
