"""From view to view, and maps on a view's grid."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl.geometry._points import Size, check_pair, checked, checked_size, project
from densessl.geometry.cells import cell_centers
from densessl.geometry.homography import compose, coords_from_boxes, inverse_homography


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
    dst, src = checked(dst, "dst"), checked(src, "src")
    if src.ndim == 4:
        raise ValueError(f"src: expected homographies (B, 3, 3), got dense coords {tuple(src.shape)}: no inverse")
    inverse = inverse_homography(src)
    if dst.ndim == 3:
        return compose(inverse, dst)
    x, y, _ = project(inverse, dst[:, 0].flatten(1), dst[:, 1].flatten(1))
    return torch.stack([x, y], 1).unflatten(2, dst.shape[-2:])


def overlap_coords(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Coords of the box that two views share in the source image: a third view, upright, with nothing else in it.

    ``warp(x_a, relative_coords(overlap, a), size)`` and the same of b then hold the same places cell by cell, as
    aligning regions of interest does. Of views that are turned or in perspective, their bounding boxes are taken.

    Args:
        a: coords ``(B, 3, 3)``.
        b: coords ``(B, 3, 3)``.

    Returns:
        coords ``(B, 3, 3)``, and bool ``(B,)``: which views share anything. The coords of the others are those of the
        whole source image.

    Raises:
        ValueError: on dense coords, or other shapes and dtypes.
    """
    check_pair(a, b, ("a", "b"))
    boxes = []
    for name, coords in (("a", a), ("b", b)):
        coords = checked(coords, name)
        if coords.ndim == 4:
            raise ValueError(f"{name}: expected homographies (B, 3, 3), got dense coords {tuple(coords.shape)}")
        x, y, _ = project(coords, *coords.new_tensor([[0, 1, 0, 1], [0, 0, 1, 1]]))
        boxes.append((torch.stack([x.amin(1), y.amin(1)], 1), torch.stack([x.amax(1), y.amax(1)], 1)))
    (low_a, high_a), (low_b, high_b) = boxes
    low, high = torch.maximum(low_a, low_b), torch.minimum(high_a, high_b)
    shared = (high > low).all(1)
    low, high = torch.where(shared[:, None], low, 0.0), torch.where(shared[:, None], high, 1.0)
    return coords_from_boxes(torch.cat([low, high], 1)), shared


def warp(
    x: Tensor,
    coords: Tensor,
    size: Size,
    mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear",
    outside: Literal["zeros", "border"] = "zeros",
) -> Tensor:
    """Resamples a source image or map on a view's grid.

    Args:
        x: ``(B, C, H, W)``, floating point, the source.
        coords: ``(B, 3, 3)`` or dense ``(B, 2, H', W')``, from the view to x's unit square.
        size: ``(h, w)`` of the result.
        mode: interpolation.
        outside: what lies around the source: zeros, into which the outer half of its edge cells fades, or its
            border, continued; a place that is not known then reads some border cell.

    Returns:
        ``(B, C, h, w)`` of x's dtype.

    Raises:
        ValueError: on shapes, dtypes or devices other than these.
    """
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
