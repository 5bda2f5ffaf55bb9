"""Gram anchoring: keeps the similarities between an image's cells as another model has them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from densessl._checks import as_tokens, as_valid
from densessl._normalize import normalized
from densessl.losses._products import difference_products
from densessl.losses._reduce import Reduction

Negatives = Literal["keep", "drop", "drop_key"]
Across = Literal["image", "batch"]
_TILE = 1 << 20  # number of similarities in one tile


def gram_loss(
    query: Tensor,
    key: Tensor,
    *,
    negatives: Negatives = "keep",
    valid: Tensor | None = None,
    across: Across = "image",
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean squared difference of the cosine similarities of all pairs of cells (Gram anchoring, DINOv3).

    With unit tokens X of the query and G of the key, the loss is the mean over the N x N entries of ``(X X^T - G
    G^T)^2``. The N x N table is never held. With ``negatives="keep"`` and more tokens than channels, the sum is taken
    through the products of ``U = X - G`` and ``V = X + G``: because ``X X^T - G G^T = (U V^T + V U^T) / 2``, it is
    ``(<U^T U, V^T V> + <U^T V, V^T U>) / 2``. These terms are as small as the difference of the tokens, so similar
    models lose no digits; a difference of the tokens' own products would lose them. The terms are summed in float64. In
    all other cases the similarities are computed in tiles of rows, once in the forward pass and once more in the
    backward pass. The loss can be differentiated once.

    Args:
        query: Features of the model that trains, ``(B, C, h, w)`` or ``(B, N, C)``.
        key: Features of the same cells from the model to stay close to, ``(B, C', h, w)`` or ``(B, N, C')``. The key
            takes a gradient if it asks for one. C' may differ from C; then tiles are used.
        negatives: What happens to negative similarities. ``"keep"`` leaves them (the published configuration),
            ``"drop"`` sets those of query and key to 0, ``"drop_key"`` sets only those of the key to 0. The published
            code also means to set the query's to 0 where both are negative, but it tests for this after the key's have
            already been set.
        valid: Optional boolean tensor ``(B, N)`` or ``(B, h, w)``, True for the cells that count. What other cells
            hold, even NaN, is not read.
        across: ``"image"`` compares cells of one image, ``"batch"`` cells of all images of the batch.
        reduction: ``"mean"`` over images, or ``"none"`` for one value per image.

    Returns:
        A float32 scalar (float64 for float64 features), or ``(B,)`` without reduction. An image without valid cells
        counts as 0.

    Raises:
        ValueError: If a shape, dtype, device or option is not as described, or ``across="batch"`` is used with
            ``reduction="none"``.

    Examples:
        >>> features = torch.rand(2, 32, 7, 7)
        >>> gram_loss(features, features)
        tensor(0.)
    """
    _check_options(negatives, across, reduction)
    x, g = as_tokens(query, "query"), as_tokens(key, "key")
    if x.shape[:2] != g.shape[:2]:
        raise ValueError(f"key: expected (B, N) = {tuple(x.shape[:2])} as query, got {tuple(g.shape[:2])}")
    if x.device != g.device:
        raise ValueError(f"key: expected a tensor on {x.device} as query, got {g.device}")
    keep = None if valid is None else as_valid(valid, query, "valid")
    dtype = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
    x, g = x.to(dtype), g.to(dtype)
    if across == "batch":
        x, g = x.flatten(0, 1)[None], g.flatten(0, 1)[None]
        keep = None if keep is None else keep.flatten()[None]
    with torch.autocast(x.device.type, enabled=False):
        if negatives == "keep" and x.shape[2] == g.shape[2] and x.shape[1] > x.shape[2]:
            uu, vv, uv = difference_products(x, g, keep)
            total = ((uu * vv).sum((1, 2)) + (uv * uv.mT).sum((1, 2))) / 2
        else:
            if keep is not None:
                x, g = (torch.where(keep[..., None], tokens, 0.0) for tokens in (x, g))
            total = _Tiles.apply(normalized(x), normalized(g), negatives)
        count = x.shape[1] if keep is None else keep.sum(1).clamp(min=1).double()
        per_image = (total / count**2).to(dtype)
        return per_image if reduction == "none" else per_image.mean()


def _check_options(negatives: str, across: str, reduction: str) -> None:
    if negatives not in ("keep", "drop", "drop_key"):
        raise ValueError(f"negatives: expected 'keep', 'drop' or 'drop_key', got {negatives!r}")
    if across not in ("image", "batch"):
        raise ValueError(f"across: expected 'image' or 'batch', got {across!r}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    if across == "batch" and reduction == "none":
        raise ValueError("reduction: expected 'mean' across the batch, got 'none'")


def _difference(own: Tensor, other: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor, Tensor]:
    """Difference of the similarities after the rule, and by which entries of either it changes (0 or 1)."""
    if negatives == "keep":
        return own - other, torch.ones_like(own), torch.ones_like(own)
    key = other > 0
    query = own > 0 if negatives == "drop" else torch.ones_like(key)
    return own * query - other * key, query.to(own.dtype), key.to(own.dtype)


class _Tiles(torch.autograd.Function):
    """Sum over all pairs of tokens of one image, in tiles of rows; (B,), float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, negatives: Negatives) -> Tensor:
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        step = max(1, _TILE // max(x.shape[1], 1))
        for image in range(len(x)):
            for start in range(0, x.shape[1], step):
                own = x[image, start : start + step] @ x[image].mT
                other = g[image, start : start + step] @ g[image].mT
                total[image] += _difference(own, other, negatives)[0].square_().sum(dtype=torch.float64)
        ctx.save_for_backward(x, g)
        ctx.negatives = negatives
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_g = torch.empty_like(g) if ctx.needs_input_grad[1] else None
        step = max(1, _TILE // max(x.shape[1], 1))
        scale = (4 * grad).to(x.dtype)  # each pair stands twice in the table, and the square gives another 2
        with torch.autocast(x.device.type, enabled=False):
            for image in range(len(x)):
                for start in range(0, x.shape[1], step):
                    part = slice(start, start + step)
                    own, other = x[image, part] @ x[image].mT, g[image, part] @ g[image].mT
                    difference, by_query, by_key = _difference(own, other, ctx.negatives)
                    difference.mul_(scale[image])
                    if grad_x is not None:
                        grad_x[image, part] = (difference * by_query) @ x[image]
                    if grad_g is not None:
                        grad_g[image, part] = -(difference * by_key) @ g[image]
        return grad_x, grad_g, None


class GramLoss(nn.Module):
    """Gram anchoring; see ``gram_loss``.

    Args:
        negatives: What happens to negative similarities: ``"keep"``, ``"drop"`` or ``"drop_key"``.
        across: Whether cells of one ``"image"`` or of the whole ``"batch"`` are compared.
        reduction: ``"mean"`` over images, or ``"none"``.

    Raises:
        ValueError: If an option is not as described.

    Examples:
        >>> loss = GramLoss()(torch.rand(2, 32, 7, 7), torch.rand(2, 32, 7, 7))
    """

    def __init__(self, negatives: Negatives = "keep", across: Across = "image", reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_options(negatives, across, reduction)
        self.negatives: Negatives = negatives
        self.across: Across = across
        self.reduction: Reduction = reduction

    def extra_repr(self) -> str:
        return f"negatives={self.negatives!r}, across={self.across!r}, reduction={self.reduction!r}"

    def forward(self, query: Tensor, key: Tensor, valid: Tensor | None = None) -> Tensor:
        """See ``gram_loss``."""
        return gram_loss(
            query, key, negatives=self.negatives, valid=valid, across=self.across, reduction=self.reduction
        )
