"""Checked unit tokens, and sums of keys over a mask: what dense losses and metrics stand on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._checks import as_tokens
from densessl._normalize import normalized


def unit_tokens(query: Tensor, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key as unit tokens, (B, Nq, C) and (B, Nk, C), float32 (float64 stays), checked against the mask."""
    q, k = as_tokens(query, "query"), as_tokens(key, "key")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"key: expected B = {q.shape[0]} images and C = {q.shape[2]} channels as query, "
            f"got B = {k.shape[0]} and C = {k.shape[2]}"
        )
    expected = (q.shape[0], q.shape[1], k.shape[1])
    if mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(f"mask: expected bool (B, Nq, Nk) = {expected}, got {mask.dtype} {tuple(mask.shape)}")
    if mask.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(f"mask: expected a strided or sparse COO mask, got {mask.layout}")
    if not query.device == key.device == mask.device:
        raise ValueError(f"query, key, mask: expected one device, got {query.device}, {key.device} and {mask.device}")
    dtype = torch.promote_types(q.dtype, k.dtype)  # half precision is widened where it is normalised
    return normalized(q.to(dtype)), normalized(k.to(dtype))


def sum_keys(mask: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of each query's keys, (B, Nq, C), and positives per image, (B,); k is (B, Nk, C)."""
    if mask.layout != torch.sparse_coo:
        weights = mask.to(k.dtype)
        # In the layout of k, which the query has as well: a product of two layouts takes several times as long.
        summed = weights @ k if k.stride(-1) == 1 else (k.mT @ weights.mT).mT
        return summed, mask.sum((1, 2))
    batch, n_query, n_key = mask.shape
    image, row, column = mask.coalesce().indices()  # the mask serves as an index list only
    bag = image * n_query + row  # sorted, because coalesced
    offsets = torch.searchsorted(bag, torch.arange(batch * n_query + 1, device=bag.device))
    summed = F.embedding_bag(image * n_key + column, k.flatten(0, 1), offsets, mode="sum", include_last_offset=True)
    # Not bincount, which reads its largest value back to the host.
    return summed.unflatten(0, (batch, n_query)), offsets[::n_query].diff()
