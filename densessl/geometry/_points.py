"""Which point of the source image a point of a view shows, by either kind of coords; and what coords must look like."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._tensors import check_tensor

Size = tuple[int, int] | torch.Size


def is_dense(coords: Tensor) -> bool:
    """Whether coords are dense, ``(B, 2, H, W)``, and not homographies, ``(B, 3, 3)``.

    Args:
        coords: Coords of either kind, batched.

    Raises:
        ValueError: If the shape or the dtype is of neither kind.

    Examples:
        >>> is_dense(torch.eye(3)[None]), is_dense(torch.rand(1, 2, 60, 80))
        (False, True)
    """
    return checked(coords, "coords").ndim == 4


def checked(coords: Tensor, name: str) -> Tensor:
    """Coords of either kind as a plain tensor; ValueError, with the argument's name, on others."""
    check_tensor(coords, name, "homographies (B, 3, 3) or dense coords (B, 2, H, W)")
    homography = coords.ndim == 3 and tuple(coords.shape[-2:]) == (3, 3)
    dense = coords.ndim == 4 and coords.shape[1] == 2
    if not (homography or dense):
        raise ValueError(
            f"{name}: expected homographies (B, 3, 3) or dense coords (B, 2, H, W), got {tuple(coords.shape)}"
        )
    check_precision(coords, name)
    return coords if type(coords) is Tensor else coords.as_subclass(Tensor)


def check_precision(coords: Tensor, name: str) -> None:
    """Raises ValueError, with the argument's name, unless coords are float32 or float64.

    Half precision cannot be widened again: in bfloat16 coords are a whole cell wrong at 28x28.
    """
    check_tensor(coords, name, "a floating point tensor, float32 or float64")
    if coords.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: expected a floating point tensor, float32 or float64, got {coords.dtype}")


def checked_size(size: Size, name: str) -> tuple[int, int]:
    """Height and width; ValueError, with the argument's name, on others."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"{name}: expected (height, width), both at least 1, got {size}")
    if any(isinstance(side, (float, str, bool, type(None))) or side < 1 for side in size):
        raise ValueError(f"{name}: expected (height, width), both at least 1, got {tuple(size)}")
    return size[0], size[1]


def check_pair(first: Tensor, second: Tensor, names: tuple[str, str] = ("coords_q", "coords_k")) -> None:
    """Raises ValueError, with the arguments' names, unless both are coords of one batch, dtype and device.

    Dense coords that hold pixels are refused as well, on the CPU.
    """
    first, second = checked(first, names[0]), checked(second, names[1])
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"{names[1]}: expected as many images as {names[0]}, B = {first.shape[0]}, got {second.shape[0]}"
        )
    if first.dtype != second.dtype:
        raise ValueError(f"{names[1]}: expected {first.dtype} as {names[0]}, got {second.dtype}")
    if first.device != second.device:
        raise ValueError(f"{names[1]}: expected a tensor on {first.device} as {names[0]}, got {second.device}")
    refuse_pixels(first, names[0])
    refuse_pixels(second, names[1])


_LOOKED_AT = 16  # places along each side of dense coords whose values are looked at


def refuse_pixels(coords: Tensor, name: str) -> None:
    """Raises ValueError, with the argument's name, on dense coords most of which lie far outside a unit square.

    Such coords are pixels or a flow, and would silently match nothing. Only a grid of places is checked, and only on
    the CPU: reading a value back would stall another device.
    """
    if coords.ndim != 4 or coords.device.type != "cpu" or torch.compiler.is_compiling():
        return
    steps = [max(1, side // _LOOKED_AT) for side in coords.shape[2:]]
    places = coords.detach()[:, :, :: steps[0], :: steps[1]]
    known = places.isfinite()
    beyond = known & ((places < -1) | (places > 2))
    if 2 * int(beyond.sum()) > int(known.sum()):
        seen = places[known]
        raise ValueError(
            f"{name}: expected positions in the source's unit square, 0..1, NaN where there is none, got mostly values "
            f"far outside, from {float(seen.min()):.4g} to {float(seen.max()):.4g}; of pixels or a flow, "
            "coords_from_flow makes coords"
        )


def unit_grid(size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of all cell centres in the unit square, each (N,), row-major."""
    h, w = size
    y = (torch.arange(h, device=like.device, dtype=like.dtype) + 0.5) / h
    x = (torch.arange(w, device=like.device, dtype=like.dtype) + 0.5) / w
    return x.repeat(h), y.repeat_interleave(w)


