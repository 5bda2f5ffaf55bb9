"""The principal components of feature maps as colours that the colour-blind tell apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# From Ottosson's Oklab to linear sRGB: https://bottosson.github.io/posts/oklab
_TO_ROOTS = (
    (1.0, 0.3963377774, 0.2158037573),
    (1.0, -0.1055613458, -0.0638541728),
    (1.0, -0.0894841775, -1.2914855480),
)
_TO_LINEAR = (
    (4.0767416621, -3.3077115913, 0.2309699292),
    (-1.2684380046, 2.6097574011, -0.3413193965),
    (-0.0041960863, -0.7034186147, 1.7076147010),
)


def pca_colours(maps: Tensor) -> tuple[Tensor, float]:
    """The first three principal components of several maps together, as colours: equal colours mean similar features.

    The first component is dark to light, the second blue to yellow, and only the third, the weakest, green to red, so
    that people who confuse red and green lose little.

    Args:
        maps: Feature maps ``(B, C, h, w)``, floating point; each cell is normalised to length 1.

    Returns:
        Colours ``(B, 3, h, w)`` in 0..1 on the CPU, and the share of the variance that the three components hold. Maps
        without variance are grey, and hold nothing.

    Raises:
        ValueError: If the shape or dtype is not as described.

    Examples:
        >>> colours, held = pca_colours(torch.rand(2, 32, 7, 7))
    """
    if maps.ndim != 4 or not maps.is_floating_point():
        raise ValueError(f"maps: expected floating point (B, C, h, w), got {maps.dtype} {tuple(maps.shape)}")
    batch, channels, h, w = maps.shape
    tokens = F.normalize(maps.detach().cpu().double(), dim=1).permute(0, 2, 3, 1).reshape(-1, channels)
    u, s, _ = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    found = int((s[:3] > 1e-6).sum())
    held = float(s[:3].square().sum() / s.square().sum()) if found else 0.0
    scores = torch.zeros(len(tokens), 3, dtype=torch.float64)
    scores[:, :found] = u[:, :found]
    # A component's sign is arbitrary: fixed here, so that the same maps always give the same picture.
    scores *= torch.where(scores.gather(0, scores.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    # Quantiles, not extremes, set the range: one odd cell would make all others alike.
    low, high = (scores.quantile(q, 0) for q in (0.02, 0.98))
    scores = torch.where(high - low > 1e-9, 2 * (scores - low) / (high - low).clamp(min=1e-9) - 1, 0.0).clamp(-1, 1)
    light, yellow, red = scores.T
    colours = oklab_to_srgb(0.58 + 0.34 * light, 0.06 * red, 0.12 * yellow)
    return colours.reshape(batch, h, w, 3).permute(0, 3, 1, 2).float(), held


def oklab_to_srgb(lightness: Tensor, red: Tensor, yellow: Tensor) -> Tensor:
    """Colours of Oklab as sRGB ``(..., 3)`` in 0..1; what a screen cannot show is clipped."""
    lab = torch.stack([lightness, red, yellow], -1)
    roots = lab @ torch.tensor(_TO_ROOTS, dtype=lab.dtype).T
    linear = (roots**3 @ torch.tensor(_TO_LINEAR, dtype=lab.dtype).T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
