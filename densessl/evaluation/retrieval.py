"""Reads class shares out of a memory of labelled cells, and chooses which cells a bounded memory keeps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._tensors import check_tensor
from densessl.evaluation._disk import Rows
from densessl.evaluation._refuse import check_at_least, check_finite, check_floating, check_positive, known_labels
from densessl.evaluation._search import improve

_QUERIES = 1 << 16  # queries for which the keys are walked through once
_ROWS = 512  # queries whose neighbours' shares are held at once


@torch.no_grad()
def retrieve_shares(
    query: Tensor,
    keys: Tensor,
    shares: Tensor,
    *,
    neighbors: int = 30,
    temperature: float = 0.02,
    block: int = 32_768,
    normalize_query: bool = True,
) -> Tensor:
    """Weighted mean of the class shares of the most similar keys, weighted by ``softmax(cos / temperature)``.

    The keys are searched in blocks with a running list of the best, so that memory does not grow with their number.
    The defaults are those of Balazevic et al. 2023 ("Towards In-context Scene Understanding").

    Args:
        query: Features to be answered, floating point ``(N, C)``.
        keys: Features of the memory, floating point ``(M, C)``, of any length; they are compared by direction.
        shares: Class shares of the keys, floating point ``(M, K)``.
        neighbors: Number of keys that vote, 1 to M.
        temperature: Temperature of the softmax, greater than 0.
        block: Number of keys compared at once.
        normalize_query: False searches by the inner product with the query as it is, like the open code does; the
            weights are those of the cosine either way.

    Returns:
        ``(N, K)`` in the dtype of the shares.

    Raises:
        ValueError: If an argument has another shape, a feature is not finite, or there are fewer keys than neighbours.
    """
    check_floating(query, ("N", "C"), "query")
    check_floating(keys, ("M", str(query.shape[1])), "keys")
    check_floating(shares, (str(len(keys)), "K"), "shares")
    if keys.shape[1] != query.shape[1]:
        raise ValueError(f"keys: expected (M, C) with C = {query.shape[1]} as the query, got {tuple(keys.shape)}")
    if len(shares) != len(keys):
        raise ValueError(f"shares: expected one row for each of the {len(keys)} keys, got {len(shares)}")
    check_at_least(neighbors, 1, "neighbors")
    if neighbors > len(keys):
        raise ValueError(f"neighbors: expected at most as many as there are keys, {len(keys)}, got {neighbors}")
    check_positive(temperature, "temperature")
    check_at_least(block, 1, "block")
    check_finite(query, "query")
    check_finite(keys, "keys")
    check_finite(shares, "shares")
    return read_shares(
        query,
        keys,
        shares,
        neighbors=neighbors,
        temperature=temperature,
        block=block,
        normalize_query=normalize_query,
    )


@torch.no_grad()
def read_shares(
    query: Tensor,
    keys: Tensor | Rows,
    shares: Tensor | Rows,
    *,
    neighbors: int = 30,
    temperature: float = 0.02,
    block: int = 32_768,
    normalize_query: bool = True,
) -> Tensor:
    """As ``retrieve_shares``, without its checks; keys and shares may lie in files."""
    kept = torch.float32 if isinstance(shares, Rows) else shares.dtype
    width = shares.row[0] if isinstance(shares, Rows) else shares.shape[1]
    read = torch.empty(len(query), width, dtype=kept, device=query.device)
    for start in range(0, len(query), _QUERIES):
        part = query[start : start + _QUERIES].float()
        unit = F.normalize(part, dim=1)
        nearest = _nearest(unit if normalize_query else part, keys, neighbors, block)
        for at in range(0, len(part), _ROWS):
            best, own = nearest[at : at + _ROWS], unit[at : at + _ROWS]
            voters = F.normalize(_taken(keys, best, query.device).float(), dim=-1)
            cos = (voters @ own.unsqueeze(2)).squeeze(2)
            weights = (cos / temperature).softmax(1).to(kept)
            votes = _taken(shares, best, query.device)
            read[start + at : start + at + len(own)] = (weights.unsqueeze(1) @ votes).squeeze(1)
    return read


def _taken(rows: Tensor | Rows, index: Tensor, device: torch.device) -> Tensor:
    return rows.take(index).to(device) if isinstance(rows, Rows) else rows[index]


def _nearest(query: Tensor, keys: Tensor | Rows, neighbors: int, block: int) -> Tensor:
    """Indices (N, neighbors) of the keys with the greatest inner products with the query.

    The blocks of keys are the outer loop: keys in a file are read once for all queries.
    """
    best = query.new_full((len(query), neighbors), -torch.inf)
    index = torch.zeros(len(query), neighbors, dtype=torch.int64, device=query.device)
    for start in range(0, len(keys), block):
        part = keys.block(start, start + block) if isinstance(keys, Rows) else keys[start : start + block]
        part = part.to(query.device, torch.float32)
        improve(best, index, query, part / part.norm(dim=1, keepdim=True).clamp(min=1e-12), start)
    return index


def rare_first_cells(labels_or_presence: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Which cells of each image a bounded memory keeps: those of rare classes first.

    The score of a cell is the sum, over the classes present in it, of the number of the image's cells in which the
    class is present, times a uniform random number. The cells with the least score are kept. Source:
    open-hummingbird-eval 2.0.0. One call of ``torch.rand`` is made for the batch.

    Args:
        labels_or_presence: Which classes each cell has: presence, bool ``(B, N, K)``, or class shares ``(B, N, K)``,
            present where greater than 0; or one label for each cell, int64 ``(B, N)`` or ``(B, h, w)``, -1 or 255 where
            ignored.
        count: Number of cells kept of each image, 1 to N.
        generator: Source of the random numbers, on the CPU; None takes the global one.

    Returns:
        int64 ``(B, count)``, indices of cells in increasing order of their scores. Cells without any class come last.

    Raises:
        ValueError: If the tensor has another shape or dtype, or if there are fewer cells than asked for.
    """
    present = _presence(labels_or_presence)
    check_at_least(count, 1, "count")
    if count > present.shape[1]:
        raise ValueError(f"count: expected at most as many as an image has cells, {present.shape[1]}, got {count}")
    counts = present.float()
    score = (counts @ counts.sum(1).unsqueeze(2)).squeeze(2)
    score = score * torch.rand(score.shape, generator=generator).to(score.device)
    return score.masked_fill(~present.any(2), torch.inf).topk(count, dim=1, largest=False).indices


def _presence(given: Tensor) -> Tensor:
    """Which classes are present in each cell, bool (B, N, K)."""
    check_tensor(given, "labels_or_presence", "bool or floating point (B, N, K), or int64 (B, N) or (B, h, w)")
    if given.dtype == torch.int64 and given.ndim in (2, 3) and given.numel():
        labels = given.flatten(1)
        classes = max(int(labels.masked_fill(labels == 255, -1).max()) + 1, 1)
        known = known_labels(labels, classes, "labels_or_presence")
        return F.one_hot(labels.clamp(0, classes - 1), classes).bool() & known.unsqueeze(2)
    if given.ndim == 3 and given.numel() and (given.dtype == torch.bool or given.is_floating_point()):
        check_finite(given, "labels_or_presence")
        return given if given.dtype == torch.bool else given > 0
    raise ValueError(
        f"labels_or_presence: expected bool or floating point (B, N, K), or int64 (B, N) or (B, h, w), "
        f"got {given.dtype} {tuple(given.shape)}"
    )
