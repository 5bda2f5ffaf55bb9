"""Brightness and contrast of each channel by itself, as one of kornia's augmentations. Imported on use only."""

from __future__ import annotations

from typing import Any

import kornia.augmentation as K
import torch
from torch import Tensor


class BatchChannelJitter(K.IntensityAugmentationBase2D):
    """``densessl.augment.multichannel.ChannelJitter`` on a batch; factors are drawn for each image and channel.

    Args:
        strength: Half the width of the range: the factors are drawn from 1 - strength to 1 + strength.
        p: Probability that an image is changed, in 0..1.
    """

    def __init__(self, strength: float, p: float) -> None:
        super().__init__(p=p)
        self.strength = strength

    def generate_parameters(self, batch_shape: Any) -> dict[str, Tensor]:
        """Draws the factors, from torch's generator of the CPU, as kornia's do."""
        factors = torch.empty(2, *batch_shape[:2], 1, 1).uniform_(1 - self.strength, 1 + self.strength)
        return {"brightness": factors[0], "contrast": factors[1]}

    def apply_transform(self, input: Tensor, params: dict[str, Tensor], flags: Any, transform: Any = None) -> Tensor:
        """Changes images in 0..1, ``(B, C, H, W)``."""
        brighter = (input * params["brightness"].to(input)).clamp(0, 1)
        mean = brighter.mean((2, 3), keepdim=True)
        return torch.lerp(mean, brighter, params["contrast"].to(input)).clamp(0, 1)
