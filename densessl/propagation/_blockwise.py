"""The pixel propagation module's sum without a table of weights, which are computed again in the backward pass.

It works tile by tile on any device: ``s(x_i, x_j)`` is symmetric, so each tile of weights above the diagonal serves
twice. Or it uses the Triton kernels of ``_triton.py``. These are operators of torch, so that ``torch.compile`` takes
each as one node and does not unroll the loop over the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Number of weights in a tile, and in the tiles of several images that are held together. On a CPU they stay in the
# cache; on a GPU there must be work for all of it.
_SIDE = {"cpu": 512, "cuda": 2048}
_HELD = {"cpu": 1 << 18, "cuda": 1 << 26}


def power(cosine: Tensor, gamma: float) -> Tensor:
    """``max(cos, 0) ** gamma``; below an exponent of 1 the published code adds 1e-6, and so does this.

    Args:
        cosine: Cosines in any shape.
        gamma: Exponent, above 0.

    Returns:
        Powers in the same shape.
    """
    positive = cosine.clamp(min=0)
    if gamma == 2.0:
        return positive.square()
    return (positive + 1e-6 if gamma < 1 else positive).pow(gamma)


def _slope(cosine: Tensor, gamma: float) -> Tensor:
    """Derivative of ``power``; at 0 it is the one from above, as in torch's clamp."""
    positive = cosine.clamp(min=0)
    if gamma == 2.0:
        return positive.mul_(2)
    rise = (positive + 1e-6 if gamma < 1 else positive).pow(gamma - 1).mul_(gamma)
    return rise if gamma > 1 else rise.mul_(cosine >= 0)


def _tiles(unit: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Images, rows and columns of the tiles on and above the diagonal."""
    batch, count = unit.shape[:2]
    side = _SIDE.get(unit.device.type, _SIDE["cuda"])
    together = max(1, _HELD.get(unit.device.type, _HELD["cuda"]) // min(side, count) ** 2)
    for image in range(0, batch, together):
        for row in range(0, count, side):
            for column in range(row, count, side):
                yield slice(image, image + together), slice(row, row + side), slice(column, column + side)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where the total of half-precision products is wider than they are."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total.add_(a @ b)


def _total(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


@torch.library.custom_op(
    "densessl::propagate",
    mutates_args=(),
    schema="(Tensor unit, Tensor values, float gamma, bool triton=False) -> Tensor",
)
def propagate(unit: Tensor, values: Tensor, gamma: float, triton: bool = False) -> Tensor:
    """``sum_j max(<u_i, u_j>, 0) ** gamma v_j`` in memory that grows with the number of cells; differentiable once.

    Args:
        unit: Tokens of unit length, ``(B, N, C)``.
        values: Values to sum, ``(B, N, D)``, in the same dtype.
        gamma: Exponent, above 0.
        triton: Whether to use the Triton kernels, on a CUDA device and not in float64; otherwise tiles are used.

    Returns:
        Sums ``(B, N, D)`` in the same dtype.
    """
    if triton:
        from densessl.propagation._triton import propagated  # imports triton, which some platforms lack

        return propagated(unit, values, gamma)
    out = _total(values)
    with torch.autocast(unit.device.type, enabled=False):
        for images, row, column in _tiles(unit):
            weights = power(unit[images, row] @ unit[images, column].mT, gamma)
            _add_product(out[images, row], weights, values[images, column])
            if row != column:
                _add_product(out[images, column], weights.mT, values[images, row])
    return out.to(values.dtype)


@propagate.register_fake
def _(unit: Tensor, values: Tensor, gamma: float, triton: bool = False) -> Tensor:
    return values.new_empty(values.shape)


@torch.library.custom_op(
    "densessl::propagate_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor unit, Tensor values, float gamma, bool triton) -> (Tensor, Tensor)",
)
def _backward(grad: Tensor, unit: Tensor, values: Tensor, gamma: float, triton: bool) -> tuple[Tensor, Tensor]:
    """Gradients of unit and values."""
    if triton:
        from densessl.propagation._triton import gradients

        return gradients(grad, unit, values, gamma)
    grad_unit, grad_values = _total(unit), _total(values)
    with torch.autocast(unit.device.type, enabled=False):
        for images, row, column in _tiles(unit):
            u, v, g = unit[images], values[images], grad[images]
            cosine = u[:, row] @ u[:, column].mT
            weights = power(cosine, gamma)
            # The cosine of i and j weighs v_j in row i and v_i in row j.
            pull = (g[:, row] @ v[:, column].mT).baddbmm_(v[:, row], g[:, column].mT).mul_(_slope(cosine, gamma))
            _add_product(grad_values[images, row], weights, g[:, column])
            _add_product(grad_unit[images, row], pull, u[:, column])
            if row != column:
                _add_product(grad_values[images, column], weights.mT, g[:, row])
                _add_product(grad_unit[images, column], pull.mT, u[:, row])
    return grad_unit.to(unit.dtype), grad_values.to(values.dtype)


@_backward.register_fake
def _(grad: Tensor, unit: Tensor, values: Tensor, gamma: float, triton: bool) -> tuple[Tensor, Tensor]:
    return unit.new_empty(unit.shape), values.new_empty(values.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.settings = inputs[2:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    return *_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings), None, None


propagate.register_autograd(_gradients, setup_context=_save)
