"""How far apart the cells of two maps are, in cell diagonals."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from densessl.geometry._points import Size, check_pair, checked_size
from densessl.geometry.cells import measured_cells, pixel_scale

Unit = Literal["max", "min", "query", "key"]
UNITS = ("max", "min", "query", "key")


def cell_distance(
    coords_q: Tensor,
    coords_k: Tensor,
    size_q: Size,
    size_k: Size | None = None,
    *,
    unit: Unit = "max",
    source_size: Tensor | None = None,
) -> Tensor:
    """Distance between all cells of two maps, in cell diagonals (PixPro, Eq. 1).

    The paper says "normalised by the diagonal of a feature-map bin" but not which of the two bins. The published code
    takes the larger one, here ``unit="max"``, and measures distances per axis, each in 0..1 (``source_size=None``).

    Args:
        coords_q: Coords ``(B, 3, 3)`` or ``(B, 2, H, W)`` of the query view.
        coords_k: Coords of the key view, in either form.
        size_q: Height and width ``(h, w)`` of the query map.
        size_k: Height and width of the key map; None means those of the query map.
        unit: Which diagonal a pair is measured in: that of its larger (``"max"``) or smaller (``"min"``) cell, or
            always that of the ``"query"`` or the ``"key"`` cell.
        source_size: Height and width of the source image in pixels, int64 ``(B, 2)``. If given, distances are
            isotropic, in pixels; otherwise each axis counts in units of the image's own side.

    Returns:
        Distances ``(B, Nq, Nk)``; NaN where the position of either cell is unknown.

    Raises:
        ValueError: If a shape, dtype, device or a unit is not as described.

    Examples:
        >>> whole = torch.eye(3)[None]
        >>> cell_distance(whole, whole, (1, 2))
        tensor([[[0.0000, 0.4472],
                 [0.4472, 0.0000]]])
    """
    size_q = checked_size(size_q, "size_q")
    size_k = size_q if size_k is None else checked_size(size_k, "size_k")
    check_pair(coords_q, coords_k)
    return pair_distance(
        *_positions(coords_q, size_q, source_size), *_positions(coords_k, size_k, source_size), unit=unit
    )


def _positions(coords: Tensor, size: Size, source_size: Tensor | None) -> tuple[Tensor, Tensor]:
    centers, diagonal = measured_cells(coords, size, source_size)
    return centers if source_size is None else centers * pixel_scale(source_size, centers), diagonal


def pair_distance(
    centers_q: Tensor, diagonal_q: Tensor, centers_k: Tensor, diagonal_k: Tensor, *, unit: Unit = "max"
) -> Tensor:
    """Distances of all pairs of two maps, from cell centres and diagonals.

    Args:
        centers_q: Centres of the query cells ``(B, Nq, 2)`` from ``cell_centers``, in any unit of length.
        diagonal_q: Diagonals of the query cells ``(B, Nq)`` from ``cell_diagonal``, in the same unit.
        centers_k: Centres of the key cells ``(B, Nk, 2)``.
        diagonal_k: Diagonals of the key cells ``(B, Nk)``.
        unit: Which diagonal counts, as in ``cell_distance``.

    Returns:
        Distances ``(B, Nq, Nk)``.

    Raises:
        ValueError: If the unit is unknown.

    Examples:
        >>> centers, diagonal = torch.tensor([[[0.25, 0.5], [0.75, 0.5]]]), torch.ones(1, 2)
        >>> pair_distance(centers, diagonal, centers, diagonal)
        tensor([[[0.0000, 0.5000],
                 [0.5000, 0.0000]]])
    """
    (xq, yq), (xk, yk) = (centers.unbind(-1) for centers in (centers_q, centers_k))
    # By subtraction, not by torch.cdist: its matrix product loses digits and is not symmetric in its arguments.
    # The keys' coordinates without gaps between them: the table is filled along them.
    return offset_distance(
        xq[:, :, None] - xk.contiguous()[:, None, :],
        yq[:, :, None] - yk.contiguous()[:, None, :],
        diagonal_q[:, :, None],
        diagonal_k[:, None, :],
        unit=unit,
    )


def offset_distance(dx: Tensor, dy: Tensor, diagonal_q: Tensor, diagonal_k: Tensor, *, unit: Unit = "max") -> Tensor:
    """Distance of an offset in cell diagonals, element by element: the one place where a distance is computed.

    Element-wise, so that a pair has the same distance, to the last bit, in a table of all pairs and in a list of some.

    Args:
        dx: Offset from cell to cell along x, any shape.
        dy: Offset from cell to cell along y, in the same shape.
        diagonal_q: Diagonal of the query cell, in a shape that broadcasts to that of ``dx``.
        diagonal_k: Diagonal of the key cell, in such a shape as well.
        unit: Which diagonal counts, as in ``cell_distance``.

    Returns:
        Distances in the shape that all arguments broadcast to.

    Raises:
        ValueError: If the unit is unknown.
    """
    if unit not in UNITS:
        raise ValueError(f"unit: expected one of {', '.join(map(repr, UNITS))}, got {unit!r}")
    if unit == "max":
        diagonal = torch.maximum(diagonal_q, diagonal_k)
    elif unit == "min":
        diagonal = torch.minimum(diagonal_q, diagonal_k)
    else:
        diagonal = diagonal_q if unit == "query" else diagonal_k
    return (dx.square() + dy.square()).sqrt() / diagonal
