"""Photos in other colours, for correspondence that is not read off the colours."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl import View
from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from examples.quickstart.loop import strong_colours


def recoloured(batch: Tensor) -> Tensor:
    """Photos, uint8 ``(B, 3, H, W)``, with the quickstart's strong changes of colour; the same for the same photos."""
    coords, size = torch.eye(3).expand(len(batch), 3, 3), torch.tensor([batch.shape[-2:]] * len(batch))
    changed = strong_colours()(View(batch, coords, size), seed=7).image  # normalised, and taken back here
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return ((changed * std + mean) * 255).round().clamp(0, 255).byte()
