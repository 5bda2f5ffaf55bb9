"""Keeps the keys most similar to each query while blocks of keys go by."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 32  # keys whose greatest score stands for them in the first pass
_COLUMNS = 4_096  # keys scored at once on a CPU, where a table of scores should stay in the cache
_ROWS = 512
_TABLE = 1 << 26  # scores held at once elsewhere
_FOUND = 1 << 20  # scores above the best so far that are gathered before they are taken in


def improve(best: Tensor, index: Tensor, query: Tensor, keys: Tensor, start: int) -> None:
    """Takes a block of keys into the greatest inner products so far and the indices of their keys, in place.

    Args:
        best: The greatest inner products so far, float32 ``(N, k)``, from the greatest on, minus infinity where there
            is none yet.
        index: Indices of their keys, int64 ``(N, k)``.
        query: Features to be answered, float32 ``(N, C)``.
        keys: Features of this block, float32 ``(M, C)``.
        start: Index of the first of these keys.
    """
    columns = _COLUMNS if query.device.type == "cpu" else len(keys)
    rows = _ROWS if query.device.type == "cpu" else max(1, _TABLE // columns)
    table = query.new_empty(min(rows, len(query)) * min(columns, len(keys)))
    for top in range(0, len(query), rows):
        some, own, places = query[top : top + rows], best[top : top + rows], index[top : top + rows]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for left in range(0, len(keys), columns):
            part = keys[left : left + columns]
            # One table serves all products: the pages of a fresh one would cost as much as the product itself.
            scores = torch.mm(some, part.mT, out=table[: len(some) * len(part)].view(len(some), len(part)))
            if bool(own[:, -1].isneginf().any()):
                _join(own, places, *candidates(scores, own.shape[1]), start + left)
            else:
                row, score, column = _above(scores, own[:, -1])
                found.append((row, score, column + start + left))
                if sum(len(part) for part, _, _ in found) > _FOUND:
                    _take(own, places, found)
                    found = []
        _take(own, places, found)


def candidates(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scores (N, n) among which are the greatest of each row, and their columns."""
    groups = scores.shape[1] // _GROUP
    if groups <= 2 * count:
        return scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    # The k best lie in the k groups with the greatest maxima: sorting these is far cheaper than sorting all scores.
    first = _greatest(scores).topk(count, dim=1, sorted=False).indices
    columns = (first.unsqueeze(2) + torch.arange(_GROUP, device=scores.device) * groups).flatten(1)
    rest = torch.arange(groups * _GROUP, scores.shape[1], device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], 1)
    return scores.gather(1, columns), columns


def _above(scores: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, values and columns of the scores above each row's least, which soon are few."""
    groups = scores.shape[1] // _GROUP
    whole = groups * _GROUP
    row, group = (_greatest(scores) > least[:, None]).nonzero(as_tuple=True)
    columns = group[:, None] + torch.arange(_GROUP, device=scores.device) * groups
    values = scores[row[:, None], columns]
    pair, member = (values > least[row][:, None]).nonzero(as_tuple=True)
    row, score, column = row[pair], values[pair, member], columns[pair, member]
    if whole < scores.shape[1]:
        rest, place = (scores[:, whole:] > least[:, None]).nonzero(as_tuple=True)
        score = torch.cat([score, scores[rest, place + whole]])
        row, column = torch.cat([row, rest]), torch.cat([column, place + whole])
    return row, score, column


def _greatest(scores: Tensor) -> Tensor:
    """The greatest score of each group; a group is a strided set of columns, so that whole vectors are compared."""
    groups = scores.shape[1] // _GROUP
    return scores[:, : groups * _GROUP].unflatten(1, (_GROUP, groups)).amax(1)


def _take(best: Tensor, index: Tensor, found: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Takes in rows, scores and indices of keys, any number for each row."""
    if sum(len(part) for part, _, _ in found) == 0:
        return
    row, score, place = (torch.cat(parts) for parts in zip(*found, strict=True))
    turn = row.argsort(stable=True)
    row, score, place = row[turn], score[turn], place[turn]
    counts = torch.bincount(row, minlength=len(best))
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    scores = best.new_full((len(best), int(counts.max())), -torch.inf)
    places = torch.zeros_like(scores, dtype=torch.int64)
    scores[row, column], places[row, column] = score, place
    _join(best, index, scores, places, 0)


def _join(best: Tensor, index: Tensor, scores: Tensor, places: Tensor, start: int) -> None:
    joined, chosen = torch.cat([best, scores], 1).topk(best.shape[1], dim=1)
    index.copy_(torch.cat([index, places + start], 1).gather(1, chosen))
    best.copy_(joined)
