"""The nearest of many keys, with a definite order where several are equally near."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_TABLE = 1 << 24  # scores held at once

Distance = Literal["cosine", "L2"]


def nearest_keys(query: Tensor, keys: Tensor, count: int, distance: Distance, block: int = 32_768) -> Tensor:
    """Indices (N, count) of the nearest keys, nearest first; of equally near ones those with the lower index.

    Args:
        query: Features whose nearest keys are sought, floating point ``(N, C)``.
        keys: Features to choose from, floating point ``(M, C)``.
        count: Number of keys that are given for each query, at most M.
        distance: "cosine" compares directions, a zero vector is far from all; "L2" is the Euclidean distance.
        block: Number of keys compared at once.
    """
    rows = max(1, _TABLE // min(block, len(keys)))
    return torch.cat([_of_block(part, keys, count, distance, block) for part in query.split(rows)])


def _of_block(query: Tensor, keys: Tensor, count: int, distance: Distance, block: int) -> Tensor:
    best = query.new_empty(len(query), 0)
    index = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    for start in range(0, len(keys), block):
        part = keys[start : start + block]
        # The order is that of the distance; products of whole numbers stay exact, so that equal keys stay equal.
        squares = part.square().sum(1)
        if distance == "L2":
            scores = torch.addmm(squares, query, part.mT, beta=-1, alpha=2)
        else:
            scores = (query @ part.mT) * squares.clamp(min=1e-24).rsqrt()
        score, place = _first_best(scores, count)
        best, index = torch.cat([best, score], 1), torch.cat([index, place + start], 1)
        # Stable, so that of equal scores the earlier block, which has the lower indices, stays in front.
        best, turn = best.sort(dim=1, descending=True, stable=True)
        best, index = best[:, :count], index.gather(1, turn[:, :count])
    return index


def _first_best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greatest scores of each row and their columns, by score and then by column."""
    count = min(count, scores.shape[1])
    best, place = scores.topk(count, dim=1)
    more = (scores >= best[:, -1:]).sum(1) > count  # several are equal at the last place, and topk took any of them
    if bool(more.any()):
        exact = scores[more].sort(dim=1, descending=True, stable=True).indices[:, :count]
        place[more] = exact
    place = place.sort(dim=1).values
    best, turn = scores.gather(1, place).sort(dim=1, descending=True, stable=True)
    return best, place.gather(1, turn)
