"""From view to view, and maps on a view's grid."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._tensors import check_tensor
from densessl.geometry._inverse import inverse_dense
from densessl.geometry._points import Size, check_pair, checked, checked_size, project, sample_dense
from densessl.geometry.cells import cell_centers
from densessl.geometry.homography import compose, coords_from_boxes, inverse_homography


def relative_coords(dst: Tensor, src: Tensor) -> Tensor:
    """Coords that lead from one view to another: ``dst``'s unit square to ``src``'s.

    Args:
        dst: Coords ``(B, 3, 3)`` or dense ``(B, 2, H, W)`` of the view to start from.
        src: Coords ``(B, 3, 3)`` or dense ``(B, 2, H', W')`` of the view to arrive in. Dense coords are inverted by a
            search that is exact to a small part of a pixel; where they fold, one of the places is found.

    Returns:
        Coords that treat ``src``'s view as the source image: ``warp(x_src, result, size)`` resamples src's map on dst's
        grid. Two homographies give a homography ``(B, 3, 3)``; otherwise the result is dense, in dst's size, or in
        src's if dst has none. NaN where src's dense coords do not show what dst shows.

    Raises:
        ValueError: If a shape, dtype or device is not as described.

    Examples:
        >>> a = coords_from_boxes(torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
        >>> relative_coords(a, torch.eye(3)[None]).allclose(a)
        True
    """
    check_pair(dst, src, ("dst", "src"))
    dst, src = checked(dst, "dst"), checked(src, "src")
    if src.ndim == 4:
        size = dst.shape[-2:] if dst.ndim == 4 else src.shape[-2:]
        points = dst.flatten(2).mT if dst.ndim == 4 else cell_centers(dst, size)
        wide = torch.promote_types(points.dtype, src.dtype)
        return inverse_dense(src.to(wide), points.to(wide)).mT.unflatten(2, size)
    inverse = inverse_homography(src)
    if dst.ndim == 3:
        return compose(inverse, dst)
    x, y, _ = project(inverse, dst[:, 0].flatten(1), dst[:, 1].flatten(1))
    return torch.stack([x, y], 1).unflatten(2, dst.shape[-2:])


def overlap_coords(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Coords of the box that two views share in the source image: a third view, upright, with nothing else in it.

    The box lies inside the source's unit square: padding around the source that both views show is not shared.

    ``warp(x_a, relative_coords(overlap, a), size)`` and the same call with b then hold the same places cell by cell, as
    when regions of interest are aligned. For views that are turned, in perspective or dense, the bounding boxes count.

    Args:
        a: Coords ``(B, 3, 3)`` or dense ``(B, 2, H, W)`` of one view.
        b: Coords of the other view, in either form.

    Returns:
        Coords of the box, ``(B, 3, 3)``, and a boolean tensor ``(B,)``: which pairs of views share anything. For the
        others, the coords are those of the whole source image.

    Raises:
        ValueError: If a shape, dtype or device is not as described.

    Examples:
        >>> a = coords_from_boxes(torch.tensor([[0.0, 0.0, 0.75, 1.0]]))
        >>> b = coords_from_boxes(torch.tensor([[0.25, 0.0, 1.0, 1.0]]))
        >>> coords, shared = overlap_coords(a, b)
        >>> coords[0, 0].tolist(), shared.tolist()
        ([0.5, 0.0, 0.25], [True])
    """
    check_pair(a, b, ("a", "b"))
    bounds = [_bounds(checked(coords, name)) for name, coords in (("a", a), ("b", b))]
    (low_a, high_a), (low_b, high_b) = bounds
    low, high = torch.maximum(low_a, low_b).clamp(min=0), torch.minimum(high_a, high_b).clamp(max=1)
    shared = (high > low).all(1)
    low, high = torch.where(shared[:, None], low, 0.0), torch.where(shared[:, None], high, 1.0)
    return coords_from_boxes(torch.cat([low, high], 1)), shared


def _bounds(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper corner of a view's bounding box in the source, each (B, 2)."""
    if coords.ndim == 3:
        x, y, _ = project(coords, *coords.new_tensor([[0, 1, 0, 1], [0, 0, 1, 1]]))
        return torch.stack([x.amin(1), y.amin(1)], 1), torch.stack([x.amax(1), y.amax(1)], 1)
    h, w = coords.shape[-2:]
    y, x = (torch.linspace(0, 1, side + 1, device=coords.device, dtype=coords.dtype) for side in (h, w))
    corners = torch.stack([x.repeat(h + 1), y.repeat_interleave(w + 1)], -1).expand(len(coords), -1, -1)
    # Of pixels with an unknown neighbour the centres are known, though not all of the corners.
    seen = torch.cat([sample_dense(coords, corners), coords.flatten(2).mT], 1)
    known = seen.isfinite().all(-1, keepdim=True)
    return torch.where(known, seen, torch.inf).amin(1), torch.where(known, seen, -torch.inf).amax(1)


def warp(
    x: Tensor,
    coords: Tensor,
    size: Size,
    mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear",
    outside: Literal["zeros", "border"] = "zeros",
) -> Tensor:
    """Resamples a source image or map on a view's grid.

    Args:
        x: Source image or map ``(B, C, H, W)``, floating point.
        coords: Coords ``(B, 3, 3)`` or dense ``(B, 2, H', W')`` from the view to x's unit square.
        size: Height and width ``(h, w)`` of the result.
        mode: Interpolation: ``"bilinear"``, ``"nearest"`` or ``"bicubic"``.
        outside: What lies around the source. ``"zeros"``: the outer half of the edge cells fades into zeros.
            ``"border"``: the border continues; unknown places then read some border cell.

    Returns:
        The resampled map ``(B, C, h, w)`` in x's dtype.

    Raises:
        ValueError: If a shape, dtype or device is not as described.

    Examples:
        >>> left = coords_from_boxes(torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
        >>> warp(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), left, (1, 2))
        tensor([[[[1., 2.]]]])
    """
    check_tensor(x, "x", "a floating point map (B, C, H, W)")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating point map (B, C, H, W), got {x.dtype} {tuple(x.shape)}")
    checked(coords, "coords")
    if x.shape[0] != coords.shape[0]:
        raise ValueError(f"coords: expected as many images as x, B = {x.shape[0]}, got {coords.shape[0]}")
    if x.device != coords.device:
        raise ValueError(f"coords: expected a tensor on {x.device} as x, got {coords.device}")
    if outside not in ("zeros", "border"):
        raise ValueError(f"outside: expected 'zeros' or 'border', got {outside!r}")
    h, w = checked_size(size, "size")
    grid = 2 * cell_centers(coords, (h, w)) - 1
    grid = torch.where(grid.isfinite(), grid, 4.0).clamp(-4, 4)  # -1 and 1 are the edges, 4 is outside
    with torch.autocast(x.device.type, enabled=False):
        grid = grid.unflatten(1, (h, w)).to(torch.promote_types(x.dtype, torch.float32))
        sampled = F.grid_sample(x.to(grid.dtype), grid, mode=mode, padding_mode=outside, align_corners=False)
    return sampled.to(x.dtype)