def project(matrix: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, 3) applied to points (N,) or (B, N): image x, y and the homogeneous weight, each (B, N)."""
    m = matrix.flatten(1)[:, :, None]
    weight = m[:, 6] * x + m[:, 7] * y + m[:, 8]
    # A point at or behind the horizon has no image: NaN, which matches nothing.
    weight = torch.where(weight > 0, weight, torch.nan)
    return (m[:, 0] * x + m[:, 1] * y + m[:, 2]) / weight, (m[:, 3] * x + m[:, 4] * y + m[:, 5]) / weight, weight


def sample_dense(dense: Tensor, points: Tensor) -> Tensor:
    """Reads dense coords between their pixels.

    Between pixel centres the coords are interpolated linearly. In the half pixel between the outermost centres and the
    edge they are continued linearly, so that coords of an affine view stay exact up to the edge. The result is NaN
    beyond the edges, and where a neighbour with a weight is NaN.

    Args:
        dense: Dense coords ``(B, 2, H, W)``.
        points: Points ``(B, N, 2)``, x and y in the view's unit square.

    Returns:
        Points ``(B, N, 2)``, x and y in the source's unit square.

    Examples:
        >>> dense = DenseCoords(canvas_size=(60, 80)).as_subclass(torch.Tensor)[None]
        >>> sample_dense(dense, torch.tensor([[[0.25, 0.5]]]))
        tensor([[[0.2500, 0.5000]]])
    """
    h, w = dense.shape[-2:]
    x, y = points.unbind(-1)
    outside = ~((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1))
    px = _snapped(torch.where(outside, 0.0, x) * w - 0.5)
    py = _snapped(torch.where(outside, 0.0, y) * h - 0.5)
    x0 = px.floor().clamp(0, max(w - 2, 0))
    y0 = py.floor().clamp(0, max(h - 2, 0))
    # A one-pixel side has nothing to continue from: its value holds over the whole side.
    tx = (px - x0 if w > 1 else torch.zeros_like(px))[:, None]
    ty = (py - y0 if h > 1 else torch.zeros_like(py))[:, None]
    flat = dense.flatten(2)

    def corner(dx: int, dy: int, weight: Tensor) -> Tensor:
        row = (y0.long() + dy).clamp(max=h - 1)
        index = row * w + (x0.long() + dx).clamp(max=w - 1)
        value = flat.gather(2, index[:, None].expand(-1, 2, -1))
        return torch.where(weight == 0, 0.0, weight * value)  # 0 * NaN must not spread

    out = (
        corner(0, 0, (1 - tx) * (1 - ty))
        + corner(1, 0, tx * (1 - ty))
        + corner(0, 1, (1 - tx) * ty)
        + corner(1, 1, tx * ty)
    )
    return torch.where(outside[:, None], torch.nan, out).transpose(1, 2)


def _snapped(position: Tensor) -> Tensor:
    """A float32 pixel centre is some 1e-5 off its integer: without this its unknown neighbour would get a weight."""
    nearest = position.round()
    return torch.where((position - nearest).abs() < 1e-3, nearest, position)


def locate(coords: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Source positions (B, N, 2) of view positions x, y, each (N,) in the view's unit square."""
    if coords.ndim == 4:
        points = torch.stack([x, y], -1).expand(coords.shape[0], -1, -1)
        return sample_dense(coords, points)
    px, py, _ = project(coords, x, y)
    return torch.stack([px, py], -1)
