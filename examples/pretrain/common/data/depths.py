"""Images of 8 bits, uint8 in 0..255, and of more, float32 in 0..1, brought together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_bytes(image: Tensor) -> Tensor:
    """An image of read_photo in 8 bits: uint8 stays as it is, 0..1 is multiplied by 255 and rounded."""
    return image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)


def alike(images: Sequence[Tensor]) -> list[Tensor]:
    """Images of one form, to be stacked: where any is float in 0..1, those of 8 bits are divided by 255."""
    if len({image.dtype for image in images}) < 2:
        return list(images)
    return [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]
