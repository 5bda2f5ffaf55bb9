"""Masks that move as the coords do: each pixel takes the label at its centre, whatever the label's size.

torchvision moves masks too, but when it resizes it takes the corner of a pixel for its centre, and it resamples in
float32, which rounds labels above 2**24. Here a mask goes through the same maps as the coords, in float64, and its
labels are only picked, never computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.coords._functionals import FOLLOWED, CanvasSize, Matrix, Move


class MovingMask(tv_tensors.Mask):
    """A mask ``(H, W)`` or ``(1, H, W)`` that follows geometric transforms exactly; 0 where a view shows nothing.

    It keeps its type through the user's own arithmetic (``mask > 3``) as long as it keeps its size, so that later steps
    still move it.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        first = next((arg for arg in args if isinstance(arg, cls)), None)
        if type(out) is Tensor and first is not None and func is not Tensor.as_subclass:
            with torch._C.DisableTorchFunctionSubclass():
                if out.ndim == first.ndim and out.shape[-2:] == first.shape[-2:]:
                    return out.as_subclass(cls)
        return out


def _pick(mask: MovingMask, rows: Tensor, columns: Tensor) -> Tensor:
    """Labels at pixel indices, broadcast against each other; 0 where an index lies outside."""
    plain = mask.as_subclass(Tensor)
    height, width = plain.shape[-2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    # Unsigned types wider than a byte can be copied but not indexed; their bits can be indexed.
    bits = plain.view(_SIGNED[plain.dtype]) if plain.dtype in _SIGNED else plain
    picked = bits[..., rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    picked = torch.where(inside, picked, torch.zeros((), dtype=picked.dtype))
    return picked.view(plain.dtype)


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _moved(mask: MovingMask, matrix: Matrix, canvas: CanvasSize) -> MovingMask:
    rows = torch.arange(canvas[0], dtype=torch.float64)[:, None] + 0.5
    columns = torch.arange(canvas[1], dtype=torch.float64)[None] + 0.5
    (a, b, c), (d, e, f), (g, h, i) = matrix
    if b == d == g == h == 0:
        x, y = (a * columns + c) / i, (e * rows + f) / i
    else:
        weight = g * columns + h * rows + i
        x, y = (a * columns + b * rows + c) / weight, (d * columns + e * rows + f) / weight
    return _at(mask, x, y)


def _at(mask: MovingMask, x: Tensor, y: Tensor) -> MovingMask:
    """Labels at positions in pixels. A position a rounding error below a pixel's edge belongs to the pixel after it."""
    rows, columns = ((p + 1e-6).floor().nan_to_num(-1.0, -1.0, -1.0).clamp(-1, 2**40).long() for p in (y, x))
    return tv_tensors.wrap(_pick(mask, rows, columns), like=mask)


def _follow(move: Callable[..., Move]) -> Callable[..., MovingMask]:
    def kernel(mask: MovingMask, *args: Any, **kwargs: Any) -> MovingMask:
        matrix, canvas = move((mask.shape[-2], mask.shape[-1]), *args, **kwargs)
        return _moved(mask, matrix, canvas)

    return kernel


def _pad(mask: MovingMask, padding: int | Sequence[int], **kwargs: Any) -> MovingMask:
    """Padding shows labels where it shows pixels of the image: mirrored or repeated, else 0."""
    height, width = mask.shape[-2:]
    matrix, canvas = FOLLOWED[F.pad]((height, width), padding)
    rows = torch.arange(canvas[0]) + int(matrix[1][2])
    columns = torch.arange(canvas[1]) + int(matrix[0][2])
    mode = kwargs.get("padding_mode", "constant")
    if mode != "constant":
        rows, columns = _folded(rows, height, mode), _folded(columns, width, mode)
    return tv_tensors.wrap(_pick(mask, rows[:, None], columns[None]), like=mask)


def _folded(index: Tensor, length: int, mode: str) -> Tensor:
    if mode == "edge" or length == 1:
        return index.clamp(0, length - 1)
    if mode == "symmetric":
        turned = index.remainder(2 * length)
        return torch.where(turned < length, turned, 2 * length - 1 - turned)
    turned = index.remainder(2 * length - 2)
    return torch.where(turned < length, turned, 2 * length - 2 - turned)


def _elastic(mask: MovingMask, displacement: Tensor, **_: Any) -> MovingMask:
    """displacement: (1, H, W, 2), in half sides of the image, added to where each pixel looks."""
    height, width = mask.shape[-2:]
    x, y = (0.5 * displacement[0].double().cpu()).unbind(-1)
    columns = torch.arange(width, dtype=torch.float64)[None] + 0.5 + x * width
    rows = torch.arange(height, dtype=torch.float64)[:, None] + 0.5 + y * height
    return _at(mask, columns, rows)


for _functional, _move in FOLLOWED.items():
    F.register_kernel(_functional, MovingMask)(_pad if _functional is F.pad else _follow(_move))
F.register_kernel(F.elastic, MovingMask)(_elastic)
