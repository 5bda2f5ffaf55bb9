"""Small pictures of features, without a drawing library: similarity as heat, cells as squares."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

# Dark violet over red to pale yellow: readable on light and dark pages, and without telling red from green.
HEAT = torch.tensor([[20, 11, 53], [101, 21, 110], [186, 54, 85], [242, 125, 36], [250, 253, 161]]) / 255


def similarity(features: Tensor, cell: int) -> Tensor:
    """Cosine of one cell to all others, ``(h, w)``; the map is ``(C, h, w)``.

    The map's mean is taken out first: cells share a common direction, which hides how they differ.
    """
    unit = F.normalize((features - features.mean((1, 2), keepdim=True)).float(), dim=0)
    return torch.einsum("c,chw->hw", unit.flatten(1)[:, cell], unit)


def heat(values: Tensor, low: float) -> Tensor:
    """Values ``(h, w)`` from ``low``, dark, to 1, bright, as colours ``(3, h, w)``."""
    place = ((values - low) / max(1 - low, 1e-6)).clamp(0, 1) * (len(HEAT) - 1)
    below = place.floor().long().clamp(max=len(HEAT) - 2)
    share = (place - below)[..., None]
    return (HEAT[below] * (1 - share) + HEAT[below + 1] * share).permute(2, 0, 1)


def enlarged(colours: Tensor, size: int) -> Tensor:
    """Cells as squares: float ``(..., 3, h, w)`` in 0..1 to uint8 with sides of about ``size`` pixels."""
    picture = colours if colours.ndim == 4 else colours[None]
    grown = F.interpolate(picture, (size, size), mode="nearest-exact")
    return (grown * 255).round().to(torch.uint8).reshape(*colours.shape[:-2], size, size)


def in_colour(image: Tensor) -> Tensor:
    """An image of any number of channels as three: the first three, or grey."""
    return image[..., :3, :, :] if image.shape[-3] >= 3 else image[..., :1, :, :].repeat_interleave(3, -3)


def strip(pictures: Sequence[Tensor], gap: int = 4) -> Tensor:
    """Pictures of one height beside each other, uint8 ``(3, H, W)``, with a grey gap."""
    between = torch.full((3, pictures[0].shape[1], gap), 128, dtype=torch.uint8)
    parts = [part for picture in pictures for part in (between, picture)][1:]
    return torch.cat(parts, 2)


def as_pillow(picture: Tensor) -> Image.Image:
    """uint8 ``(3, H, W)`` as an image of Pillow's."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def data_uri(picture: Image.Image) -> str:
    """The picture inside a page: PNG as a data URI."""
    held = io.BytesIO()
    picture.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
