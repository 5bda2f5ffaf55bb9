"""Pairs of cells that count neither as positive nor as negative, in either layout."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._sums import check_mask, positive_pairs
from densessl._tensors import check_tensor


def check_ignore(ignore: Tensor, mask: Tensor) -> None:
    """Refuses what is no mask of the shape and device of the positives' mask."""
    expected = f"bool (B, Nq, Nk) = {tuple(mask.shape)}"
    check_tensor(ignore, "ignore", expected)
    if ignore.dtype != torch.bool or ignore.shape != mask.shape:
        raise ValueError(f"ignore: expected {expected}, got {ignore.dtype} {tuple(ignore.shape)}")
    check_mask(ignore, "ignore")
    if ignore.device != mask.device:
        raise ValueError(f"ignore: expected a mask on {mask.device} as the features, got {ignore.device}")


def without_positives(ignore: Tensor, mask: Tensor) -> Tensor:
    """The ignored pairs that are not positive.

    Args:
        ignore: Pairs to ignore, bool ``(B, Nq, Nk)``, strided or sparse COO.
        mask: Positive pairs, the same, in either layout.

    Returns:
        A boolean table ``(B, Nq, Nk)`` if ``ignore`` is strided; otherwise image, query cell and key cell of each pair,
        int64 ``(3, P)``, sorted, none twice, without a table of all pairs.
    """
    if ignore.layout == torch.strided:
        if mask.layout == torch.strided:
            return ignore & ~mask
        ignored = ignore.clone()
        ignored[tuple(_pairs(mask))] = False
        return ignored
    pairs = _pairs(ignore)
    if mask.layout == torch.strided:
        return pairs[:, ~mask[tuple(pairs)]]
    # torch.isin would sort both once more.
    number, positive = _number(pairs, mask), _number(_pairs(mask), mask)
    if len(positive) == 0:
        return pairs
    place = torch.searchsorted(positive, number).clamp_(max=len(positive) - 1)
    return pairs[:, positive[place] != number]


def needed_keys(ignored: Tensor, matched: Tensor, n_key: int) -> Tensor:
    """Which key cells stand in the sums of a query, (B, Nk): those that not all queries with a positive ignore.

    Args:
        ignored: What ``without_positives`` returned.
        matched: Boolean tensor ``(B, Nq)``, True for the query cells that have a positive.
        n_key: Number Nk of key cells.
    """
    if ignored.ndim == 3:
        return (matched[..., None] & ~ignored).view(torch.uint8).amax(1).bool()
    image, query, key = ignored[:, matched[ignored[0], ignored[1]]]
    count = torch.zeros(len(matched) * n_key, dtype=torch.int64, device=matched.device)
    count.index_add_(0, image * n_key + key, torch.ones_like(query))
    return count.view(-1, n_key) < matched.sum(1, keepdim=True)


def _pairs(mask: Tensor) -> Tensor:
    pairs = positive_pairs(mask)
    return pairs[:, pairs[0] < len(mask)]


def _number(pairs: Tensor, mask: Tensor) -> Tensor:
    """Place of each pair in the table of all pairs."""
    return (pairs[0] * mask.shape[1] + pairs[1]) * mask.shape[2] + pairs[2]
