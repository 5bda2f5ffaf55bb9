"""Diagnostics of tokens: outliers in norm, and how much of a token is its place."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._checks import as_tokens
from densessl.evaluation._refuse import check_at_least, check_finite, check_floating, check_positive


@torch.no_grad()
def outlier_tokens(features: Tensor, k: float = 10.0) -> Tensor:
    """Which tokens have a norm far above that of the others of their image.

    The rule is ``norm > median + k * MAD``, with MAD the median of the absolute deviations from the median.

    Args:
        features: Features of the tokens, floating point ``(B, C, h, w)`` or ``(B, N, C)``.
        k: How many deviations above the median are still usual, greater than 0.

    Returns:
        bool ``(B, h, w)`` of a map, ``(B, N)`` of tokens.

    Raises:
        ValueError: If the features have another shape, or a value is not finite.
    """
    check_positive(k, "k")
    norms = as_tokens(features, "features").float().norm(dim=2)
    check_finite(norms, "features")
    median = _median(norms)
    outliers = norms > median + k * _median((norms - median).abs())
    return outliers.unflatten(1, features.shape[2:]) if features.ndim == 4 else outliers


def _median(values: Tensor) -> Tensor:
    """Median of each row (B, 1), the mean of the middle two of an even number; torch.median takes the lower."""
    ranked, count = values.sort(1).values, values.shape[1]
    return (ranked[:, (count - 1) // 2] + ranked[:, count // 2]).unsqueeze(1) / 2


@torch.no_grad()
def position_share(features: Tensor, *, ridge: float = 1e-3) -> float:
    """How much of a token's place can be read off it linearly, on held-out images.

    A ridge regression to row and column is fitted on every second image, beginning with the first, and scored on the
    others.

    Args:
        features: Feature maps of at least two images, floating point ``(B, C, h, w)``, ``h`` or ``w`` greater than 1.
        ridge: Penalty, as a share of the features' mean variance, greater than 0.

    Returns:
        R squared, the mean of that of the rows and that of the columns: 1 if the place is read without error, about 0
        if not at all; it may be negative. A side of one cell does not count.

    Raises:
        ValueError: If the features have another shape, there is a single image, or a value is not finite.
    """
    check_floating(features, ("B", "C", "h", "w"), "features")
    check_at_least(len(features), 2, "features, number of images")
    check_finite(features, "features")
    check_positive(ridge, "ridge")
    place = _place(features)
    fit, test = features[::2], features[1::2]
    weight, mean = _linear_map(_rows(fit), place.repeat(len(fit), 1), ridge)
    errors = (_rows(test) - mean) @ weight - place.repeat(len(test), 1)
    return float(1 - (errors.square().mean(0) / place.square().mean(0)).mean())


@torch.no_grad()
def remove_position(features: Tensor, rounds: int = 1, *, ridge: float = 1e-3) -> Tensor:
    """Removes the directions from which a token's place can be read linearly.

    Each round fits the linear map from features to row and column, and projects the features onto what is orthogonal
    to its directions. Source: RASA of Franca (Venkataramanan et al. 2025).

    Args:
        features: Feature maps, floating point ``(B, C, h, w)``, ``h`` or ``w`` greater than 1.
        rounds: Number of rounds; each removes up to two directions, 0 changes nothing.
        ridge: Penalty, as a share of the features' mean variance, greater than 0.

    Returns:
        ``(B, C, h, w)`` in the dtype of the features.

    Raises:
        ValueError: If the features have another shape, a value is not finite, or the rounds would remove all channels.
    """
    check_floating(features, ("B", "C", "h", "w"), "features")
    check_at_least(rounds, 0, "rounds")
    check_finite(features, "features")
    check_positive(ridge, "ridge")
    place = _place(features)
    if rounds * place.shape[1] >= features.shape[1]:
        raise ValueError(f"rounds: expected to remove fewer than {features.shape[1]} directions, got {rounds} rounds")
    rows = _rows(features)
    for _ in range(rounds):
        weight, _ = _linear_map(rows, place.repeat(len(features), 1), ridge)
        directions = torch.linalg.svd(weight, full_matrices=False)
        kept = directions.U[:, 1e-9 * directions.S.max().clamp(min=1e-30) < directions.S]
        rows = rows - (rows @ kept) @ kept.mT
    batch, channels, h, w = features.shape
    return rows.view(batch, h, w, channels).movedim(3, 1).to(features.dtype)


def _rows(features: Tensor) -> Tensor:
    """All tokens (B * h * w, C), in double precision for the normal equations."""
    return features.movedim(1, 3).flatten(0, 2).double()


def _place(features: Tensor) -> Tensor:
    """Row and column of each cell, centred, (h * w, 2), or (h * w, 1) where one side is a single cell."""
    h, w = features.shape[2:]
    if h * w == 1:
        raise ValueError("features: expected maps of more than one cell, got 1 x 1")
    y = (torch.arange(h, device=features.device, dtype=torch.float64) + 0.5) / h - 0.5
    x = (torch.arange(w, device=features.device, dtype=torch.float64) + 0.5) / w - 0.5
    place = torch.stack([y[:, None].expand(h, w), x.expand(h, w)], -1).view(-1, 2)
    return place[:, [side for side, length in enumerate((h, w)) if length > 1]]


def _linear_map(rows: Tensor, place: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression from tokens to their places: weights (C, 2) and the tokens' mean (C,)."""
    mean = rows.mean(0)
    away = rows - mean
    spread = away.mT @ away / len(rows)
    penalty = (ridge * spread.diagonal().mean()).clamp(min=1e-12)
    eye = torch.eye(len(mean), dtype=spread.dtype, device=spread.device)
    return torch.linalg.solve(spread + penalty * eye, away.mT @ place / len(rows)), mean
