"""Where a map's cells lie in the source image, and how large they are there."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._tensors import check_tensor
from densessl.geometry._points import Size, checked, checked_size, locate, project, unit_grid


def cell_centers(coords: Tensor, size: Size) -> Tensor:
    """Where the centres of a map's cells lie in the source image.

    Args:
        coords: Tensor ``(B, 3, 3)`` or dense ``(B, 2, H, W)``.
        size: Tensor ``(h, w)`` of the feature map; any size, the view's size is not needed.

    Returns:
        Tensor ``(B, N, 2)``, N = h * w row-major; xy in the source's unit square; NaN where the coords are unknown.

    Raises:
        ValueError: On another shape or dtype of ``coords``, or a size below 1.
    """
    coords = checked(coords, "coords")
    return locate(coords, *unit_grid(checked_size(size, "size"), coords))


def cell_diagonal(coords: Tensor, size: Size, source_size: Tensor | None = None) -> Tensor:
    """Length of each cell's diagonal in the source image.

    ``sqrt(|d/dx|^2 + |d/dy|^2)`` of the cell's Jacobian: for crops and flips ``hypot(bin width, bin height)``, the
    value of the published code, the same for every cell. For dense coords the derivative is the difference across
    the cell, or across the half of it that is known.

    Args:
        coords: Tensor ``(B, 3, 3)`` or dense ``(B, 2, H, W)``.
        size: Tensor ``(h, w)`` of the feature map.
        source_size: Tensor of int64, ``(B, 2)``, height and width of the source; then the result is in source pixels,
            else in units of the unit square's sides.

    Returns:
        Tensor ``(B, N)``, N = h * w.

    Raises:
        ValueError: If a shape or dtype is not as described.
    """
    return measured_cells(coords, size, source_size)[1]


def measured_cells(coords: Tensor, size: Size, source_size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Centres and diagonals of a map's cells, in one pass.

    Args:
        coords: As in ``cell_diagonal``.
        size: As there.
        source_size: As there, but for the diagonals alone.

    Returns:
        Tensor ``(B, N, 2)`` in the source's unit square, and ``(B, N)``.

    Raises:
        ValueError: If a shape or dtype is not as described.
    """
    coords = checked(coords, "coords")
    h, w = size = checked_size(size, "size")
    x, y = unit_grid(size, coords)
    if coords.ndim == 4:
        centers = locate(coords, x, y)
        ax, ay = _difference(coords, centers, x, y, 0.5 / w, 0.0).unbind(-1)
        bx, by = _difference(coords, centers, x, y, 0.0, 0.5 / h).unbind(-1)
    else:
        px, py, weight = project(coords, x, y)
        centers = torch.stack([px, py], -1)
        m = coords.flatten(1)[:, :, None]  # d(n / weight) = (dn - position * dweight) / weight
        ax, ay = (m[:, 0] - px * m[:, 6]) / weight / w, (m[:, 3] - py * m[:, 6]) / weight / w
        bx, by = (m[:, 1] - px * m[:, 7]) / weight / h, (m[:, 4] - py * m[:, 7]) / weight / h
    if source_size is not None:
        width, height = pixel_scale(source_size, coords).unbind(-1)
        ax, bx, ay, by = ax * width, bx * width, ay * height, by * height
    return centers, ((ax.square() + ay.square()) + (bx.square() + by.square())).sqrt()


def _difference(coords: Tensor, center: Tensor, x: Tensor, y: Tensor, dx: float, dy: float) -> Tensor:
    after = locate(coords, (x + dx).clamp(max=1.0), (y + dy).clamp(max=1.0))
    before = locate(coords, (x - dx).clamp(min=0.0), (y - dy).clamp(min=0.0))
    both = after - before
    one = torch.where(after.isnan(), 2 * (center - before), 2 * (after - center))
    return torch.where(both.isnan(), one, both)


def pixel_scale(source_size: Tensor, coords: Tensor) -> Tensor:
    """Factors from the unit square to source pixels.

    Args:
        source_size: Tensor ``(B, 2)``, height and width.
        coords: A tensor of the batch; gives device and dtype.

    Returns:
        Tensor ``(B, 1, 2)``, width and height.

    Raises:
        ValueError: If a shape or device is not as described.
    """
    check_tensor(source_size, "source_size", "(B, 2), height and width of each source image")
    if source_size.shape != (coords.shape[0], 2):
        raise ValueError(
            f"source_size: expected (B, 2) = ({coords.shape[0]}, 2), height and width of each source image, "
            f"got {tuple(source_size.shape)}"
        )
    if source_size.device != coords.device:
        raise ValueError(f"source_size: expected a tensor on {coords.device} as coords, got {source_size.device}")
    return source_size.to(coords.dtype).flip(-1)[:, None]


def inside(coords: Tensor, size: Size) -> Tensor:
    """Which cells have their centre inside the source image.

    Args:
        coords: Tensor ``(B, 3, 3)`` or dense ``(B, 2, H, W)``.
        size: Tensor ``(h, w)`` of the feature map.

    Returns:
        Boolean tensor ``(B, N)``; False where the position is unknown (NaN).

    Raises:
        ValueError: If a shape or dtype is not as described.
    """
    return in_source(cell_centers(coords, size))


def in_source(centers: Tensor) -> Tensor:
    """Which points (B, N, 2) lie in the source's unit square, bool (B, N)."""
    x, y = centers.unbind(-1)
    return (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
