"""k-means with restarts."""

from __future__ import annotations

import torch
from torch import Tensor

_TABLE = 1 << 24  # distances held at once


def k_means(rows: Tensor, clusters: int, iterations: int, restarts: int, generator: torch.Generator) -> Tensor:
    """Centres (clusters, C) of the rows (N, C): of several runs, the one with the least sum of squared distances.

    Each run begins with rows drawn at random. A cluster that lost all its rows takes over a half of the largest one.
    """
    best, least = rows[:clusters], float("inf")
    for _ in range(restarts):
        chosen = torch.randperm(len(rows), generator=generator)[:clusters]
        centers = rows[chosen.to(rows.device)].clone()
        for _ in range(iterations):
            nearest, _ = assigned(rows, centers)
            moved = _means(rows, nearest, centers)
            if torch.equal(moved, centers):
                break
            centers = moved
        _, distance = assigned(rows, centers)
        if (cost := float(distance.double().sum())) < least:
            best, least = centers, cost
    return best


def assigned(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each row, (N,), the first of several equally near, and its squared distance, (N,)."""
    half = centers.square().sum(1) / 2
    block = max(1, _TABLE // len(centers))
    nearest, distance = [], []
    for part in rows.split(block):
        low, place = torch.addmm(half, part, centers.mT, alpha=-1).min(1)
        nearest.append(place)
        distance.append((2 * low + part.square().sum(1)).clamp(min=0))
    return torch.cat(nearest), torch.cat(distance)


def _means(rows: Tensor, nearest: Tensor, centers: Tensor) -> Tensor:
    """The mean row of each cluster."""
    counts = torch.bincount(nearest, minlength=len(centers))
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=rows.device).index_add_(0, nearest, rows.double())
    means = (sums / counts.clamp(min=1)[:, None]).to(rows.dtype)
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        largest = int(counts.argmax())
        # Two centres close to one another share the rows of the largest cluster in the next iteration.
        shift = 1 + (torch.arange(rows.shape[1], device=rows.device) % 2 * 2 - 1).to(rows.dtype) / 1024
        means[empty], means[largest] = means[largest] * shift, means[largest] * (2 - shift)
        counts[empty] = counts[largest] // 2
        counts[largest] -= counts[empty]
    return means
