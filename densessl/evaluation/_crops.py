"""Random crops of labelled images, as two published linear evaluations draw them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from densessl.evaluation._batches import IGNORED, resized

_TRIES = 10
_COMMON = 0.75  # a class may cover at most this share of a crop's labelled pixels
_FILL = (124, 116, 104)  # ImageNet's mean colour, which becomes about 0 where images are normalised


def resized_crop(
    image: Tensor, labels: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A crop of a share ``scale`` of the area and an aspect ratio of 3/4 to 4/3, resized to a square."""
    height, width = labels.shape
    for _ in range(_TRIES):
        area = height * width * _uniform(*scale, generator)
        ratio = math.exp(_uniform(math.log(3 / 4), math.log(4 / 3), generator))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top, left = _integer(height - h, generator), _integer(width - w, generator)
            break
    else:  # the greatest crop of such an aspect ratio, in the middle, as torchvision has it
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    window = (slice(top, top + h), slice(left, left + w))
    return resized(image[:, *window], labels[window], (size, size))


def scaled_crop(
    image: Tensor, labels: Tensor, size: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A square of the image scaled so that its shorter side is ``scale`` times the square's; padded where too small.

    Squares of which one class covers more than three quarters are drawn again, up to ten times.
    """
    image, labels = short_side(image, labels, int(size * _uniform(*scale, generator)))
    height, width = labels.shape
    for _ in range(_TRIES + 1):
        top, left = _integer(max(height - size, 0), generator), _integer(max(width - size, 0), generator)
        window = (slice(top, top + size), slice(left, left + size))
        found = labels[window]
        counts = torch.bincount(found[found != IGNORED])
        if int((counts > 0).sum()) > 1 and int(counts.max()) < _COMMON * int(counts.sum()):
            break
    pad = (0, size - found.shape[1], 0, size - found.shape[0])
    channels = [F.pad(channel, pad, value=fill) for channel, fill in zip(image[:, *window], _FILL, strict=True)]
    return torch.stack(channels), F.pad(found, pad, value=IGNORED)


def short_side(image: Tensor, labels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Image and labels with a shorter side of so many pixels."""
    height, width = labels.shape
    size = (int(side * height / width + 0.5), side) if height > width else (side, int(side * width / height + 0.5))
    return resized(image, labels, size)


def flipped(image: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrors left and right half of the time."""
    if _uniform(0, 1, generator) < 0.5:
        return image.flip(2), labels.flip(1)
    return image, labels


def recoloured(image: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness by up to 32, contrast and saturation by 0.5 to 1.5, hue by up to half the circle; each half the time.

    Contrast comes after the brightness or at the end, either half of the time.
    """
    contrast_first = _uniform(0, 1, generator) < 0.5
    if _uniform(0, 1, generator) < 0.5:
        image = (image.float() + _uniform(-32, 32, generator)).clamp(0, 255).to(torch.uint8)
    factor = _uniform(0.5, 1.5, generator) if _uniform(0, 1, generator) < 0.5 else 1.0
    if contrast_first:
        image = (image.float() * factor).clamp(0, 255).to(torch.uint8)
    if _uniform(0, 1, generator) < 0.5:
        image = V.adjust_saturation(image, _uniform(0.5, 1.5, generator))
    if _uniform(0, 1, generator) < 0.5:
        image = V.adjust_hue(image, _uniform(-0.5, 0.5, generator))
    return image if contrast_first else (image.float() * factor).clamp(0, 255).to(torch.uint8)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(most: int, generator: torch.Generator) -> int:
    """0..most, each equally likely."""
    return int(torch.randint(most + 1, (), generator=generator))
