"""Pixel contrast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl._checks import as_valid
from densessl._sums import check_pairs, matched_cells, positive_pairs, unit_tokens
from densessl.losses._blockwise import cell_losses
from densessl.losses._ignored import check_ignore, needed_keys, without_positives
from densessl.losses._reduce import NoMatch, Reduction, check_options, check_temperature, reduce_images


def pixcontrast_loss(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    valid_k: Tensor | None = None,
    ignore: Tensor | None = None,
    *,
    temperature: float = 0.3,
    reduction: Reduction = "mean",
    no_match: NoMatch = "zero",
) -> Tensor:
    """InfoNCE between the cells of two views, with several positives inside the logarithm (PixPro, Eq. 2).

    The loss of a query cell is ``-log(sum over positives of exp(cos / t) / sum over all key cells of exp(cos / t))``.
    It is averaged over the query cells that have a positive, then over images. Negatives are the other cells of the
    same image's other view, as in the paper. A near pair that is taken out of the mask becomes a negative, unless
    ``ignore`` leaves it out. The paper averages over "pixels in the intersection of the two views": with T >= 0.5 and
    the larger cell as unit, each of those has a positive; cells on the rim that also have one count here as well. The
    authors' code does not contain this loss. Between large maps the logits are computed in blocks, once in the forward
    pass and once more in the backward pass, so that memory grows with the number of cells (strided masks aside).

    Args:
        query: Features of the online branch, ``(B, C, h, w)`` or ``(B, Nq, C)``.
        key: Features of the target, ``(B, C, h', w')`` or ``(B, Nk, C)``.
        mask: Positive pairs ``(B, Nq, Nk)``, boolean, strided or sparse COO.
        valid_k: Optional boolean tensor ``(B, Nk)`` or ``(B, h', w')``, for instance from ``densessl.cell_validity``:
            the key cells that the denominator sums over. Other key cells are not positives either, and what they hold,
            even NaN, is not read. Query cells need no such argument: a cell without a positive does not count.
        ignore: Optional pairs ``(B, Nq, Nk)`` that are neither positive nor negative, boolean, strided or sparse COO,
            in the layout of ``mask`` or the other: the denominator leaves them out. A pair that is also in ``mask`` is
            positive. Fractions of a pair, weights, are not supported. A key cell that every query cell with a positive
            ignores is not read, even if it holds NaN. Between large maps a sparse ``ignore`` is never made a table of
            all pairs, and of a strided one only boolean tables are made.
        temperature: Divisor of the similarities, above 0; 0.3 as secondary sources report for the paper.
        reduction: ``"mean"`` over images, or ``"none"`` for one value per image.
        no_match: How an image without positives counts in the mean: as 0 (``"zero"``) or not at all (``"skip"``).

    Returns:
        A float32 scalar of at least 0, or ``(B,)`` without reduction, with 0 for images without positives.

    Raises:
        ValueError: If a shape, dtype, device or option is not as described.

    Examples:
        >>> mask = torch.eye(49, dtype=torch.bool).expand(2, 49, 49)
        >>> loss = pixcontrast_loss(torch.rand(2, 32, 7, 7), torch.rand(2, 32, 7, 7), mask)
    """
    check_options(reduction, no_match)
    check_temperature(temperature)
    sparse = any(getattr(x, "layout", None) == torch.sparse_coo for x in (mask, ignore))
    loss = _uncompiled if sparse else _loss
    return loss(query, key, mask, valid_k, ignore, temperature, reduction, no_match)


def _loss(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    valid_k: Tensor | None,
    ignore: Tensor | None,
    temperature: float,
    reduction: Reduction,
    no_match: NoMatch,
) -> Tensor:
    check_pairs(query, key, mask)
    valid = None if valid_k is None else as_valid(valid_k, key, "valid_k")
    few = mask.numel() <= _FEW_PAIRS[mask.layout]
    mask, indices = mask.to_dense() if few else mask, None
    if mask.layout == torch.sparse_coo:
        indices = positive_pairs(mask)
        indices = indices[:, indices[0] < mask.shape[0]]  # this waits for the device, but so do the blocks below
        if valid is not None:
            indices = indices[:, valid[indices[0], indices[2]]]
        has_positive = _rows_of(indices, mask)
    else:
        if valid is not None:
            mask = mask & valid[:, None]
        has_positive = matched_cells(mask)[0]
    used, ignored = valid, None
    if ignore is not None:
        check_ignore(ignore, mask)
        ignored = without_positives(ignore.to_dense() if few else ignore, mask)
        needed = needed_keys(ignored, has_positive, mask.shape[2])
        used = needed if valid is None else needed & valid
    q, k = unit_tokens(query, key, mask, has_positive, used)
    with torch.autocast(q.device.type, enabled=False):
        if few:
            per_cell = _of_all_logits(q, k, mask, has_positive, valid, ignored, temperature)
        else:
            table = mask if indices is None else None
            per_cell = cell_losses(q, k, table, indices, valid, ignored, temperature)
        cells = has_positive.sum(1)
        per_image = per_cell.sum(1) / cells.clamp(min=1)
        return reduce_images(per_image, cells > 0, reduction, no_match)


# torch.compile refuses sparse tensors. One break of the graph here replaces one at each step of the way.
_uncompiled = torch.compiler.disable(_loss)


# Up to so many logits, computing all at once is faster than blocks, which leave rows out if the mask is sparse.
_FEW_PAIRS = {torch.strided: 1 << 22, torch.sparse_coo: 1 << 17}


def _of_all_logits(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    has_positive: Tensor,
    valid: Tensor | None,
    ignored: Tensor | None,
    temperature: float,
) -> Tensor:
    """Loss of each query cell, (B, Nq); 0 where it has no positive."""
    logits = q @ k.mT / temperature
    # Rows without positives take part with all their cells and are dropped afterwards: log(0) would leave NaN in the
    # gradient even where its value is masked out.
    positive = logits.masked_fill(~(mask | ~has_positive[..., None]), -torch.inf)
    if valid is not None:
        logits = logits.masked_fill(~(valid[:, None] | ~has_positive[..., None]), -torch.inf)
    if ignored is not None:
        logits = logits.masked_fill(ignored & has_positive[..., None], -torch.inf)
    return (logits.logsumexp(2) - positive.logsumexp(2)) * has_positive


def _rows_of(indices: Tensor, mask: Tensor) -> Tensor:
    """Which query cells have a positive, (B, Nq)."""
    found = torch.zeros(mask.shape[:2], dtype=torch.bool, device=mask.device)
    return found.index_put_((indices[0], indices[1]), found.new_ones(()))


class PixContrastLoss(nn.Module):
    """One direction of PixContrast's loss; see ``pixcontrast_loss``.

    Args:
        temperature: Divisor of the similarities, above 0; 0.3 as secondary sources report for the paper.
        reduction: ``"mean"`` over images, or ``"none"``.
        no_match: How an image without positives counts in the mean: ``"zero"`` or ``"skip"``.

    Raises:
        ValueError: If an option is not as described.

    Examples:
        >>> mask = torch.eye(49, dtype=torch.bool).expand(2, 49, 49)
        >>> loss = PixContrastLoss(temperature=0.3)(torch.rand(2, 32, 7, 7), torch.rand(2, 32, 7, 7), mask)
    """

    def __init__(self, temperature: float = 0.3, reduction: Reduction = "mean", no_match: NoMatch = "zero") -> None:
        super().__init__()
        check_options(reduction, no_match)
        check_temperature(temperature)
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.no_match: NoMatch = no_match

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, no_match={self.no_match!r}"

    def forward(
        self, query: Tensor, key: Tensor, mask: Tensor, valid_k: Tensor | None = None, ignore: Tensor | None = None
    ) -> Tensor:
        """See ``pixcontrast_loss``."""
        return pixcontrast_loss(
            query,
            key,
            mask,
            valid_k,
            ignore,
            temperature=self.temperature,
            reduction=self.reduction,
            no_match=self.no_match,
        )
