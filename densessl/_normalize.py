"""Vectors of unit length, exact in half precision, with a gradient in few passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
