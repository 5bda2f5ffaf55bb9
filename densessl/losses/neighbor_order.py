"""Patch neighbour consistency: two views put the cells of other images in the same order of nearness."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densessl._checks import as_tokens, as_valid
from densessl._normalize import normalized
from densessl._tensors import check_number
from densessl.losses._reduce import Reduction, check_options

Similarity = Literal["cosine", "euclidean"]
_ENTRIES = 1 << 19  # in the permutation matrices of one block; the network keeps some hundred times as many floats


def neighbor_order_loss(
    query: Tensor,
    key: Tensor,
    references: Tensor,
    *,
    similarity: Similarity = "cosine",
    steepness: float = 100.0,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross entropy between the orders in which query and key cells rank the same references (NeCo).

    The similarities of each cell to the references are sorted by a differentiable bitonic network (the package
    ``diffsort``), which gives permutation matrices P of the query and Q of the key. The loss is minus the sum of ``Q
    log P`` over the rows, averaged over columns and cells, then over images. The network runs in blocks of cells, which
    are computed once more in the backward pass.

    Args:
        query: Features of the online branch on the region that two views share, ``(B, C, h, w)`` or ``(B, N, C)``.
        key: Features of the other branch in the same shape, cell by cell, for instance from ``densessl.align``. No
            gradient flows to them.
        references: Features of cells of other images, ``(B, C, h', w')`` or ``(B, R, C)``, with R at least 2.
        similarity: What cells are compared by: ``"cosine"`` (the released configuration), or ``"euclidean"`` distance.
        steepness: How sharply the sorting network compares, above 0; 100 as published.
        valid: Optional boolean tensor ``(B, N)`` or ``(B, h, w)``, True for the cells that count. What other cells
            hold, even NaN, is not read.
        reduction: ``"mean"`` over images, or ``"none"`` for one value per image.

    Returns:
        A float32 scalar of at least 0 (float64 for float64 features), or ``(B,)`` without reduction. An image without
        valid cells counts as 0.

    Raises:
        ValueError: If a shape, dtype, device or option is not as described.
        ImportError: If the package ``diffsort`` (extra ``neighbors``) is not installed.

    Examples:
        >>> query, key, references = torch.rand(1, 32, 3, 3), torch.rand(1, 32, 3, 3), torch.rand(1, 4, 32)
        >>> loss = neighbor_order_loss(query, key, references)
    """
    _check_options(similarity, steepness, reduction)
    q, k, r = as_tokens(query, "query"), as_tokens(key, "key"), as_tokens(references, "references")
    if k.shape != q.shape:
        raise ValueError(f"key: expected (B, N, C) = {tuple(q.shape)} as query, got {tuple(k.shape)}")
    if r.shape[0] != q.shape[0] or r.shape[2] != q.shape[2] or r.shape[1] < 2:
        raise ValueError(
            f"references: expected (B, R, C) with B = {q.shape[0]}, C = {q.shape[2]} and R at least 2, "
            f"got {tuple(r.shape)}"
        )
    if not q.device == k.device == r.device:
        raise ValueError(f"query, key, references: expected one device, got {q.device}, {k.device} and {r.device}")
    keep = None if valid is None else as_valid(valid, query, "valid")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, r = q.to(dtype), k.detach().to(dtype), r.to(dtype)
        if keep is not None:
            q, k = (torch.where(keep[..., None], tokens, 0.0) for tokens in (q, k))
        own, other = _values(q, r, similarity).flatten(0, 1), _values(k, r.detach(), similarity).flatten(0, 1)
        network = _network(r.shape[1], steepness, q.device)
        step = max(1, _ENTRIES // r.shape[1] ** 2)
        # A lone block is checkpointed as well: the network's own intermediates are what takes the memory.
        blocks = [
            checkpoint(
                _cross_entropy, own[start : start + step], other[start : start + step], network, use_reentrant=False
            )
            for start in range(0, len(own), step)
        ]
        per_cell = torch.cat(blocks).view(q.shape[:2])
        if keep is None:
            per_image = per_cell.mean(1)
        else:
            per_image = torch.where(keep, per_cell, 0.0).sum(1) / keep.sum(1).clamp(min=1)
        return per_image if reduction == "none" else per_image.mean()


def _values(tokens: Tensor, references: Tensor, similarity: Similarity) -> Tensor:
    """The values to sort, (B, N, R)."""
    if similarity == "cosine":
        return normalized(tokens) @ normalized(references).mT
    return torch.cdist(tokens, references)


def _network(size: int, steepness: float, device: torch.device) -> Any:
    try:
        from diffsort import DiffSortNet
    except ImportError as error:
        raise ImportError("neighbor_order_loss needs the package diffsort: install densessl[neighbors]") from error
    return DiffSortNet("bitonic", size, device=device, steepness=steepness)


def _cross_entropy(own: Tensor, other: Tensor, network: Any) -> Tensor:
    """Loss of each cell, (M,)."""
    with torch.no_grad():
        wanted = network(other)[1]
    return -(wanted * network(own)[1].clamp(min=1e-12).log()).sum(1).mean(1)


def _check_options(similarity: str, steepness: float, reduction: str) -> None:
    check_options(reduction, "zero")
    if similarity not in ("cosine", "euclidean"):
        raise ValueError(f"similarity: expected 'cosine' or 'euclidean', got {similarity!r}")
    check_number(steepness, "steepness", "a positive number", lambda value: value > 0)


class NeighborOrderLoss(nn.Module):
    """Patch neighbour consistency; see ``neighbor_order_loss``.

    Args:
        similarity: What cells are compared by: ``"cosine"`` or ``"euclidean"``.
        steepness: How sharply the sorting network compares, above 0; 100 as published.
        reduction: ``"mean"`` over images, or ``"none"``.

    Raises:
        ValueError: If an option is not as described.

    Examples:
        >>> loss = NeighborOrderLoss()(torch.rand(1, 32, 3, 3), torch.rand(1, 32, 3, 3), torch.rand(1, 4, 32))
    """

    def __init__(
        self, similarity: Similarity = "cosine", steepness: float = 100.0, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _check_options(similarity, steepness, reduction)
        self.similarity: Similarity = similarity
        self.steepness = steepness
        self.reduction: Reduction = reduction

    def extra_repr(self) -> str:
        return f"similarity={self.similarity!r}, steepness={self.steepness}, reduction={self.reduction!r}"

    def forward(self, query: Tensor, key: Tensor, references: Tensor, valid: Tensor | None = None) -> Tensor:
        """See ``neighbor_order_loss``."""
        return neighbor_order_loss(
            query,
            key,
            references,
            similarity=self.similarity,
            steepness=self.steepness,
            valid=valid,
            reduction=self.reduction,
        )
