"""Region similarity J and boundary accuracy F of binary masks, as the DAVIS 2017 toolkit counts them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TOLERANCE = 0.008  # of the image's diagonal


def region_similarity(predicted: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of each frame, 1 where both masks are empty; bool (T, H, W), two of them, to (T,)."""
    common = (predicted & truth).sum((1, 2)).double()
    union = (predicted | truth).sum((1, 2)).double()
    return torch.where(union == 0, 1.0, common / union)


def boundary_accuracy(predicted: Tensor, truth: Tensor) -> Tensor:
    """F-measure of the boundaries of each frame, bool (T, H, W), two of them, to (T,).

    A boundary pixel is right if the other mask has a boundary pixel within 0.008 of the image's diagonal, rounded up.
    """
    radius = math.ceil(_TOLERANCE * math.hypot(*predicted.shape[1:]))
    return torch.tensor(
        [_f_measure(_boundary(ours), _boundary(theirs), radius) for ours, theirs in zip(predicted, truth, strict=True)],
        dtype=torch.float64,
    )


def _boundary(mask: Tensor) -> Tensor:
    """Pixels that differ from the right, the lower or the lower right neighbour; the last pixel of all is none."""
    right, below, across = mask.clone(), mask.clone(), mask.clone()
    right[:, :-1], below[:-1], across[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
    across[-1, :-1], across[:-1, -1] = mask[-1, 1:], mask[1:, -1]
    return (mask ^ right) | (mask ^ below) | (mask ^ across)


def _f_measure(ours: Tensor, theirs: Tensor, radius: int) -> float:
    if not bool(ours.any()) or not bool(theirs.any()):
        return float(ours.any() == theirs.any())
    precision = float(_near(theirs, ours, radius).double().mean())
    recall = float(_near(ours, theirs, radius).double().mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(boundary: Tensor, asked: Tensor, radius: int) -> Tensor:
    """Which of the asked pixels have a boundary pixel within the radius."""
    from scipy.ndimage import distance_transform_edt

    distance = distance_transform_edt((~boundary).cpu().numpy())
    return torch.from_numpy(distance)[asked.cpu()] <= radius
