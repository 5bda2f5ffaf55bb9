"""Views of images with any number of channels: multispectral, depth beside colour, stacks of a microscope.

These are the steps of colour pipelines that make sense without colour. They work on float images, so 16-bit images keep
their precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl.augment._pil import ExpectChannels
from densessl.augment.batch import BatchAugment
from densessl.augment.presets import PILGaussianBlur, Range, two_views
from densessl.augment.views import MultiView

STRENGTH = 0.4  # of brightness and contrast in BYOL
JITTER_P, DROPOUT_P = 0.8, 0.2
BLUR_P = (1.0, 0.1)  # of the first view, of the second


def multichannel_views(
    size: int | Sequence[int] = 224,
    photometric: bool = True,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    extra: Sequence[nn.Module] = (),
) -> MultiView:
    """Two views of images with any number of channels: BYOL's steps without those that need colour.

    - Random resized crop and flip, as in BYOL.
    - Jitter, p 0.8: brightness and contrast change for each channel by itself, with factors in 0.6..1.4. BYOL draws
      from the same range, but once for all channels. Separate factors also change the proportions of the channels,
      which stands in for hue and saturation. Contrast changes around the channel's own mean, so bright and dark images
      (12-bit values in a 16-bit file) are treated alike.
    - Blur, p 1.0 in view 1 and 0.1 in view 2, sigma 0.1 to 2 pixels, as in BYOL.
    - Dropout, p 0.2, after the normalisation: one channel becomes 0, its mean. It stands in for the change to grey, so
      that no single channel is enough to match by. Images of one channel are left alone.

    There is no hue, saturation or grey step (they need colour) and no solarize step (half of the range means nothing to
    a sensor). This choice is ours and has no published source. Strengths and probabilities are BYOL's where BYOL has
    the step; the dropout takes its probability from BYOL's change to grey.

    Args:
        size: Side of the views in pixels, or (height, width).
        photometric: Whether the photometric steps are included. If False, the views are only cropped and flipped;
            ``multichannel_photometric`` does the rest on the device.
        mean: Mean of each channel, for images in 0..1.
        std: Standard deviation of each channel, for images in 0..1.
        scale: Range of the share of the image's area that a crop covers, in 0..1.
        ratio: Range of a crop's width divided by its height.
        extra: Further geometric steps, as in ``byol_views``.

    Returns:
        A MultiView of two views. It raises ValueError on images of another number of channels.

    Raises:
        ValueError: If mean and std differ in length, or are empty.

    Examples:
        >>> views = multichannel_views(size=64, mean=[0.5] * 5, std=[0.2] * 5)
        >>> view1, view2 = views(torch.rand(5, 80, 100))
        >>> view1.image.shape
        torch.Size([5, 64, 64])
    """
    _check_statistics(mean, std)

    def steps(blur_p: float) -> list[nn.Module]:
        return [
            v2.ToImage(),
            ExpectChannels((len(mean),), "as mean and std"),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([ChannelJitter(STRENGTH)], p=JITTER_P),
            v2.RandomApply([PILGaussianBlur((0.1, 2.0))], p=blur_p),
            v2.Normalize(mean, std),
            *([v2.RandomApply([ChannelDropout()], p=DROPOUT_P)] if len(mean) > 1 else []),
        ]

    first, second = (steps(p) if photometric else [] for p in BLUR_P)
    return two_views(size, scale, ratio, first, second, extra)


class ChannelJitter(v2.Transform):
    """Changes brightness and contrast of each channel by itself, in a float image in 0..1.

    torchvision's ``adjust_brightness`` and ``adjust_contrast``, which take no other number of channels than 1 or 3, on
    one channel at a time; contrast is around the channel's mean.

    Args:
        strength: Half the width of the range: two factors per channel are drawn from 1 - strength to 1 + strength.

    Examples:
        >>> ChannelJitter(0.4)(tv_tensors.Image(torch.rand(5, 64, 64))).shape
        torch.Size([5, 64, 64])
    """

    def __init__(self, strength: float = STRENGTH) -> None:
        super().__init__()
        self.strength = strength

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the factors, from torch's generator."""
        channels = max([F.get_num_channels(x) for x in flat_inputs if isinstance(x, tv_tensors.Image)], default=0)
        return {"factors": torch.empty(channels, 2).uniform_(1 - self.strength, 1 + self.strength).tolist()}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Changes images; other inputs are returned as they came."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        changed = []
        for channel, (brightness, contrast) in zip(_channels(inpt), params["factors"], strict=True):
            brighter = self._call_kernel(F.adjust_brightness, channel, brightness)
            changed.append(self._call_kernel(F.adjust_contrast, brighter, contrast))
        return tv_tensors.wrap(torch.cat(changed, -3), like=inpt)


class ChannelDropout(v2.Transform):
    """Sets one channel of an image, drawn at random, to 0.

    Examples:
        >>> image = ChannelDropout()(tv_tensors.Image(torch.ones(5, 64, 64)))
        >>> (image == 0).flatten(1).all(1).sum()
        tensor(1)
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the channel, from torch's generator."""
        return {"share": float(torch.rand(()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Changes images; other inputs are returned as they came."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        channels = _channels(inpt)
        height, width = inpt.shape[-2:]
        at = int(params["share"] * len(channels))
        channels[at] = self._call_kernel(F.erase, channels[at], 0, 0, height, width, torch.zeros(1, 1, 1))
        return tv_tensors.wrap(torch.cat(channels, -3), like=inpt)


def _channels(image: tv_tensors.Image) -> list[Any]:
    """One image per channel, of the same type: torchvision's functionals are looked up by it."""
    return [tv_tensors.wrap(channel, like=image) for channel in image.as_subclass(Tensor).split(1, -3)]


def multichannel_photometric(mean: Sequence[float], std: Sequence[float]) -> tuple[BatchAugment, BatchAugment]:
    """The photometric half of ``multichannel_views``, for the device: one BatchAugment per view.

    Args:
        mean: Mean of each channel, for images in 0..1.
        std: Standard deviation of each channel, for images in 0..1.

    Returns:
        One BatchAugment for the first view, one for the second.

    Raises:
        ValueError: If mean and std differ in length, or are empty.

    Examples:
        >>> first, second = multichannel_photometric(mean=[0.5] * 5, std=[0.2] * 5)
    """
    import kornia.augmentation as K

    from densessl.augment._kornia import BatchChannelJitter

    _check_statistics(mean, std)

    def steps(blur_p: float) -> BatchAugment:
        parts: list[Any] = [
            BatchChannelJitter(STRENGTH, p=JITTER_P),
            K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur_p),
            K.Normalize(torch.tensor(mean), torch.tensor(std)),
        ]
        if len(mean) > 1:
            parts.append(K.RandomChannelDropout(1, p=DROPOUT_P))
        return BatchAugment(K.AugmentationSequential(*parts))

    return steps(BLUR_P[0]), steps(BLUR_P[1])


def _check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    if not len(mean) == len(std) > 0:
        raise ValueError(f"mean, std: expected one number per channel each, got {len(mean)} and {len(std)}")
