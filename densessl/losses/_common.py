"""What the dense losses share: checked unit tokens, and the mean over images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl.tokens import as_tokens, normalized

Reduction = Literal["mean", "none"]
NoMatch = Literal["zero", "skip"]


def check_options(reduction: str, no_match: str) -> None:
    """Raises ValueError on unknown options."""
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    if no_match not in ("zero", "skip"):
        raise ValueError(f"no_match: expected 'zero' or 'skip', got {no_match!r}")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")


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


def reduce_images(per_image: Tensor, matched: Tensor, reduction: Reduction, no_match: NoMatch) -> Tensor:
    """Mean over images; per_image (B,) is 0 where matched (B,) bool is False."""
    if reduction == "none":
        return per_image
    if no_match == "zero" and len(per_image):  # the mean of none is NaN
        return per_image.mean()
    return per_image.sum() / matched.sum().clamp(min=1)
