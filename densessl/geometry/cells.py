"""Where a map's cells lie in the source image, and how large they are there."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._tensors import check_tensor
from densessl.geometry._points import Size, checked, checked_size, locate, project, unit_grid


def cell_centers(coords: Tensor, size: Size) -> Tensor:
    """Where the centres of a map's cells lie in the source image.

    Args:
        coords: Coords ``(B, 3, 3)`` or dense ``(B, 2, H, W)`` of the view.
        size: Height and width ``(h, w)`` of the feature map in cells. The size of the view is not needed.

    Returns:
        Centres ``(B, N, 2)`` with N = h * w in row-major order: x and y in the source's unit square, NaN where the
        coords are unknown.

    Raises:
        ValueError: If ``coords`` has another shape or dtype, or a side of ``size`` is below 1.

    Examples:
        >>> cell_centers(torch.eye(3)[None], (1, 2))
        tensor([[[0.2500, 0.5000],
                 [0.7500, 0.5000]]])
    """
    coords = checked(coords, "coords")
    return locate(coords, *unit_grid(checked_size(size, "size"), coords))


def cell_diagonal(coords: Tensor, size: Size, source_size: Tensor | None = None) -> Tensor:
    """Length of each cell's diagonal in the source image.

    The length is ``sqrt(|d/dx|^2 + |d/dy|^2)`` of the cell's Jacobian. For crops and flips this is ``hypot(bin width,
    bin height)``, the same for every cell, as in the published code. For dense coords the derivative is the difference
    across the cell, or across the half of it that is known.

    Args:
        coords: Coords ``(B, 3, 3)`` or dense ``(B, 2, H, W)`` of the view.
        size: Height and width ``(h, w)`` of the feature map.
        source_size: Height and width of the source image in pixels, int64 ``(B, 2)``. If given, the result is in source
            pixels; otherwise it is in units of the unit square's sides.

    Returns:
        Diagonals ``(B, N)`` with N = h * w in row-major order.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> cell_diagonal(torch.eye(3)[None], (1, 2))
        tensor([[1.1180, 1.1180]])
    """
    return measured_cells(coords, size, source_size)[1]


def measured_cells(coords: Tensor, size: Size, source_size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Centres and diagonals of a map's cells, in one pass.

    Args:
        coords: Coords as in ``cell_diagonal``.
        size: Size as in ``cell_diagonal``.
        source_size: Size as in ``cell_diagonal``; it applies to the diagonals alone.

    Returns:
        Centres ``(B, N, 2)`` in the source's unit square, and diagonals ``(B, N)``.

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
        source_size: Height and width in pixels, ``(B, 2)``.
        coords: Any coords of the batch; they give the device and the dtype.

    Returns:
        Factors for x and y, ``(B, 1, 2)``: width and height.

    Raises:
        ValueError: If a shape or device is not as described.

    Examples:
        >>> pixel_scale(torch.tensor([[60, 80]]), torch.eye(3)[None])
        tensor([[[80., 60.]]])
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
        coords: Coords ``(B, 3, 3)`` or dense ``(B, 2, H, W)`` of the view.
        size: Height and width ``(h, w)`` of the feature map.

    Returns:
        Boolean tensor ``(B, N)``, True for the cells inside; False where the position is unknown (NaN).

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> left = coords_from_boxes(torch.tensor([[-0.5, 0.0, 0.5, 1.0]]))
        >>> inside(left, (1, 2))
        tensor([[False,  True]])
    """
    return in_source(cell_centers(coords, size))


def in_source(centers: Tensor) -> Tensor:
    """Which points (B, N, 2) lie in the source's unit square, bool (B, N)."""
    x, y = centers.unbind(-1)
    return (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
