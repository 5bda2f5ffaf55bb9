"""Matching by place: DistanceMatcher."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from densessl._memory import check_fits
from densessl._tensors import check_number, check_tensor
from densessl.geometry import (
    UNITS,
    Size,
    Unit,
    check_pair,
    checked_size,
    in_source,
    is_dense,
    measured_cells,
    pair_distance,
    pixel_scale,
)
from densessl.matching._buckets import pairs_in_buckets
from densessl.matching._windows import Cells, Windows, find_windows, pairs_in_windows


class DistanceMatcher(nn.Module):
    """Cells closer than a threshold in the source image are a positive pair (PixPro, Eq. 1).

    ``A(i, j) = 1`` if the distance of the cells' centres is below ``threshold`` cell diagonals. Three details follow
    the published code: the comparison is strict, ``<`` (the paper writes ``<=``); the diagonal is that of the pair's
    larger cell (the paper does not say which); and distances are per axis in 0..1 unless ``source_size`` is given. A
    cell never matches if its centre lies outside the source image, if its position is unknown (NaN, infinite) or if it
    has no extent.

    Args:
        threshold: Distance T below which cells match, in cell diagonals; 0.7 in PixPro.
        unit: Which diagonal counts: ``"max"``, ``"min"``, ``"query"`` or ``"key"``, as in ``cell_distance``.
        sparse: Whether to return a sparse COO mask, with the same pairs as the dense one, without ever holding a dense
            ``(B, Nq, Nk)`` tensor. Each query cell is compared with the key cells of a small window, so time and memory
            grow with the number of cells. Dense key coords have no windows; their cells are found through a grid of
            buckets, in linear time as well. If views see the horizon, blocks of rows are compared with all key cells.
            Small maps are compared as a whole.

    Raises:
        ValueError: If the threshold is not positive, or the unit is unknown.

    Examples:
        >>> whole = torch.eye(3)[None]
        >>> DistanceMatcher(threshold=0.3)(whole, whole, (1, 2))
        tensor([[[ True, False],
                 [False,  True]]])
    """

    def __init__(self, threshold: float = 0.7, *, unit: Unit = "max", sparse: bool = False) -> None:
        super().__init__()
        if not (isinstance(threshold, float) and threshold == math.inf):  # which matches all cells
            check_number(threshold, "threshold", "a positive number of cell diagonals", lambda value: value > 0)
        if unit not in UNITS:
            raise ValueError(f"unit: expected one of {', '.join(map(repr, UNITS))}, got {unit!r}")
        self.threshold = threshold
        self.unit = unit
        self.sparse = sparse

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, unit={self.unit!r}, sparse={self.sparse}"

    @torch.no_grad()
    def forward(
        self,
        coords_q: Tensor,
        coords_k: Tensor,
        size_q: Size,
        size_k: Size | None = None,
        source_size: Tensor | None = None,
        valid_q: Tensor | None = None,
        valid_k: Tensor | None = None,
    ) -> Tensor:
        """Matches the cells of two maps.

        Args:
            coords_q: Coords of the query view, ``(B, 3, 3)`` or ``(B, 2, H, W)``.
            coords_k: Coords of the key view, in either form.
            size_q: Height and width ``(h, w)`` of the query map.
            size_k: Height and width of the key map; None means those of the query map.
            source_size: Height and width of the source image in pixels, int64 ``(B, 2)``. If given, distances are
                isotropic, in pixels.
            valid_q: Optional boolean tensor ``(B, Nq)`` or ``(B, h, w)``, True for the query cells that may match.
            valid_k: Optional boolean tensor ``(B, Nk)`` or ``(B, h, w)``, True for the key cells that may match.

        Returns:
            Mask ``(B, Nq, Nk)``, boolean, strided or sparse COO. Its ``.mT`` is the mask of the reverse direction.

        Raises:
            ValueError: If a shape, dtype or device is not as described, or if a dense mask cannot fit into memory.
        """
        size_q = checked_size(size_q, "size_q")
        size_k = size_q if size_k is None else checked_size(size_k, "size_k")
        check_pair(coords_q, coords_k)
        scale = None if source_size is None else pixel_scale(source_size, coords_q.float())
        if coords_q.shape == coords_k.shape and coords_q.dtype == coords_k.dtype and size_q == size_k:
            # Both views in one pass: at 7x7 the time goes into starting operators.
            twice = None if source_size is None else torch.cat([source_size, source_size])
            both = _cells(torch.cat([coords_q, coords_k]), size_q, twice)
            query, key = (Cells(*half) for half in zip(*(part.chunk(2) for part in both), strict=True))
        else:
            query, key = _cells(coords_q, size_q, source_size), _cells(coords_k, size_k, source_size)
        query, key = _restricted(query, valid_q, size_q, "valid_q"), _restricted(key, valid_k, size_k, "valid_k")
        if not self.sparse:
            shape = (*query.allowed.shape, key.allowed.shape[1])
            held = _BYTES_A_PAIR * math.prod(shape)
            check_fits(held, coords_q.device, "size_q, size_k", f"a dense mask of {shape}", "sparse=True")
            return self._compare(query, key)
        return self._pairs(query, key, coords_k, (size_k[0], size_k[1]), scale)

    # torch.compile refuses sparse tensors, and shapes that depend on values.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _pairs(
        self, query: Cells, key: Cells, coords_k: Tensor, size_k: tuple[int, int], scale: Tensor | None
    ) -> Tensor:
        """The pairs as a sparse mask."""
        shape = (*query.allowed.shape, key.allowed.shape[1])
        # Float64, which windows and buckets need, does not exist on every device.
        if math.prod(shape) <= _FEW_PAIRS or coords_k.device.type == "mps":
            indices, is_sorted = self._by_rows(query, key), shape[0] == 1
        elif is_dense(coords_k):
            indices = pairs_in_buckets(query, key, self.threshold, self.unit, _BLOCK_WINDOWED)
            is_sorted = False
        else:
            windows = find_windows(query, key, coords_k, size_k, scale, self.threshold, self.unit)
            indices, is_sorted = self._by_windows(windows, query, key, size_k[1])
        values = torch.ones(indices.shape[1], dtype=torch.bool, device=indices.device)
        mask = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False, is_coalesced=is_sorted)
        return mask.coalesce()

    def _compare(self, query: Cells, key: Cells) -> Tensor:
        """Compares all query cells with all key cells, (B, Nq, Nk)."""
        distance = pair_distance(query.centers, query.diagonal, key.centers, key.diagonal, unit=self.unit)
        # NaN compares as False: unknown positions match nothing.
        return (distance < self.threshold) & query.allowed[..., None] & key.allowed[:, None]

    def _by_rows(self, query: Cells, key: Cells) -> Tensor:
        """Image, query and key cell of all pairs, (3, P), found by comparing blocks of query rows with all keys."""
        batch, n_key = key.allowed.shape
        step = max(1, _BLOCK_PAIRS // max(1, batch * n_key))
        found = []
        for start in range(0, query.allowed.shape[1], step):
            index = self._compare(Cells(*(part[:, start : start + step] for part in query)), key).nonzero()
            index[:, 1] += start
            found.append(index)
        return torch.cat(found).T

    def _by_windows(self, windows: Windows, query: Cells, key: Cells, width: int) -> tuple[Tensor, bool]:
        """The same pairs, found through windows, and whether they are sorted."""
        pairs = (windows.width * windows.height).sum(1).tolist()
        table = query.allowed.shape[1] * key.allowed.shape[1]
        # Where the windows of an image are most of the map (views that see the horizon), comparing all is cheaper.
        crowded = [image for image, count in enumerate(pairs) if count * _WINDOW_COST > table]
        if not crowded:
            return pairs_in_windows(windows, query, key, width, self.threshold, self.unit, _BLOCK_WINDOWED), True
        chosen = torch.tensor(crowded, device=query.allowed.device)
        others = windows._replace(width=windows.width.index_fill(0, chosen, 0))
        found = self._by_rows(Cells(*(part[chosen] for part in query)), Cells(*(part[chosen] for part in key)))
        found[0] = chosen[found[0]]
        few = pairs_in_windows(others, query, key, width, self.threshold, self.unit, _BLOCK_WINDOWED)
        return torch.cat([found, few], 1), False


_FEW_PAIRS = 1 << 18  # up to so many, one comparison of all pairs is faster than windows
_BYTES_A_PAIR = 24  # taken by the temporaries of a full comparison
_BLOCK_PAIRS = 1 << 22  # pairs per block: some 100 MB of float temporaries
_BLOCK_WINDOWED = 1 << 18  # pairs per block of windows: some 30 MB of indices and temporaries
_WINDOW_COST = 8  # a pair in a window costs about as much as so many pairs of a full comparison


def _cells(coords: Tensor, size: Size, source_size: Tensor | None) -> Cells:
    centers, diagonal = measured_cells(coords, size, source_size)
    # An infinite entry may leave the centre at a finite place; the cell then has no extent, or no end.
    allowed = in_source(centers) & (diagonal > 0) & (diagonal < torch.inf)
    if source_size is not None:
        centers = centers * pixel_scale(source_size, centers)
    return Cells(centers, diagonal, allowed)


def _restricted(cells: Cells, valid: Tensor | None, size: Size, name: str) -> Cells:
    """Allows only the valid cells to match."""
    if valid is None:
        return cells
    allowed, (h, w) = cells.allowed, size
    check_tensor(valid, name, f"bool (B, N) = {tuple(allowed.shape)} or (B, h, w) = {(len(allowed), h, w)}")
    if valid.dtype != torch.bool or tuple(valid.shape) not in (tuple(allowed.shape), (len(allowed), h, w)):
        raise ValueError(
            f"{name}: expected bool (B, N) = {tuple(allowed.shape)} or (B, h, w) = {(len(allowed), h, w)}, "
            f"got {valid.dtype} {tuple(valid.shape)}"
        )
    if valid.device != allowed.device:
        raise ValueError(f"{name}: expected a tensor on {allowed.device} as the coords, got {valid.device}")
    return cells._replace(allowed=allowed & valid.flatten(1))
