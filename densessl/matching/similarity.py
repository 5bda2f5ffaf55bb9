"""How far apart cells are in feature space: the cost for matching by features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from densessl._checks import as_tokens
from densessl._normalize import normalized

Metric = Literal["cosine", "euclidean"]


def feature_distance(query: Tensor, key: Tensor, *, metric: Metric = "cosine") -> Tensor:
    """Distances between all cells of two maps by their features, as ``cell_distance`` gives them by their places.

    In float32 with autocast off, since rounding changes which cell is nearest. A cost for ``NearestMatcher``.

    Args:
        query: Query features ``(B, C, h, w)`` or ``(B, Nq, C)``, floating point.
        key: Key features ``(B, C, h', w')`` or ``(B, Nk, C)``, floating point.
        metric: ``"cosine"`` is 1 - cos, as DenseCL matches; ``"euclidean"`` is the distance that VICRegL takes.

    Returns:
        Distances ``(B, Nq, Nk)`` in float32 (float64 stays float64).

    Raises:
        ValueError: If a shape, dtype, device or a metric is not as described.

    Examples:
        >>> cost = feature_distance(torch.rand(2, 8, 7, 7), torch.rand(2, 8, 5, 5))
        >>> cost.shape
        torch.Size([2, 49, 25])
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric: expected 'cosine' or 'euclidean', got {metric!r}")
    q, k = as_tokens(query, "query"), as_tokens(key, "key")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"key: expected B = {q.shape[0]} images and C = {q.shape[2]} channels as query, "
            f"got B = {k.shape[0]} and C = {k.shape[2]}"
        )
    if q.device != k.device:
        raise ValueError(f"key: expected a tensor on {q.device} as query, got {k.device}")
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    q, k = q.to(wide), k.to(wide)
    with torch.autocast(q.device.type, enabled=False):
        if metric == "cosine":
            return 1 - normalized(q) @ normalized(k).mT
        # By differences, not through scalar products, which lose the digits in which near cells differ.
        return torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
