"""Checks of the matrices of cameras, and of what holds positions."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._tensors import check_tensor


def refuse_half(values: Tensor, name: str, expected: str) -> None:
    """Positions in half precision are up to pixels wrong: 8 bits do not tell 1,001 from 1,004."""
    check_tensor(values, name, f"float32 or float64 {expected}")
    if values.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: expected float32 or float64 {expected}, got {values.dtype}")


def matrix_of(matrix: Tensor, name: str, side: int, like: Tensor) -> Tensor:
    """(B or 1, side, side), float64."""
    refuse_half(matrix, name, f"({side}, {side}) or (B, {side}, {side})")
    batched = matrix if matrix.ndim == 3 else matrix[None]
    if tuple(batched.shape) not in ((1, side, side), (len(like), side, side)) or not matrix.is_floating_point():
        raise ValueError(
            f"{name}: expected floating point ({side}, {side}) or (B, {side}, {side}) with B = {len(like)}, "
            f"got {matrix.dtype} {tuple(matrix.shape)}"
        )
    if matrix.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} as the depth, got {matrix.device}")
    return batched.to(like.dtype)


def check_camera(matrix: Tensor, name: str) -> None:
    """On a CPU also the values: a transposed matrix is an easy mistake, and gives coords all the same."""
    if matrix.device.type != "cpu" or torch.compiler.is_compiling():
        return
    last = torch.eye(matrix.shape[-1], dtype=matrix.dtype)[-1]
    known = matrix[matrix.isfinite().all((1, 2))]  # NaN says that a camera is not known
    if not torch.equal(known[:, -1], last.expand(len(known), -1)) or bool((torch.linalg.det(known) == 0).any()):
        raise ValueError(
            f"{name}: expected an invertible matrix whose last row is {' '.join(f'{x:.0f}' for x in last.tolist())}, "
            f"got {matrix.tolist()}"
        )
