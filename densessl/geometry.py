"""Pure functions on coords: where cells lie in the source image, how far apart they are, warping.

Two kinds of coords are understood, told apart by their shape:

* a homography, ``(B, 3, 3)``: ``image_from_view``, from the view's unit square to the source image's unit square;
* dense coords, ``(B, 2, H, W)``: x and y of every view pixel's centre in the source's unit square, NaN outside.

Pixel *edges* lie at 0 and 1, so the centre of cell ``(i, j)`` of an ``h x w`` map is ``((j + .5) / w, (i + .5) / h)``.
Everything runs element by element in float32 (float64 stays float64): autocast does not touch element-wise arithmetic,
and the few matrix products are taken outside of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int] | torch.Size
Unit = Literal["max", "min", "query", "key"]
UNITS = ("max", "min", "query", "key")


def is_dense(coords: Tensor) -> bool:
    """Whether coords are dense, ``(B, 2, H, W)``, and not homographies, ``(B, 3, 3)``.

    Args:
        coords: either kind of coords, batched.

    Raises:
        ValueError: if the shape or the dtype is that of neither.
    """
    return _checked(coords, "coords").ndim == 4


def _checked(coords: Tensor, name: str) -> Tensor:
    homography = coords.ndim == 3 and tuple(coords.shape[-2:]) == (3, 3)
    dense = coords.ndim == 4 and coords.shape[1] == 2
    if not (homography or dense):
        raise ValueError(
            f"{name}: expected homographies (B, 3, 3) or dense coords (B, 2, H, W), got {tuple(coords.shape)}"
        )
    if not coords.is_floating_point():
        raise ValueError(f"{name}: expected a floating point tensor, got {coords.dtype}")
    return coords if type(coords) is Tensor else coords.as_subclass(Tensor)


def _checked_size(size: Size, name: str) -> tuple[int, int]:
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"{name}: expected (height, width), both at least 1, got {tuple(size)}")
    return size[0], size[1]


def _full(coords: Tensor) -> Tensor:
    """Half precision is widened: bfloat16 coords would be a whole cell wrong at 28x28."""
    return coords if coords.dtype == torch.float64 else coords.float()


def _unit_grid(size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of all cell centres in the unit square, each (N,), row-major."""
    h, w = size
    y = (torch.arange(h, device=like.device, dtype=like.dtype) + 0.5) / h
    x = (torch.arange(w, device=like.device, dtype=like.dtype) + 0.5) / w
    return x.repeat(h), y.repeat_interleave(w)


def _project(matrix: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, 3) applied to points (N,) or (B, N): image x, y and the homogeneous weight, each (B, N)."""
    m = matrix.flatten(1)[:, :, None]
    weight = m[:, 6] * x + m[:, 7] * y + m[:, 8]
    # A point at or behind the horizon has no image: NaN, which matches nothing.
    weight = torch.where(weight > 0, weight, torch.nan)
    return (m[:, 0] * x + m[:, 1] * y + m[:, 2]) / weight, (m[:, 3] * x + m[:, 4] * y + m[:, 5]) / weight, weight


def sample_dense(dense: Tensor, points: Tensor) -> Tensor:
    """Reads dense coords between their pixels.

    Linear between pixel centres and, in the half pixel between the outermost centres and the edge, continued
    linearly, so that coords of an affine view stay exact up to the edge. NaN where a neighbour with weight is NaN
    and beyond the edges.

    Args:
        dense: ``(B, 2, H, W)``.
        points: ``(B, N, 2)`` xy in the view's unit square.

    Returns:
        ``(B, N, 2)`` xy in the source's unit square.
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


