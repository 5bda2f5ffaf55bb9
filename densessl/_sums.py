"""Masks and their pairs, checked unit tokens, and sums of keys over a mask: what dense losses and metrics stand on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._checks import as_tokens
from densessl._normalize import normalized
from densessl._tensors import check_tensor


def check_mask(mask: Tensor, name: str = "mask") -> None:
    """Refuses what is no mask of pairs: other dtypes, other shapes, and sparse tensors that are not plain COO.

    Args:
        mask: Boolean tensor ``(B, Nq, Nk)``, strided, or sparse COO with three sparse dimensions.
        name: The argument's name, for the error.

    Raises:
        ValueError: If the mask is anything else.
    """
    check_tensor(mask, name, "bool (B, Nq, Nk)")
    if mask.ndim != 3 or mask.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool (B, Nq, Nk), got {mask.dtype} {tuple(mask.shape)}")
    if mask.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(f"{name}: expected a strided or sparse COO mask, got {mask.layout}")
    if mask.layout == torch.sparse_coo and mask.dense_dim():
        raise ValueError(
            f"{name}: expected a sparse COO mask with 3 sparse dimensions, got a hybrid one with {mask.sparse_dim()} "
            f"sparse and {mask.dense_dim()} dense"
        )


def positive_pairs(mask: Tensor) -> Tensor:
    """Image, query cell and key cell of each positive pair of a sparse mask.

    Entries may be stored with the value False, as in the product of a sparse mask and a strided one. Counting them
    would wait for the device, so they are not cut off but moved to the end, as pairs of an image that does not exist.

    Args:
        mask: Sparse COO mask ``(B, Nq, Nk)``, boolean.

    Returns:
        Image, query cell and key cell of each pair, int64 ``(3, P)``, sorted, no pair twice. Columns at the end that
        stand for False entries are ``(B, 0, 0)``.
    """
    mask = mask.coalesce()
    indices, positive = mask.indices(), mask.values()
    count = indices.shape[1]
    place = torch.where(positive, positive.cumsum(0) - 1, count)
    pairs = indices.new_zeros(3, count + 1)
    pairs[0] = mask.shape[0]
    return pairs.scatter_(1, place.expand(3, -1), indices)[:, :count]


def matched_cells(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which query cells and which key cells have a positive, bool (B, Nq) and (B, Nk); no value is read back."""
    if mask.layout != torch.sparse_coo:
        held = mask.view(torch.uint8)  # whose maximum takes a fifth of the time of ``mask.any`` on a CPU
        return held.amax(2).bool(), held.amax(1).bool()
    image, *cells = positive_pairs(mask)
    batch = mask.shape[0]
    found = []
    for cell, count in zip(cells, mask.shape[1:], strict=True):
        # The place after the last is for the entries with the value False.
        flat = torch.zeros(batch * count + 1, dtype=torch.bool, device=mask.device)
        found.append(flat.index_fill_(0, image * count + cell, True)[:-1].view(batch, count))
    return found[0], found[1]


def unit_tokens(
    query: Tensor, key: Tensor, mask: Tensor, used_q: Tensor | None = None, used_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Query and key as unit tokens, (B, Nq, C) and (B, Nk, C), float32 or float64, checked against the mask.

    Cells outside ``used_q`` (B, Nq) and ``used_k`` (B, Nk) become 0 whatever they hold, so that a NaN there reaches
    neither values nor gradients.
    """
    q, k = as_tokens(query, "query"), as_tokens(key, "key")
    check_pairs(query, key, mask)
    dtype = torch.promote_types(q.dtype, k.dtype)  # half precision is widened where it is normalised
    return normalized(q.to(dtype), used_q), normalized(k.to(dtype), used_k)


def check_pairs(query: Tensor, key: Tensor, mask: Tensor) -> None:
    """Refuses features that do not belong together or to the mask, and what is no mask."""
    q, k = as_tokens(query, "query"), as_tokens(key, "key")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"key: expected B = {q.shape[0]} images and C = {q.shape[2]} channels as query, "
            f"got B = {k.shape[0]} and C = {k.shape[2]}"
        )
    expected = (q.shape[0], q.shape[1], k.shape[1])
    check_tensor(mask, "mask", f"bool (B, Nq, Nk) = {expected}")
    if mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(f"mask: expected bool (B, Nq, Nk) = {expected}, got {mask.dtype} {tuple(mask.shape)}")
    check_mask(mask)
    if not query.device == key.device == mask.device:
        raise ValueError(f"query, key, mask: expected one device, got {query.device}, {key.device} and {mask.device}")


def sum_keys(mask: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of each query's keys, (B, Nq, C), and positives per image, (B,); k is (B, Nk, C)."""
    if mask.layout != torch.sparse_coo:
        weights = mask.to(k.dtype)
        # In the layout of k, which the query has as well: a product of two different layouts takes several times as
        # long.
        summed = weights @ k if k.stride(-1) == 1 else (k.mT @ weights.mT).mT
        return summed, mask.sum((1, 2))
    batch, n_query, n_key = mask.shape
    image, row, column = positive_pairs(mask)
    bag = image * n_query + row  # sorted, as the pairs are
    # One more bag takes the entries with the value False, and is cut off.
    offsets = torch.searchsorted(bag, torch.arange(batch * n_query + 2, device=bag.device))
    cell = (image * n_key + column).clamp_(max=batch * n_key - 1)
    del image, row, column, bag  # together half as large as the keys of a map of few channels
    summed = F.embedding_bag(cell, k.flatten(0, 1), offsets, mode="sum", include_last_offset=True)[:-1]
    # Not bincount, which reads its largest value back to the host.
    return summed.unflatten(0, (batch, n_query)), offsets[:-1:n_query].diff()
