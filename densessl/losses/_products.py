"""The C x C products behind losses of relations between tokens, computed without a table of all pairs of tokens.

Rows are taken in portions, once in the forward pass and once more in the backward pass. Between the passes only the
inputs are kept, and nothing else of the tokens' size. Each portion's products are float32; their sum is float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 1568  # rows in one portion, half a map of 56x56: with 256 channels its copies take 1.6 MB each


def difference_products(x: Tensor, g: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Products of difference and sum of unit tokens: with U = X - G and V = X + G, ``(U^T U, V^T V, U^T V)``.

    Args:
        x: Tokens ``(B, N, C)``, float32 or float64, of any length; they are normalised here.
        g: Tokens of the other branch, in the same shape.
        valid: Boolean tensor ``(B, N)``, True for the tokens that count; None means all.

    Returns:
        Three tensors ``(B, C, C)``, float64.
    """
    return _Products.apply(x, g, valid, True)


def centered_products(x: Tensor, g: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Products of tokens less their mean over the valid ones: ``(X^T X, G^T G, X^T G)``.

    Args:
        x: Tokens ``(B, N, C)``, float32 or float64.
        g: Tokens of the other branch, ``(B, N, C')``.
        valid: Boolean tensor ``(B, N)``, True for the tokens that count; None means all.

    Returns:
        Three tensors ``(B, C, C)``, ``(B, C', C')`` and ``(B, C, C')``, float64.
    """
    return _Products.apply(x, g, valid, False)


def _divisor(rows: Tensor) -> Tensor:
    # For maps, whose channels lie far apart in memory, vector_norm takes ten times as long as this.
    length = rows.square().sum(-1, keepdim=True).sqrt()
    return torch.where(length > 1e-12, length, torch.inf)


def _combined(p: Tensor, by_p: Tensor, q: Tensor, by_q: Tensor) -> Tensor:
    """``p @ by_p + q @ by_q`` for rows p and q, in the layout of p: a pass that mixes two layouts is slow."""
    if p.stride(-1) == 1:
        return torch.addmm(p @ by_p, q, by_q)
    return torch.addmm(by_p.mT @ p.mT, by_q.mT, q.mT).mT


def _mean(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over an image's valid tokens, (C,)."""
    if valid is None:
        return tokens.sum(0, dtype=torch.float64).div(max(len(tokens), 1)).to(tokens.dtype)
    total = torch.zeros(tokens.shape[1], dtype=torch.float64, device=tokens.device)
    for start in range(0, len(tokens), _ROWS):
        part = slice(start, start + _ROWS)
        total += torch.where(valid[part, None], tokens[part], 0.0).sum(0, dtype=torch.float64)
    return (total / valid.sum().clamp(min=1)).to(tokens.dtype)


def _portion(
    tokens: Tensor, valid: Tensor | None, shift: Tensor | None, divisor: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Rows minus the shift or, without a shift, at unit length; and their divisors. Rows that are not valid are 0."""
    if valid is not None:
        tokens = torch.where(valid[:, None], tokens, 0.0 if shift is None else shift)
    if shift is not None:
        return tokens - shift, None
    divisor = _divisor(tokens) if divisor is None else divisor
    return tokens / divisor, divisor


def _along(grad: Tensor, unit: Tensor, divisor: Tensor | None) -> Tensor:
    """Gradient of the rows that ``_portion`` took, from the gradient of its result."""
    if divisor is None:
        return grad  # the sum of centred rows is 0, and so is the mean of this gradient
    return torch.addcmul(grad, unit, (grad * unit).sum(-1, keepdim=True), value=-1).div_(divisor)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, valid: Tensor | None, difference: bool) -> tuple[Tensor, ...]:
        sizes = (x.shape[2], x.shape[2]), (g.shape[2], g.shape[2]), (x.shape[2], g.shape[2])
        sums = [torch.zeros(len(x), *size, dtype=torch.float64, device=x.device) for size in sizes]
        means: list[tuple[Tensor | None, Tensor | None]] = []
        divisors: list[tuple[Tensor | None, Tensor | None]] = []  # of the portions, one number a token
        for image in range(len(x)):
            keep = None if valid is None else valid[image]
            means.append((None, None) if difference else (_mean(x[image], keep), _mean(g[image], keep)))
            for start in range(0, x.shape[1], _ROWS):
                part = slice(start, start + _ROWS)
                keep = None if valid is None else valid[image, part]
                p, divisor_x = _portion(x[image, part], keep, means[image][0])
                q, divisor_g = _portion(g[image, part], keep, means[image][1])
                divisors.append((divisor_x, divisor_g))
                p, q = (p - q, q.add_(p)) if difference else (p, q)
                for total, (left, right) in zip(sums, ((p, p), (q, q), (p, q)), strict=True):
                    total[image] += left.mT @ right
        ctx.save_for_backward(x, g, valid)
        ctx.means, ctx.divisors, ctx.difference = means, divisors, difference
        return tuple(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, g, valid = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            by_p, by_q, by_pq = (
                (grads[0] + grads[0].mT).to(x.dtype),
                (grads[1] + grads[1].mT).to(x.dtype),
                grads[2].to(x.dtype),
            )
            # The factors of the rows in either product. For U = X - G and V = X + G the C x C parts are added first, so
            # that each gradient takes two products of the tokens' size.
            to_x, to_g = (by_p, by_pq.mT), (by_pq, by_q)
            if ctx.difference:
                to_x, to_g = (by_p + by_pq, by_pq.mT + by_q), (by_pq - by_p, by_q - by_pq.mT)
            grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
            grad_g = torch.empty_like(g) if ctx.needs_input_grad[1] else None
            divisors = iter(ctx.divisors)
            for image in range(len(x)):
                for start in range(0, x.shape[1], _ROWS):
                    part = slice(start, start + _ROWS)
                    keep = None if valid is None else valid[image, part]
                    of_x, of_g = next(divisors)
                    unit_x, divisor_x = _portion(x[image, part], keep, ctx.means[image][0], of_x)
                    unit_g, divisor_g = _portion(g[image, part], keep, ctx.means[image][1], of_g)
                    p, q = (unit_x - unit_g, unit_x + unit_g) if ctx.difference else (unit_x, unit_g)
                    if grad_x is not None:
                        inner = _combined(p, to_x[0][image], q, to_x[1][image])
                        grad_x[image, part] = _along(inner, unit_x, divisor_x)
                    if grad_g is not None:
                        inner = _combined(p, to_g[0][image], q, to_g[1][image])
                        grad_g[image, part] = _along(inner, unit_g, divisor_g)
        return grad_x, grad_g, None, None
