"""Steps of the CPU half of the published pipelines: colour changes on the image as PIL, and what guards them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl.augment._steps import is_pil

ELSE = "multichannel_views and multichannel_photometric take any number"


class NormalizeOwn(v2.Normalize):
    """``Normalize`` in place, of the float image that the step before it made: nobody else holds it."""


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises ValueError where mean and std are not those of images that the colour steps take."""
    if len(mean) != len(std) or len(mean) not in (1, 3):
        raise ValueError(f"mean, std: expected 1 or 3 numbers, for ColorJitter; {ELSE}; got {len(mean)} and {len(std)}")


class ExpectChannels(v2.Transform):
    """Leaves images as they are and raises where they have another number of channels than the steps that follow take.

    Args:
        allowed: Numbers of channels that pass.
        why: Reason that ends the first half of the error.
    """

    def __init__(self, allowed: Sequence[int], why: str) -> None:
        super().__init__()
        self.allowed, self.why = tuple(allowed), why

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Raises ValueError, or returns the input."""
        # Not images of derived types: the tracer of check_tracking has channels of its own.
        if (type(inpt) is tv_tensors.Image or is_pil(inpt)) and F.get_num_channels(inpt) not in self.allowed:
            raise ValueError(
                f"image: expected (C, H, W) with C = {' or '.join(map(str, self.allowed))} channels, {self.why}; "
                f"got C = {F.get_num_channels(inpt)}"
            )
        return inpt


class OnPIL(v2.Transform):
    """Photometric transforms on the image as PIL, which does them faster on a CPU, and as the published pipelines do.

    One step for all of them: they move nothing, so the coords need not be handed through each.
    """

    def __init__(self, *transforms: nn.Module) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, (tv_tensors.Image, Image.Image)):
            return inpt
        image = inpt
        if is_pil(image) and image.mode not in ("L", "RGB"):
            raise ValueError(
                f"image: expected a PIL image of mode L or RGB, for colour changes, got {image.mode}; {ELSE}"
            )
        if isinstance(image, tv_tensors.Image):
            image = F.to_dtype(image, torch.uint8, scale=True)
            if image.dtype == torch.uint8 and image.shape[0] in (1, 3):
                # Band by band: to_pil_image interleaves the channels first, which takes five times as long.
                bands = [Image.fromarray(band) for band in image.as_subclass(torch.Tensor).contiguous().numpy()]
                image = bands[0] if len(bands) == 1 else Image.merge("RGB", bands)
        for transform in self.transforms:
            image = transform(image)
        if not isinstance(image, Image.Image):
            return image
        # Row after row: pil_to_tensor leaves the channels interleaved, and every later step slower.
        planes = torch.frombuffer(bytearray(b"".join(band.tobytes() for band in image.split())), dtype=torch.uint8)
        return tv_tensors.Image(planes.view(-1, image.height, image.width))
