"""Maps and tokens: the two forms in which features come, and the way between them."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def map_to_tokens(features: Tensor) -> Tensor:
    """A feature map as tokens.

    Args:
        features: ``(B, C, h, w)``.

    Returns:
        ``(B, h * w, C)``, row-major.

    Raises:
        ValueError: on another shape.
    """
    if features.ndim != 4:
        raise ValueError(f"features: expected a map (B, C, h, w), got {tuple(features.shape)}")
    return rearrange(features, "b c h w -> b (h w) c")


def tokens_to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens as a feature map.

    Args:
        tokens: ``(B, N, C)``, row-major, N = h * w.
        size: ``(h, w)``.

    Returns:
        ``(B, C, h, w)``.

    Raises:
        ValueError: on another shape, or a size that is not that of N cells.
    """
    h, w = size
    if tokens.ndim != 3 or tokens.shape[1] != h * w:
        raise ValueError(f"tokens: expected (B, h * w = {h} * {w}, C), got {tuple(tokens.shape)}")
    return rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w)


def as_tokens(features: Tensor, name: str) -> Tensor:
    """Features of either form as tokens, checked for the parts that take both.

    Args:
        features: floating point ``(B, C, h, w)`` or ``(B, N, C)``.
        name: the argument's name, for the error.

    Returns:
        ``(B, N, C)``.

    Raises:
        ValueError: on another shape or dtype.
    """
    if features.ndim not in (3, 4) or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected floating point features (B, C, h, w) or (B, N, C), "
            f"got {features.dtype} {tuple(features.shape)}"
        )
    return map_to_tokens(features) if features.ndim == 4 else features


def as_valid(valid: Tensor, features: Tensor, name: str) -> Tensor:
    """Which cells of a map are valid, in either form, checked against the map.

    Args:
        valid: bool ``(B, N)`` or, of a map, ``(B, h, w)``.
        features: ``(B, C, h, w)`` or ``(B, N, C)``.
        name: the argument's name, for the error.

    Returns:
        ``(B, N)``.

    Raises:
        ValueError: on another shape, dtype or device.
    """
    if features.ndim == 4:
        batch, _, h, w = features.shape
        shapes, expected = [(batch, h * w), (batch, h, w)], f"(B, N) = {(batch, h * w)} or (B, h, w) = {(batch, h, w)}"
    else:
        shapes, expected = [tuple(features.shape[:2])], f"(B, N) = {tuple(features.shape[:2])}"
    if valid.dtype != torch.bool or tuple(valid.shape) not in shapes:
        raise ValueError(f"{name}: expected bool {expected}, got {valid.dtype} {tuple(valid.shape)}")
    if valid.device != features.device:
        raise ValueError(f"{name}: expected a tensor on {features.device} as the features, got {valid.device}")
    return valid.flatten(1)


def normalized(tokens: Tensor) -> Tensor:
    """Unit length along the last axis.

    The norm is taken in float32 at least, since float16 overflows it. A vector of zeros has no direction: it stays
    zero and takes no gradient, where ``F.normalize`` divides by 1e-12 and float16 gradients become infinite.

    Args:
        tokens: floating point, any shape.

    Returns:
        The same shape, float32 (float64 stays).
    """
    return _Normalized.apply(tokens if tokens.dtype == torch.float64 else tokens.float())[0]


def _divisor(tokens: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return torch.where(length > 1e-12, length, torch.inf)


class _Normalized(torch.autograd.Function):
    """Tokens over their lengths; the gradient in three passes over the tokens, where autograd's own takes eight.

    On small maps these passes are most of a loss.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor) -> tuple[Tensor, Tensor]:
        divisor = _divisor(tokens)
        return tokens / divisor, divisor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        tokens, unit, divisor = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative the lengths count as functions of the tokens
            divisor = _divisor(tokens)
        along = (grad * unit).sum(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1) / divisor
