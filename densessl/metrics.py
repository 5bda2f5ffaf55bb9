"""Measures of a dense method's health, cheap enough for every step; results stay on the device.

The docs page "Concepts" says which values to expect. In short, a collapsed encoder shows as ``feature_std`` far below
``1 / sqrt(C)``, ``effective_rank`` near 1, and negatives that are as similar as positives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from densessl._checks import as_tokens, as_valid
from densessl._normalize import normalized
from densessl._sums import check_mask, matched_cells, positive_pairs, sum_keys, unit_tokens
from densessl._tensors import check_tensor
from densessl.propagation import propagation_weights


def _positives(mask: Tensor) -> Tensor:
    """Number of positives of each image, (B,)."""
    check_mask(mask)
    if mask.layout == torch.sparse_coo:
        image = positive_pairs(mask)[0]  # sorted
        return torch.searchsorted(image, torch.arange(mask.shape[0] + 1, device=image.device)).diff()
    return mask.sum((1, 2))


def positives_per_cell(mask: Tensor, valid_q: Tensor | None = None) -> Tensor:
    """Mean number of positives of a query cell.

    Args:
        mask: Positive pairs ``(B, Nq, Nk)``, boolean, strided or sparse.
        valid_q: Optional boolean tensor ``(B, Nq)`` or ``(B, h, w)``, True for the query cells that count.

    Returns:
        A scalar. In the overlap of two views with equal square cells, T = 0.7 gives ``2 pi T^2`` = 3.08 on average over
        random offsets; two identical views give 1.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> positives_per_cell(torch.eye(4, dtype=torch.bool)[None])
        tensor(1.)
    """
    positives = _positives(mask).sum()
    if valid_q is None:
        return positives / (mask.shape[0] * mask.shape[1])
    check_tensor(valid_q, "valid_q", f"bool (B, Nq) = {tuple(mask.shape[:2])} or (B, h, w)")
    if valid_q.dtype != torch.bool or valid_q.ndim not in (2, 3) or valid_q.flatten(1).shape != mask.shape[:2]:
        raise ValueError(
            f"valid_q: expected bool (B, Nq) = {tuple(mask.shape[:2])} or (B, h, w), "
            f"got {valid_q.dtype} {tuple(valid_q.shape)}"
        )
    return positives / valid_q.sum().clamp(min=1)


def unmatched_share(mask: Tensor) -> Tensor:
    """Share of images without any positive pair.

    Args:
        mask: Positive pairs ``(B, Nq, Nk)``, boolean, strided or sparse.

    Returns:
        A scalar in 0..1.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> unmatched_share(torch.tensor([[[True]], [[False]]]))
        tensor(0.5000)
    """
    return (_positives(mask) == 0).float().mean()


def _counted(tokens: Tensor, valid: Tensor | None, features: Tensor, name: str = "valid") -> tuple[Tensor, Tensor]:
    """Tokens (B, N, C), 0 where a cell does not count, and which do, (B, N): picking them would wait for the device."""
    if valid is None:
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    valid = as_valid(valid, features, name)
    return tokens.masked_fill(~valid[..., None], 0), valid


@torch.no_grad()
def feature_std(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Standard deviation of the unit features over all cells of the batch, mean over channels.

    Args:
        features: Features ``(B, C, h, w)`` or ``(B, N, C)``.
        valid: Optional boolean tensor ``(B, N)`` or ``(B, h, w)``, True for the cells that count.

    Returns:
        A scalar: about ``1 / sqrt(C)`` for healthy features, 0 for collapsed ones.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> round(feature_std(torch.ones(2, 32, 7, 7)).item(), 4)
        0.0
    """
    unit, counts = _counted(normalized(as_tokens(features, "features")), valid, features)
    cells = counts.sum().clamp(min=1)
    away = (unit - unit.sum((0, 1)) / cells) * counts[..., None]
    return (away.square().sum((0, 1)) / cells).sqrt().mean()


