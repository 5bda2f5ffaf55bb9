"""Positive pairs from windows: each query cell is compared with the few key cells that can be near enough.

The cells that can match a query cell have their centres in a disc around its own centre. The inverse homography of the
key view takes this disc to a conic in the key map, and the bounding box of a conic has a closed form. This gives one
window of key cells per query cell, O(N) in all. The matcher's distance decides whether the cells of a window do match,
so exactly the pairs of a comparison of all cells are found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from densessl.geometry import Unit, inverse_homography, offset_distance


class Cells(NamedTuple):
    """The cells of a map, in any unit of length.

    Attributes:
        centers: Centres of the cells ``(B, N, 2)``, x and y.
        diagonal: Diagonals of the cells ``(B, N)``.
        allowed: Boolean tensor ``(B, N)``, False for cells that never match.
    """

    centers: Tensor
    diagonal: Tensor
    allowed: Tensor


class Windows(NamedTuple):
    """A rectangle of key cells for every query cell, each int64 ``(B, Nq)``; empty where it cannot match.

    Attributes:
        column: First column.
        row: First row.
        width: Number of columns.
        height: Number of rows.
    """

    column: Tensor
    row: Tensor
    width: Tensor
    height: Tensor


def find_windows(
    query: Cells,
    key: Cells,
    coords_k: Tensor,
    size_k: tuple[int, int],
    scale: Tensor | None,
    threshold: float,
    unit: Unit,
) -> Windows:
    """Windows that hold every pair closer than the threshold.

    Args:
        query: Query cells; their coords may be of either kind.
        key: Key cells.
        coords_k: Homography ``(B, 3, 3)`` of the key view.
        size_k: Height and width ``(h, w)`` of the key map.
        scale: Factors ``(B, 1, 2)`` from the unit square to the cells' unit of length; None if they are the same.
        threshold: Largest distance, in cell diagonals.
        unit: Which diagonal counts, as in ``cell_distance``.

    Returns:
        One window per query cell; the whole map where there is no bound (a disc that reaches the horizon, a singular
        homography).
    """
    h, w = size_k
    # In float64, only the key centres below are rounded, and their error is measured.
    lines = _lines_to_cells(coords_k.double(), size_k, None if scale is None else scale.double())
    key_x, key_y, key_weight = _project(lines, key.centers.double())
    number = torch.arange(h * w, device=key_x.device)
    # A centre in float32 lies slightly beside its cell's: the largest such error widens every window of the image.
    error = torch.maximum((key_x - number % w).abs(), (key_y - number // w).abs())
    slack = torch.where(key.allowed, error, 0.0).amax(1, keepdim=True) + 1e-3

    largest = torch.where(key.allowed, key.diagonal, 0.0).amax(1, keepdim=True).expand_as(query.diagonal)
    reach = {
        "query": query.diagonal,
        "key": largest,
        "max": torch.maximum(query.diagonal, largest),
        "min": torch.minimum(query.diagonal, largest),
    }[unit]
    radius = reach.double() * (threshold * (1 + 1e-5))  # distances are rounded, relative to their size

    x, y, weight = _project(lines, query.centers.double())
    horizon = lines[:, 2, :2, None]  # (B, 2, 1)
    ahead = weight.square() - radius.square() * horizon.square().sum(1)
    # Squares of smaller lengths would be too small for float32, and distances inexact.
    bounded = (weight > 0) & (ahead > 0) & (radius > 1e-15) & radius.isfinite()
    # Weights grow from 0 at the horizon: the key view shows nothing of a disc that is closer to the horizon, or behind
    # it.
    nearest = torch.where(key.allowed, key_weight, torch.inf).amin(1, keepdim=True)
    beyond = weight + radius * horizon.norm(dim=1) < nearest - 1e-9 * nearest.abs()
    alive = query.allowed & key.allowed.any(1, keepdim=True) & ~beyond

    def along(place: Tensor, axis: int, count: int) -> tuple[Tensor, Tensor]:
        """First cell and number of cells of the windows along one axis of the key map."""
        # Tangents of the disc's image, x = place + t: ahead t^2 - 2 middle t - radius^2 |slope|^2 = 0.
        slope = lines[:, axis, :2, None] - place[:, None] * horizon  # (B, 2, Nq)
        middle = -radius.square() * (slope * horizon).sum(1)
        root = (middle.square() + ahead * radius.square() * slope.square().sum(1)).sqrt()
        low = (place + (middle - root) / ahead - slack).ceil()
        high = (place + (middle + root) / ahead + slack).floor()
        known = bounded & (low.abs() < torch.inf) & (high.abs() < torch.inf)  # NaN compares as False
        first = torch.where(known, low.clamp(0, count), 0.0).long()
        last = torch.where(known, high.clamp(-1, count - 1), count - 1.0).long()
        return first, torch.where(alive, (last - first + 1).clamp(min=0), 0)

    column, width = along(x, 0, w)
    row, height = along(y, 1, h)
    return Windows(column, row, width, height)


def _lines_to_cells(coords: Tensor, size: tuple[int, int], scale: Tensor | None) -> Tensor:
    """Homography (B, 3, 3) from the source, in the cells' unit of length, to column and row of the map."""
    h, w = size
    x, y, weight = inverse_homography(coords).unbind(1)
    lines = torch.stack([w * x - 0.5 * weight, h * y - 0.5 * weight, weight], 1)
    if scale is None:
        return lines
    return torch.cat([lines[..., :2] / scale, lines[..., 2:]], -1)


