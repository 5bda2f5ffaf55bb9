"""Several views of one image of two sizes: two large ones, and small ones beside them, as SwAV introduced them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.transforms import v2

from densessl.augment._crop import random_crop
from densessl.augment.batch import BatchAugment
from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD, Range, kornia_steps, pil_steps
from densessl.augment.views import MultiView

JITTER = (0.4, 0.4, 0.2, 0.1)
# Probabilities of blur and solarize: of the first large view, of the second, of all small ones.
BLUR_P, SOLARIZE_P = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)


def multicrop_views(
    size: int | Sequence[int] = 224,
    small_size: int | Sequence[int] = 96,
    small: int = 8,
    photometric: bool = True,
    *,
    scale: Range = (0.4, 1.0),
    small_scale: Range = (0.05, 0.4),
    ratio: Range = (3 / 4, 4 / 3),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    extra: Sequence[nn.Module] = (),
) -> MultiView:
    """Two large views and ``small`` small ones, as DINO draws them: the large ones first.

    Random resized crop, flip, jitter (0.4, 0.4, 0.2, 0.1; p 0.8), grey (p 0.2), blur (p 1.0 in the first large view,
    0.1 in the second, 0.5 in the small ones), solarize (p 0.2, second large view only). Source: the published
    code of DINO (Caron et al. 2021), in the form with 224 and 96 px; the blur's radius is BYOL's.

    Each view has its own coords, so that every two of them can be matched, whatever their sizes; views of one size make
    a batch.

    Args:
        size: Side of the large views in pixels, or (height, width).
        small_size: Side of the small views in pixels, or (height, width).
        small: Number of small views, at least 0.
        photometric: Whether the photometric steps are included. If False, the views are only cropped and flipped;
            ``multicrop_photometric`` does the rest on the device.
        scale: Range of the share of the image's area that a large crop covers, in 0..1.
        small_scale: Range of the share of the image's area that a small crop covers, in 0..1.
        ratio: Range of a crop's width divided by its height.
        mean: Mean of each channel, for images in 0..1 (default: ImageNet's); used if ``photometric``.
        std: Standard deviation of each channel, for images in 0..1 (default: ImageNet's); used if ``photometric``.
        extra: Further geometric steps of all views, put after crop and flip.

    Returns:
        A MultiView of ``2 + small`` views.

    Raises:
        ValueError: If ``small`` is negative, if a size or a range is not as described, or if mean and std do not fit.

    Examples:
        >>> views = multicrop_views(size=64, small_size=32, small=2)(torch.rand(3, 80, 100))
        >>> [view.image.shape[-1] for view in views]
        [64, 64, 32, 32]
    """
    _check_count(small)

    def view(kind: int) -> v2.Compose:
        crop = random_crop(size, scale, ratio) if kind < 2 else random_crop(small_size, small_scale, ratio, "small_")
        colours = pil_steps(JITTER, blur_p=BLUR_P[kind], solarize_p=SOLARIZE_P[kind], mean=mean, std=std)
        return v2.Compose([crop, v2.RandomHorizontalFlip(0.5), *extra, *(colours if photometric else ())])

    return MultiView(*(view(min(index, 2)) for index in range(2 + small)))


def multicrop_photometric(
    small: int = 8, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> tuple[BatchAugment, ...]:
    """The photometric half of ``multicrop_views``, for the device.

    Args:
        small: Number of small views, at least 0.
        mean: Mean of each channel, for images in 0..1 (default: ImageNet's).
        std: Standard deviation of each channel, for images in 0..1 (default: ImageNet's).

    Returns:
        One BatchAugment per view; all small views share the same one.

    Raises:
        ValueError: If ``small`` is negative, or mean and std do not fit.

    Examples:
        >>> augments = multicrop_photometric(small=2)
        >>> len(augments)
        4
    """
    _check_count(small)
    kinds = [kornia_steps(JITTER, BLUR_P[kind], SOLARIZE_P[kind], mean, std) for kind in range(3)]
    return (kinds[0], kinds[1], *(kinds[2] for _ in range(small)))


def _check_count(small: int) -> None:
    if not isinstance(small, int) or small < 0:
        raise ValueError(f"small: expected a number of views of at least 0, got {small!r}")