@torch.no_grad()
def effective_rank(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """How many directions the unit features of all cells use: exp of the entropy of their singular values.

    Source: Roy and Vetterli 2007, not centred, as RankMe (Garrido et al. 2023) has it. Costs the eigenvalues of a
    ``C x C`` matrix.

    Args:
        features: Features ``(B, C, h, w)`` or ``(B, N, C)``.
        valid: Optional boolean tensor ``(B, N)`` or ``(B, h, w)``, True for the cells that count.

    Returns:
        A scalar in 1..C; NaN if a feature that counts is not finite.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> rank = effective_rank(torch.rand(2, 32, 7, 7))
    """
    unit = _counted(normalized(as_tokens(features, "features")), valid, features)[0].flatten(0, 1)
    with torch.autocast(unit.device.type, enabled=False):
        product = unit.mT @ unit
        known = product.isfinite().all()
        # The solver fails on NaN, in the very run that this meter should diagnose.
        spectrum = torch.linalg.eigvalsh(torch.where(known, product, 0.0)).clamp(min=0)
    # The squares of the singular values carry rounding noise of 1e-7 of the largest; the roots of that noise would
    # count.
    spectrum = torch.where(spectrum > 1e-6 * spectrum.max(), spectrum, 0.0)
    share = spectrum.sqrt() / spectrum.sqrt().sum().clamp(min=1e-12)
    return torch.where(known, torch.special.entr(share).sum().exp(), torch.nan)


@torch.no_grad()
def pair_similarity(
    query: Tensor, key: Tensor, mask: Tensor, valid_q: Tensor | None = None, valid_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cosine of the positive pairs and of all other pairs of the batch.

    A method that works makes the first larger than the second; in a collapse both are 1.

    Args:
        query: Query features ``(B, C, h, w)`` or ``(B, Nq, C)``.
        key: Key features ``(B, C, h', w')`` or ``(B, Nk, C)``.
        mask: Positive pairs ``(B, Nq, Nk)``, boolean, strided or sparse, without pairs of cells that do not count.
        valid_q: Optional boolean tensor ``(B, Nq)`` or ``(B, h, w)``, True for the query cells that count.
        valid_k: Optional boolean tensor ``(B, Nk)`` or ``(B, h', w')``, True for the key cells that count.

    Returns:
        Two scalars, for the positive pairs and for all others; NaN if there are no such pairs.

    Raises:
        ValueError: If a shape, dtype or device is not as described.

    Examples:
        >>> mask = torch.eye(49, dtype=torch.bool).expand(2, 49, 49)
        >>> positive, negative = pair_similarity(torch.rand(2, 32, 7, 7), torch.rand(2, 32, 7, 7), mask)
    """
    q, k = unit_tokens(query, key, mask)
    (q, counts_q), (k, counts_k) = _counted(q, valid_q, query, "valid_q"), _counted(k, valid_k, key, "valid_k")
    with torch.autocast(q.device.type, enabled=False):
        matched_q, matched_k = matched_cells(mask)
        summed, positives = sum_keys(mask, k.masked_fill(~matched_k[..., None], 0))
    # The sum over all pairs is the product of the sums: no (Nq, Nk) tensor for the negatives.
    everything, positive = (q.sum(1) * k.sum(1)).sum(), (q.masked_fill(~matched_q[..., None], 0) * summed).sum()
    count = positives.sum()
    rest = (counts_q.sum(1) * counts_k.sum(1)).sum() - count
    return positive / count, torch.where(rest > 0, (everything - positive) / rest, torch.nan)


@torch.no_grad()
def propagation_entropy(features: Tensor, gamma: float = 2.0) -> Tensor:
    """How widely the pixel propagation module spreads: entropy of its weights (normalised to sum 1) divided by log N.

    Args:
        features: Features that go into the module, ``(B, C, h, w)`` or ``(B, N, C)``, with N at least 2.
        gamma: The module's exponent, above 0.

    Returns:
        A scalar in 0..1, averaged over cells: 0 if each cell sees only itself, 1 if all cells count alike.

    Raises:
        ValueError: If the shape or dtype is not as described, or there is a single cell.

    Examples:
        >>> entropy = propagation_entropy(torch.rand(2, 32, 7, 7))
    """
    tokens = as_tokens(features, "features")
    if tokens.shape[1] < 2:
        raise ValueError(f"features: expected at least 2 cells, got {tuple(features.shape)}")
    weights = propagation_weights(tokens, gamma).float()
    share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(share).sum(-1).mean() / math.log(tokens.shape[1])
