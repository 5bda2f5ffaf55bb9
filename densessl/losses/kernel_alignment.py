"""Patch kernel alignment: two models see the same structure among an image's cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl._checks import as_tokens, as_valid
from densessl.losses._products import centered_products
from densessl.losses._reduce import NoMatch, Reduction, check_options, reduce_images

_SMALLEST = 1e-6  # below it the kernel of an image counts as constant, as in lightly


def kernel_alignment_loss(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    no_match: NoMatch = "skip",
) -> Tensor:
    """One minus the centred kernel alignment of an image's cells (PaKA, arXiv:2509.05606).

    With the kernels ``K = Z Z^T`` of the tokens Z and the centring matrix H, the alignment is ``<H Kq H, H Kk H> / (|H
    Kq H| |H Kk H|)``. For tokens less their mean this equals ``|Zq^T Zk|^2 / (|Zq^T Zq| |Zk^T Zk|)``, so C x C products
    are enough and no N x N kernel is made. The tokens are not normalised: a common factor of all tokens does not change
    the alignment. The loss can be differentiated once.

    Args:
        query: Features of the online branch, ``(B, C, h, w)`` or ``(B, N, C)``.
        key: Features of the same places, ``(B, C', h, w)`` or ``(B, N, C')``, for instance from ``densessl.align``. The
            key takes a gradient if it asks for one; the published method detaches it.
        valid: Optional boolean tensor ``(B, N)`` or ``(B, h, w)``, True for the cells that count. What other cells
            hold, even NaN, is not read.
        reduction: ``"mean"`` over images, or ``"none"`` for one value per image.
        no_match: How an image with fewer than two valid cells counts in the mean: not at all (``"skip"``, as in
            lightly) or as 0 (``"zero"``).

    Returns:
        A float32 scalar in [0, 1] (float64 for float64 features), or ``(B,)`` without reduction, with 0 for images with
        fewer than two valid cells.

    Raises:
        ValueError: If a shape, dtype, device or option is not as described.

    Examples:
        >>> features = torch.rand(2, 32, 7, 7)
        >>> abs(kernel_alignment_loss(features, 3 * features).item()) < 1e-4
        True
    """
    check_options(reduction, no_match)
    x, g = as_tokens(query, "query"), as_tokens(key, "key")
    if x.shape[:2] != g.shape[:2]:
        raise ValueError(f"key: expected (B, N) = {tuple(x.shape[:2])} as query, got {tuple(g.shape[:2])}")
    if x.device != g.device:
        raise ValueError(f"key: expected a tensor on {x.device} as query, got {g.device}")
    keep = None if valid is None else as_valid(valid, query, "valid")
    dtype = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        xx, gg, xg = centered_products(x.to(dtype), g.to(dtype), keep)
        both, query_norm, key_norm = (product.square().sum((1, 2)) for product in (xg, xx, gg))
        scale = query_norm.clamp(min=_SMALLEST).sqrt() * key_norm.clamp(min=_SMALLEST).sqrt()
        cells = torch.full_like(both, x.shape[1]) if keep is None else keep.sum(1)
        counted = cells >= 2
        per_image = torch.where(counted, 1 - both / scale, 0.0).to(dtype)
        return reduce_images(per_image, counted, reduction, no_match)


class KernelAlignmentLoss(nn.Module):
    """Patch kernel alignment; see ``kernel_alignment_loss``.

    Args:
        reduction: ``"mean"`` over images, or ``"none"``.
        no_match: How an image with fewer than two valid cells counts in the mean: ``"skip"`` or ``"zero"``.

    Raises:
        ValueError: If an option is not as described.

    Examples:
        >>> loss = KernelAlignmentLoss()(torch.rand(2, 32, 7, 7), torch.rand(2, 16, 7, 7))
    """

    def __init__(self, reduction: Reduction = "mean", no_match: NoMatch = "skip") -> None:
        super().__init__()
        check_options(reduction, no_match)
        self.reduction: Reduction = reduction
        self.no_match: NoMatch = no_match

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, no_match={self.no_match!r}"

    def forward(self, query: Tensor, key: Tensor, valid: Tensor | None = None) -> Tensor:
        """See ``kernel_alignment_loss``."""
        return kernel_alignment_loss(query, key, valid, reduction=self.reduction, no_match=self.no_match)
