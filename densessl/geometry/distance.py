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

    The paper says "normalised by the diagonal of a feature-map bin"; which of the two bins, only the published code
    says: the larger one, here ``unit="max"``. Distances there are per axis, each in 0..1 (``source_size=None``).

    Args:
        coords_q: Tensor ``(B, 3, 3)`` or ``(B, 2, H, W)``, coords of the query view.
        coords_k: The same of the key view.
        size_q: Tensor ``(h, w)`` of the query map.
        size_k: The same of the key map; None: as ``size_q``.
        unit: The diagonal that a pair is measured in: that of its larger (``"max"``) or smaller (``"min"``) cell, or
            always of the ``"query"`` or the ``"key"`` cell.
        source_size: Tensor of int64, ``(B, 2)``, height and width of the source; then distances are isotropic, in
            pixels, else each axis counts in units of the image's own side.

    Returns:
        Tensor ``(B, Nq, Nk)``; NaN where either cell's position is unknown.

    Raises:
        ValueError: If a shape, dtype, device or a unit is not as described.
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
        centers_q: Tensor ``(B, Nq, 2)``, from ``cell_centers``, in any unit of length.
        diagonal_q: Tensor ``(B, Nq)``, from ``cell_diagonal``, in the same unit.
        centers_k: Tensor ``(B, Nk, 2)``.
        diagonal_k: Tensor ``(B, Nk)``.
        unit: As in ``cell_distance``.

    Returns:
        Tensor ``(B, Nq, Nk)``.

    Raises:
        ValueError: On an unknown unit.
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
        dy: The same along y.
        diagonal_q: Of the query cell, broadcastable.
        diagonal_k: Of the key cell.
        unit: As in ``cell_distance``.

    Returns:
        The shape that all of them broadcast to.

    Raises:
        ValueError: On an unknown unit.
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
