"""Checks of what enters the parts that take features as maps or as tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._tensors import check_tensor
from densessl.features import map_to_tokens


def as_tokens(features: Tensor, name: str) -> Tensor:
    """Features of either form as tokens, checked on behalf of the parts that take both forms.

    Args:
        features: Feature map ``(B, C, h, w)`` or tokens ``(B, N, C)``, floating point.
        name: The argument's name, for the error.

    Returns:
        Tokens ``(B, N, C)``.

    Raises:
        ValueError: If a shape or dtype is not as described.
    """
    check_tensor(features, name, "floating point features (B, C, h, w) or (B, N, C)")
    if features.ndim not in (3, 4) or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected floating point features (B, C, h, w) or (B, N, C), "
            f"got {features.dtype} {tuple(features.shape)}"
        )
    return map_to_tokens(features) if features.ndim == 4 else features


def as_valid(valid: Tensor, features: Tensor, name: str) -> Tensor:
    """Which cells of a map are valid, in either form, checked against the map.

    Args:
        valid: Boolean tensor ``(B, N)`` or, for a map, ``(B, h, w)``.
        features: Feature map ``(B, C, h, w)`` or tokens ``(B, N, C)`` that ``valid`` belongs to.
        name: The argument's name, for the error.

    Returns:
        Boolean tensor ``(B, N)``.

    Raises:
        ValueError: If a shape, dtype or device is not as described.
    """
    if features.ndim == 4:
        batch, _, h, w = features.shape
        shapes, expected = [(batch, h * w), (batch, h, w)], f"(B, N) = {(batch, h * w)} or (B, h, w) = {(batch, h, w)}"
    else:
        shapes, expected = [tuple(features.shape[:2])], f"(B, N) = {tuple(features.shape[:2])}"
    check_tensor(valid, name, f"bool {expected}")
    if valid.dtype != torch.bool or tuple(valid.shape) not in shapes:
        raise ValueError(f"{name}: expected bool {expected}, got {valid.dtype} {tuple(valid.shape)}")
    if valid.device != features.device:
        raise ValueError(f"{name}: expected a tensor on {features.device} as the features, got {valid.device}")
    return valid.flatten(1)