def _locate(coords: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Source positions (B, N, 2) of view positions x, y, each (N,) in the view's unit square."""
    if coords.ndim == 4:
        points = torch.stack([x, y], -1).expand(coords.shape[0], -1, -1)
        return sample_dense(coords, points)
    px, py, _ = _project(coords, x, y)
    return torch.stack([px, py], -1)


def cell_centers(coords: Tensor, size: Size) -> Tensor:
    """Where the centres of a map's cells lie in the source image.

    Args:
        coords: ``(B, 3, 3)`` or dense ``(B, 2, H, W)``.
        size: ``(h, w)`` of the feature map; any size, the view's size is not needed.

    Returns:
        ``(B, N, 2)``, N = h * w row-major; xy in the source's unit square; NaN where the coords are unknown.

    Raises:
        ValueError: on another shape or dtype of ``coords``, or a size below 1.
    """
    coords = _full(_checked(coords, "coords"))
    return _locate(coords, *_unit_grid(_checked_size(size, "size"), coords))


def pixel_scale(source_size: Tensor, coords: Tensor) -> Tensor:
    """Factors from the unit square to source pixels.

    Args:
        source_size: ``(B, 2)``, height and width.
        coords: a tensor of the batch; gives device and dtype.

    Returns:
        ``(B, 1, 2)``, width and height.

    Raises:
        ValueError: on another shape or device.
    """
    if source_size.shape != (coords.shape[0], 2):
        raise ValueError(
            f"source_size: expected (B, 2) = ({coords.shape[0]}, 2), height and width of each source image, "
            f"got {tuple(source_size.shape)}"
        )
    if source_size.device != coords.device:
        raise ValueError(f"source_size: expected a tensor on {coords.device} as coords, got {source_size.device}")
    return source_size.to(coords.dtype).flip(-1)[:, None]


def cell_diagonal(coords: Tensor, size: Size, source_size: Tensor | None = None) -> Tensor:
    """Length of each cell's diagonal in the source image.

    ``sqrt(|d/dx|^2 + |d/dy|^2)`` of the cell's Jacobian: for crops and flips ``hypot(bin width, bin height)``, the
    value of the published code, the same for every cell. For dense coords the derivative is the difference across
    the cell, or across the half of it that is known.

    Args:
        coords: ``(B, 3, 3)`` or dense ``(B, 2, H, W)``.
        size: ``(h, w)`` of the feature map.
        source_size: int64 ``(B, 2)``, height and width of the source; then the result is in source pixels, else in
            units of the unit square's sides.

    Returns:
        ``(B, N)``, N = h * w.

    Raises:
        ValueError: on shapes or dtypes other than these.
    """
    return measured_cells(coords, size, source_size)[1]


def measured_cells(coords: Tensor, size: Size, source_size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Centres and diagonals of a map's cells, in one pass.

    Args:
        coords: as in ``cell_diagonal``.
        size: as there.
        source_size: as there, but for the diagonals alone.

    Returns:
        ``(B, N, 2)`` in the source's unit square, and ``(B, N)``.

    Raises:
        ValueError: on shapes or dtypes other than these.
    """
    coords = _full(_checked(coords, "coords"))
    h, w = size = _checked_size(size, "size")
    x, y = _unit_grid(size, coords)
    if coords.ndim == 4:
        centers = _locate(coords, x, y)
        ax, ay = _difference(coords, centers, x, y, 0.5 / w, 0.0).unbind(-1)
        bx, by = _difference(coords, centers, x, y, 0.0, 0.5 / h).unbind(-1)
    else:
        px, py, weight = _project(coords, x, y)
        centers = torch.stack([px, py], -1)
        m = coords.flatten(1)[:, :, None]  # d(n / weight) = (dn - position * dweight) / weight
        ax, ay = (m[:, 0] - px * m[:, 6]) / weight / w, (m[:, 3] - py * m[:, 6]) / weight / w
        bx, by = (m[:, 1] - px * m[:, 7]) / weight / h, (m[:, 4] - py * m[:, 7]) / weight / h
    if source_size is not None:
        width, height = pixel_scale(source_size, coords).unbind(-1)
        ax, bx, ay, by = ax * width, bx * width, ay * height, by * height
    return centers, ((ax.square() + ay.square()) + (bx.square() + by.square())).sqrt()


def _difference(coords: Tensor, center: Tensor, x: Tensor, y: Tensor, dx: float, dy: float) -> Tensor:
    after = _locate(coords, (x + dx).clamp(max=1.0), (y + dy).clamp(max=1.0))
    before = _locate(coords, (x - dx).clamp(min=0.0), (y - dy).clamp(min=0.0))
    both = after - before
    one = torch.where(after.isnan(), 2 * (center - before), 2 * (after - center))
    return torch.where(both.isnan(), one, both)


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
        coords_q: ``(B, 3, 3)`` or ``(B, 2, H, W)``, coords of the query view.
        coords_k: the same of the key view.
        size_q: ``(h, w)`` of the query map.
        size_k: the same of the key map; None: as ``size_q``.
        unit: the diagonal that a pair is measured in: that of its larger (``"max"``) or smaller (``"min"``) cell, or
            always of the ``"query"`` or the ``"key"`` cell.
        source_size: int64 ``(B, 2)``, height and width of the source; then distances are isotropic, in pixels, else
            each axis counts in units of the image's own side.

    Returns:
        ``(B, Nq, Nk)``; NaN where either cell's position is unknown.

    Raises:
        ValueError: on shapes, dtypes, devices or a unit other than these.
    """
    size_k = size_q if size_k is None else size_k
    check_pair(coords_q, coords_k)
    return pair_distance(
        *_positions(coords_q, size_q, source_size), *_positions(coords_k, size_k, source_size), unit=unit
    )


def check_pair(first: Tensor, second: Tensor, names: tuple[str, str] = ("coords_q", "coords_k")) -> None:
    """Raises ValueError, with the arguments' names, unless both are coords of one batch and on one device."""
    first, second = _checked(first, names[0]), _checked(second, names[1])
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"{names[1]}: expected as many images as {names[0]}, B = {first.shape[0]}, got {second.shape[0]}"
        )
    if first.device != second.device:
        raise ValueError(f"{names[1]}: expected a tensor on {first.device} as {names[0]}, got {second.device}")


def _positions(coords: Tensor, size: Size, source_size: Tensor | None) -> tuple[Tensor, Tensor]:
    centers, diagonal = measured_cells(coords, size, source_size)
    return centers if source_size is None else centers * pixel_scale(source_size, centers), diagonal


def pair_distance(
    centers_q: Tensor, diagonal_q: Tensor, centers_k: Tensor, diagonal_k: Tensor, *, unit: Unit = "max"
) -> Tensor:
    """Distances of all pairs of two maps, from cell centres and diagonals.

    Args:
        centers_q: ``(B, Nq, 2)``, from ``cell_centers``, in any unit of length.
        diagonal_q: ``(B, Nq)``, from ``cell_diagonal``, in the same unit.
        centers_k: ``(B, Nk, 2)``.
        diagonal_k: ``(B, Nk)``.
        unit: as in ``cell_distance``.

    Returns:
        ``(B, Nq, Nk)``.

    Raises:
        ValueError: on an unknown unit.
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
        dx: offset from cell to cell along x, any shape.
        dy: the same along y.
        diagonal_q: of the query cell, broadcastable.
        diagonal_k: of the key cell.
        unit: as in ``cell_distance``.

    Returns:
        The shape that all of them broadcast to.

    Raises:
        ValueError: on an unknown unit.
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


def inside(coords: Tensor, size: Size) -> Tensor:
    """Which cells have their centre inside the source image.

    Args:
        coords: ``(B, 3, 3)`` or dense ``(B, 2, H, W)``.
        size: ``(h, w)`` of the feature map.

    Returns:
        bool ``(B, N)``; False where the position is unknown (NaN).

    Raises:
        ValueError: on shapes or dtypes other than these.
    """
    return in_source(cell_centers(coords, size))


def in_source(centers: Tensor) -> Tensor:
    """Which points (B, N, 2) lie in the source's unit square, bool (B, N)."""
    x, y = centers.unbind(-1)
    return (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)


def relative_coords(dst: Tensor, src: Tensor) -> Tensor:
    """Coords that lead from one view to another: ``dst``'s unit square to ``src``'s.

    Args:
        dst: coords ``(B, 3, 3)`` or dense ``(B, 2, H, W)`` of the view to go from.
        src: coords ``(B, 3, 3)`` of the view to arrive in.

    Returns:
        coords of dst's kind, to be used as if ``src``'s view were the source image: ``warp(x_src, that, size)``
        resamples src's map on dst's grid.

    Raises:
        ValueError: if ``src`` is dense (a dense map has no inverse in closed form), or on shapes other than these.
    """
    check_pair(dst, src, ("dst", "src"))
    dst, src = _full(_checked(dst, "dst")), _full(_checked(src, "src"))
    if src.ndim == 4:
        raise ValueError(f"src: expected homographies (B, 3, 3), got dense coords {tuple(src.shape)}: no inverse")
    inverse = inverse_homography(src)
    if dst.ndim == 3:
        return compose(inverse, dst)
    x, y, _ = _project(inverse, dst[:, 0].flatten(1), dst[:, 1].flatten(1))
    return torch.stack([x, y], 1).unflatten(2, dst.shape[-2:])


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Homography ``outer after inner``, scaled so that its weight at the unit square's centre is 1.

    Args:
        outer: ``(B, 3, 3)``.
        inner: ``(B, 3, 3)``.

    Returns:
        ``(B, 3, 3)``.
    """
    with torch.autocast(outer.device.type, enabled=False):
        product = outer @ inner
    center = 0.5 * (product[:, 2, 0] + product[:, 2, 1]) + product[:, 2, 2]
    # Keeps the sign of the weight (what lies before the horizon) and the numbers near 1. The centre of a view that
    # straddles the horizon may have no weight; there the product stays as it is.
    scale = torch.where(center > 1e-6, center, 1.0)
    return product / scale[:, None, None]


def inverse_homography(matrix: Tensor) -> Tensor:
    """Inverse by the adjugate: a point in front of the horizon (positive weight) comes back in front.

    Closed form because ``torch.linalg.inv`` reads the singular flag back to the host, which stalls a GPU.

    Args:
        matrix: ``(B, 3, 3)``.

    Returns:
        ``(B, 3, 3)``; infinite or NaN where the matrix is singular.
    """
    a, b, c = matrix.unbind(-2)
    rows = [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]
    determinant = (a * rows[0]).sum(-1)
    return torch.stack(rows, -1) / determinant[:, None, None]


def warp(x: Tensor, coords: Tensor, size: Size, mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear") -> Tensor:
    """Resamples a source image or map on a view's grid.

    Args:
        x: ``(B, C, H, W)``, floating point, the source.
        coords: ``(B, 3, 3)`` or dense ``(B, 2, H', W')``, from the view to x's unit square.
        size: ``(h, w)`` of the result.
        mode: interpolation.

    Returns:
        ``(B, C, h, w)`` of x's dtype; 0 where the view looks outside the source.

    Raises:
        ValueError: on shapes, dtypes or devices other than these.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating point map (B, C, H, W), got {x.dtype} {tuple(x.shape)}")
    _checked(coords, "coords")
    if x.shape[0] != coords.shape[0]:
        raise ValueError(f"coords: expected as many images as x, B = {x.shape[0]}, got {coords.shape[0]}")
    if x.device != coords.device:
        raise ValueError(f"coords: expected a tensor on {x.device} as x, got {coords.device}")
    h, w = _checked_size(size, "size")
    grid = 2 * cell_centers(coords, (h, w)) - 1
    grid = torch.where(grid.isfinite(), grid, 4.0).clamp(-4, 4)  # -1 and 1 are the edges, 4 is outside
    with torch.autocast(x.device.type, enabled=False):
        grid = grid.unflatten(1, (h, w)).to(torch.promote_types(x.dtype, torch.float32))
        sampled = F.grid_sample(x.to(grid.dtype), grid, mode=mode, padding_mode="zeros", align_corners=False)
    return sampled.to(x.dtype)


def coords_from_boxes(boxes: Tensor) -> Tensor:
    """Coords of axis-parallel crops given as boxes, the form in which the published code keeps them.

    Args:
        boxes: ``(B, 4)`` x0, y0, x1, y1 in 0..1; ``x0 > x1`` where the view is flipped, likewise y.

    Returns:
        ``(B, 3, 3)``. The boxes are taken unchanged, although the published code divides pixel indices by (size - 1)
        where ours are pixel edges divided by size.

    Raises:
        ValueError: on another shape or dtype.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"boxes: expected floating point (B, 4) x0 y0 x1 y1, got {boxes.dtype} {tuple(boxes.shape)}")
    x0, y0, x1, y1 = _full(boxes).unbind(-1)
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    return torch.stack([x1 - x0, zero, x0, zero, y1 - y0, y0, zero, zero, one], -1).unflatten(-1, (3, 3))


def coords_from_kornia(matrix: Tensor, image_size: Size, view_size: Size) -> Tensor:
    """Coords from kornia's transform matrix.

    kornia's matrices lead from image to view, in pixel indices (the centre of pixel i lies at i).

    Args:
        matrix: ``(B, 3, 3)``, ``augmentation.transform_matrix``.
        image_size: ``(H, W)`` of the image that went in.
        view_size: ``(H, W)`` of the view that came out.

    Returns:
        ``(B, 3, 3)`` ``image_from_view`` between unit squares.

    Raises:
        ValueError: on another shape or dtype.
    """
    if matrix.ndim != 3 or tuple(matrix.shape[-2:]) != (3, 3) or not matrix.is_floating_point():
        raise ValueError(f"matrix: expected floating point (B, 3, 3), got {matrix.dtype} {tuple(matrix.shape)}")
    image_h, image_w = _checked_size(image_size, "image_size")
    view_h, view_w = _checked_size(view_size, "view_size")
    # float64: the inverse of a pixel-unit perspective mixes numbers of size 1e-4 and 1e3.
    wide = matrix.double()
    unit_from_index = wide.new_tensor([[1 / image_w, 0, 0.5 / image_w], [0, 1 / image_h, 0.5 / image_h], [0, 0, 1]])
    index_from_unit = wide.new_tensor([[view_w, 0, -0.5], [0, view_h, -0.5], [0, 0, 1]])
    index_from_index = inverse_homography(wide)
    coords = compose(compose(unit_from_index.expand_as(wide), index_from_index), index_from_unit.expand_as(wide))
    return coords.to(_full(matrix).dtype)
