"""The propagation module's sum and its gradients as Triton kernels: no weight leaves the chip.

Each program makes one block of rows of the result and walks over all columns. As ``s(x_i, x_j)`` is symmetric, that
serves the gradients too, and nothing is added up across programs: the same input gives the same bits.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Blocks(NamedTuple):
    """How a kernel cuts its work.

    Cells in a block of rows and in a block of columns; channels that are read at once; channels up to which a block of
    rows stays on the chip; warps; stages of the pipeline.
    """

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


# Blocks of the sum and of unit's gradient. With Triton's compiler they keep to the shared memory named, and with 256
# channels spill no register (Triton 3.9, compute capability 8.0, 9.0, 12.0). They were tested and timed on one H100
# (docs/performance.md); no other sizes were tried there, so none is tuned.
_HALF_160K = Blocks(128, 64, 256, 8, 2), Blocks(64, 32, 256, 8, 2)
_HALF_99K = Blocks(64, 32, 256, 4, 2), Blocks(64, 64, 64, 8, 3)
_HALF_WIDE = Blocks(64, 32, 64, 4, 2), Blocks(64, 32, 64, 4, 2)  # Triton 3.2 fails on others here
_TF32 = Blocks(64, 32, 32, 8, 3), Blocks(64, 32, 32, 8, 3)
_IEEE = Blocks(64, 32, 32, 8, 3), Blocks(32, 16, 16, 8, 2)
_MOST_OUT = 256  # channels of the result that one program makes; for more, other programs compute the weights again


@triton.jit
def _tile(start, cell, channel, count, width):
    """Loads a block of a contiguous ``(count, width)`` array; 0 outside it."""
    inside = (cell < count)[:, None] & (channel < width)[None, :]
    return tl.load(start + cell[:, None] * width + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _store(start, tile, cell, channel, count, width):
    inside = (cell < count)[:, None] & (channel < width)[None, :]
    tl.store(start + cell[:, None] * width + channel[None, :], tile.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _products(a, b, row, column, count, width, CHANNELS: tl.constexpr, PRECISION: tl.constexpr):
    """``<a_i, b_j>`` of a block of rows and one of columns, some channels at a time."""
    channel = tl.arange(0, CHANNELS)
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for first in range(0, width, CHANNELS):
        left, right = _tile(a, row, first + channel, count, width), _tile(b, column, first + channel, count, width)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    return total


@triton.jit
def _power(cosine, GAMMA: tl.constexpr):
    """As ``densessl.propagation._blockwise.power``."""
    positive = tl.where(cosine < 0, 0.0, cosine)  # a NaN stays one
    if GAMMA == 2.0:
        weight = positive * positive
    elif GAMMA == 1.0:
        weight = positive
    elif GAMMA < 1.0:
        weight = tl.exp2(GAMMA * tl.log2(positive + 1e-6))
    else:
        weight = tl.exp2(GAMMA * tl.log2(positive))
    return weight


@triton.jit
def _slope(cosine, GAMMA: tl.constexpr):
    """As ``densessl.propagation._blockwise._slope``."""
    positive = tl.where(cosine < 0, 0.0, cosine)
    if GAMMA == 2.0:
        rise = 2 * positive
    elif GAMMA > 1.0:
        rise = GAMMA * tl.exp2((GAMMA - 1.0) * tl.log2(positive))
    elif GAMMA == 1.0:
        rise = tl.where(cosine < 0, 0.0, 1.0)
    else:
        rise = tl.where(cosine < 0, 0.0, GAMMA * tl.exp2((GAMMA - 1.0) * tl.log2(positive + 1e-6)))
    return rise


@triton.jit
def _sum_kernel(
    unit, values, out, count, width, depth,
    GAMMA: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PART: tl.constexpr, OUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``sum_j max(<u_i, u_j>, 0) ** gamma v_j``, OUT channels of it."""
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    some, channel = tl.program_id(1) * OUT + tl.arange(0, OUT), tl.arange(0, PART)
    unit += image * count * width
    values += image * count * depth
    if WHOLE:
        u_i = _tile(unit, row, channel, count, width)
    total = tl.zeros((ROWS, OUT), tl.float32)
    for first in range(0, count, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        if WHOLE:
            cosine = tl.dot(u_i, tl.trans(_tile(unit, column, channel, count, width)), input_precision=PRECISION)
        else:
            cosine = _products(unit, unit, row, column, count, width, PART, PRECISION)
        v_j = _tile(values, column, some, count, depth)
        total = tl.dot(_power(cosine, GAMMA).to(v_j.dtype), v_j, total, input_precision=PRECISION)
    _store(out + image * count * depth, total, row, some, count, depth)


@triton.jit
def _slope_kernel(
    grad, unit, values, out, count, width, depth,
    GAMMA: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PART: tl.constexpr, OUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``sum_j slope(<u_i, u_j>) (<g_i, v_j> + <v_i, g_j>) u_j``, OUT channels of it."""
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    some, channel = tl.program_id(1) * OUT + tl.arange(0, OUT), tl.arange(0, PART)
    unit += image * count * width
    values += image * count * depth
    grad += image * count * depth
    if WHOLE:
        u_i = _tile(unit, row, some, count, width)
        v_i, g_i = _tile(values, row, channel, count, depth), _tile(grad, row, channel, count, depth)
    total = tl.zeros((ROWS, OUT), tl.float32)
    for first in range(0, count, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        u_j = _tile(unit, column, some, count, width)
        if WHOLE:
            pull = tl.dot(g_i, tl.trans(_tile(values, column, channel, count, depth)), input_precision=PRECISION)
            g_j = _tile(grad, column, channel, count, depth)
            pull = tl.dot(v_i, tl.trans(g_j), pull, input_precision=PRECISION)
            cosine = tl.dot(u_i, tl.trans(u_j), input_precision=PRECISION)
        else:
            pull = _products(grad, values, row, column, count, depth, PART, PRECISION)
            pull += _products(values, grad, row, column, count, depth, PART, PRECISION)
            cosine = _products(unit, unit, row, column, count, width, PART, PRECISION)
        pull *= _slope(cosine, GAMMA)
        total = tl.dot(pull.to(u_j.dtype), u_j, total, input_precision=PRECISION)
    _store(out + image * count * width, total, row, some, count, width)


def propagated(unit: Tensor, values: Tensor, gamma: float) -> Tensor:
    """``sum_j max(<u_i, u_j>, 0) ** gamma v_j``.

    Args:
        unit: Tokens of unit length, ``(B, N, C)``, float32, bfloat16 or float16. float32 products run in TF32 if
            torch's do.
        values: Values to sum, ``(B, N, D)``, in the same dtype.
        gamma: Exponent, above 0.

    Returns:
        Sums ``(B, N, D)`` in the same dtype.
    """
    unit, values = unit.contiguous(), values.contiguous()
    batch, count, width, depth = *unit.shape, values.shape[-1]
    precision = _precision(unit.dtype)
    blocks, _ = blocks_of(unit.dtype, max(width, depth), precision, _shared_memory(unit.device))
    out = torch.empty_like(values)
    with torch.cuda.device_of(unit):
        _sum_kernel[_grid(blocks, batch, count, depth)](
            *(unit, values, out, count, width, depth), gamma, precision, **sizes(blocks, width, depth)
        )
    return out


def gradients(grad: Tensor, unit: Tensor, values: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Gradients of unit and values, from the gradient of the result of ``propagated``.

    Args:
        grad: Gradient of the result, ``(B, N, D)``, in the dtype of the others.
        unit: Tokens of unit length, ``(B, N, C)``.
        values: Values that were summed, ``(B, N, D)``.
        gamma: Exponent, above 0.

    Returns:
        Gradients ``(B, N, C)`` of unit and ``(B, N, D)`` of values.
    """
    grad, unit, values = grad.contiguous(), unit.contiguous(), values.contiguous()
    batch, count, width, depth = *unit.shape, values.shape[-1]
    precision = _precision(unit.dtype)
    _, blocks = blocks_of(unit.dtype, max(width, depth), precision, _shared_memory(unit.device))
    out = torch.empty_like(unit)
    with torch.cuda.device_of(unit):
        _slope_kernel[_grid(blocks, batch, count, width)](
            *(grad, unit, values, out, count, width, depth), gamma, precision, **sizes(blocks, depth, width)
        )
    return out, propagated(unit, grad, gamma)  # the weights are symmetric


def sizes(blocks: Blocks, inner: int, out: int) -> dict[str, Any]:
    """What a kernel is compiled for.

    Args:
        blocks: How the kernel cuts its work.
        inner: Number of channels that the cosines, or the other products of the gradient, run over.
        out: Number of channels of the result.

    Returns:
        Its compile-time arguments but GAMMA and PRECISION.
    """
    whole = max(inner, out) <= blocks.channels
    return {
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "PART": _padded(inner) if whole else blocks.channels,
        "OUT": min(_MOST_OUT, _padded(out)),
        "WHOLE": whole,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _padded(channels: int) -> int:
    """Blocks have powers of two, and those of a product at least 16."""
    return max(16, triton.next_power_of_2(channels))


def _grid(blocks: Blocks, batch: int, count: int, out: int) -> tuple[int, int]:
    return batch * triton.cdiv(count, blocks.rows), triton.cdiv(out, min(_MOST_OUT, _padded(out)))


def blocks_of(dtype: torch.dtype, channels: int, precision: str, shared: int) -> tuple[Blocks, Blocks]:
    """Blocks of the sum and of unit's gradient, on a device that gives a block so many bytes of shared memory."""
    if dtype == torch.float32:
        return _TF32 if precision == "tf32" else _IEEE
    if channels > 256:
        return _HALF_WIDE
    return _HALF_160K if shared >= 160_000 else _HALF_99K


def _precision(dtype: torch.dtype) -> str:
    """Precision of float32 products, by torch's own setting; half precision has only one."""
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 the older flag may refuse to be read.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if dtype != torch.float32 or tf32 else "ieee"


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may ask for."""
    if device.type != "cuda":  # Triton's interpreter
        return 0
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
