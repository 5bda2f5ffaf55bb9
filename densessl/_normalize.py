"""Vectors of unit length, exact in half precision, with a gradient in few passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def normalized(tokens: Tensor, used: Tensor | None = None) -> Tensor:
    """Scales vectors to unit length along the last axis.

    The norm is taken in float32 at least, since float16 overflows it. A vector of zeros has no direction: it stays
    zero and takes no gradient, where ``F.normalize`` divides by 1e-12 and float16 gradients become infinite.

    Args:
        tokens: Floating-point tensor of any shape.
        used: Boolean tensor in the shape of the tokens without their last axis; None means all True. Vectors that are
            not used become 0 whatever they hold, even NaN, and take no gradient.

    Returns:
        A tensor of the same shape in float32 (float64 stays float64).
    """
    return _Normalized.apply(tokens if tokens.dtype == torch.float64 else tokens.float(), used)[0]


def _divisor(tokens: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return torch.where(length > 1e-12, length, torch.inf)


class _Normalized(torch.autograd.Function):
    """Tokens divided by their lengths; the gradient takes three passes over the tokens, where autograd takes eight.

    On small maps these passes are most of a loss.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
        divisor = _divisor(tokens)
        if used is None:
            return tokens / divisor, divisor
        # In place, so that no copy of the tokens is made or kept for the backward pass.
        unit = (tokens / divisor).masked_fill_(~used[..., None], 0)
        return unit, divisor.masked_fill_(~used[..., None], torch.inf)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        tokens, used, unit, divisor = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative the lengths count as functions of the tokens
            divisor = _divisor(tokens if used is None else tokens.masked_fill(~used[..., None], 0))
        along = (grad * unit).sum(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1) / divisor, None
