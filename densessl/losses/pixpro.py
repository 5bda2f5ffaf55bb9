"""Pixel-to-propagation consistency."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl._sums import check_pairs, matched_cells, sum_keys, unit_tokens
from densessl.losses._reduce import NoMatch, Reduction, check_options, reduce_images


def pixpro_loss(
    query: Tensor, key: Tensor, mask: Tensor, *, reduction: Reduction = "mean", no_match: NoMatch = "zero"
) -> Tensor:
    """Minus the mean cosine over all positive pairs of an image, then over images (PixPro, Eq. 5, one direction).

    Args:
        query: Propagated features of the online branch, ``(B, C, h, w)`` or ``(B, Nq, C)``.
        key: Features of the target, ``(B, C, h', w')`` or ``(B, Nk, C)``.
        mask: Positive pairs ``(B, Nq, Nk)`` from a matcher, boolean, strided or sparse COO.
        reduction: ``"mean"`` over images, or ``"none"`` for one value per image.
        no_match: How an image without positives counts in the mean: as 0 (``"zero"``, as in the published code) or not
            at all (``"skip"``, as in the paper).

    Cells without a positive, in either map, are not read: a NaN there reaches neither the loss nor a gradient.

    Returns:
        A float32 scalar in [-1, 1], or ``(B,)`` without reduction, with 0 for images without positives.

    Raises:
        ValueError: If a shape, dtype, device or option is not as described.

    Examples:
        >>> features, mask = torch.ones(2, 32, 7, 7), torch.eye(49, dtype=torch.bool).expand(2, 49, 49)
        >>> round(pixpro_loss(features, features, mask).item(), 4)
        -1.0
    """
    check_options(reduction, no_match)
    loss = _uncompiled if getattr(mask, "layout", None) == torch.sparse_coo else _loss
    return loss(query, key, mask, reduction, no_match)


def _loss(query: Tensor, key: Tensor, mask: Tensor, reduction: Reduction, no_match: NoMatch) -> Tensor:
    check_pairs(query, key, mask)
    q, k = unit_tokens(query, key, mask, *matched_cells(mask))
    with torch.autocast(q.device.type, enabled=False):
        # Bilinear: sum_ij mask_ij <q_i, k_j> = sum_i <q_i, sum_j mask_ij k_j>, so no logits are needed.
        summed, count = sum_keys(mask, k)
        per_image = -(q * summed).sum((1, 2)) / count.clamp(min=1)
        return reduce_images(per_image, count > 0, reduction, no_match)


# torch.compile refuses sparse tensors. One break of the graph here replaces one at each step of the way.
_uncompiled = torch.compiler.disable(_loss)


class PixProLoss(nn.Module):
    """One direction of PixPro's loss; see ``pixpro_loss``.

    The published code multiplies each direction by 2 and adds both, which lies in [-4, 4]: ``2 * (loss(y1, t2, mask) +
    loss(y2, t1, mask.mT))``.

    Args:
        reduction: ``"mean"`` over images, or ``"none"``.
        no_match: How an image without positives counts in the mean: ``"zero"`` or ``"skip"``.

    Raises:
        ValueError: If an option is not as described.

    Examples:
        >>> mask = torch.eye(49, dtype=torch.bool).expand(2, 49, 49)
        >>> loss = PixProLoss()(torch.rand(2, 32, 7, 7), torch.rand(2, 32, 7, 7), mask)
    """

    def __init__(self, reduction: Reduction = "mean", no_match: NoMatch = "zero") -> None:
        super().__init__()
        check_options(reduction, no_match)
        self.reduction: Reduction = reduction
        self.no_match: NoMatch = no_match

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, no_match={self.no_match!r}"

    def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        """See ``pixpro_loss``."""
        return pixpro_loss(query, key, mask, reduction=self.reduction, no_match=self.no_match)