def _project(lines: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and weight, each (B, N), of points (B, N, 2)."""
    a, b, c = (
        lines[:, row, 0, None] * points[..., 0] + lines[:, row, 1, None] * points[..., 1] + lines[:, row, 2, None]
        for row in range(3)
    )
    return a / c, b / c, c


def pairs_in_windows(
    windows: Windows, query: Cells, key: Cells, width: int, threshold: float, unit: Unit, block: int
) -> Tensor:
    """The pairs inside windows that are closer than the threshold.

    Args:
        windows: One window per query cell.
        query: Query cells.
        key: Key cells.
        width: Number of columns of the key map.
        threshold: Largest distance, in cell diagonals.
        unit: Which diagonal counts, as in ``cell_distance``.
        block: How many pairs are looked at together.

    Returns:
        Image, query cell and key cell of each pair, int64 ``(3, P)``; sorted.
    """
    n_query, n_key = query.allowed.shape[1], key.allowed.shape[1]
    counts = (windows.width * windows.height).flatten()
    cells = counts.nonzero()[:, 0]  # image * Nq + query cell
    columns = windows.width.flatten()[cells]
    image = cells // n_query
    first = image * n_key + (windows.row * width + windows.column).flatten()[cells]
    counts = counts[cells]
    ends = counts.cumsum(0)
    starts = ends - counts
    centers_q, diagonal_q = query.centers.flatten(0, 1)[cells], query.diagonal.flatten()[cells]
    centers_k, diagonal_k, allowed_k = key.centers.flatten(0, 1), key.diagonal.flatten(), key.allowed.flatten()

    found = []
    for begin, end, before, total in runs_of_blocks(ends, block):
        number = torch.arange(end - begin, device=cells.device)
        owner = torch.repeat_interleave(number, counts[begin:end], output_size=total) + begin
        place = torch.arange(before, before + total, device=cells.device) - starts[owner]
        across = columns[owner]
        other = first[owner] + place + place // across * (width - across)
        offset = centers_q[owner] - centers_k[other]
        distance = offset_distance(offset[:, 0], offset[:, 1], diagonal_q[owner], diagonal_k[other], unit=unit)
        hit = ((distance < threshold) & allowed_k[other]).nonzero()[:, 0]
        own, other = owner[hit], other[hit]
        found.append(torch.stack([image[own], cells[own] % n_query, other % n_key]))
    return torch.cat(found, 1) if found else cells.new_empty(3, 0)


def runs_of_blocks(ends: Tensor, block: int) -> list[tuple[int, int, int, int]]:
    """Cuts windows, or other runs of pairs, into blocks.

    Args:
        ends: Number of pairs in all runs up to and including each one, int64 ``(R,)``.
        block: About how many pairs a block holds.

    Returns:
        For every block its first run, the run after its last, the pairs before it, and the pairs in it.
    """
    bounds = torch.cat([ends.new_zeros(1), ends])
    total = int(bounds[-1])
    marks = torch.arange(1, max(1, -(-total // block)), device=ends.device) * block
    cuts = torch.searchsorted(bounds, marks, right=True) - 1  # as many windows as fit
    stops = [*zip(cuts.tolist(), bounds[cuts].tolist(), strict=True), (len(ends), total)]
    runs, begin, before = [], 0, 0
    for end, pairs in stops:
        if end > begin:
            runs.append((begin, end, before, pairs - before))
            begin, before = end, pairs
    return runs
