"""A view's map on the grid of the region that it shares with another view."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._tensors import check_tensor
from densessl.geometry._points import Size, check_pair, checked, checked_size, project, sample_dense
from densessl.geometry.cells import cell_centers, in_source
from densessl.geometry.homography import coords_from_boxes, inverse_homography
from densessl.geometry.warping import warp

_STEPS = 6  # of Newton's method from the nearest pixel; smooth warps need two or three
_DISTANCES = 1 << 22  # held at once while the nearest pixels are looked for


def align(map: Tensor, coords_from: Tensor, coords_to: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Resamples a view's map on the grid of the two views' shared region.

    The region is the upright box in the source image that the bounding boxes of both views share. It is the same
    whichever view comes first: ``align(map_a, a, b, size)`` and ``align(map_b, b, a, size)`` hold the same places cell
    by cell. For plain crops this is what RoIAlign does with one sample per cell. With dense coords each place is
    searched for in the view: from the nearest pixel on by Newton's method.

    Args:
        map: Feature map ``(B, C, H, W)``, floating point, of the view that ``coords_from`` belongs to.
        coords_from: Coords ``(B, 3, 3)`` or dense ``(B, 2, H', W')`` of that view.
        coords_to: Coords of the other view, in either form.
        size: Height and width ``(h, w)`` of the result.

    Returns:
        The map ``(B, C, h, w)`` in the dtype that came in, and a boolean tensor ``(B, h, w)``: the cells whose centre
        lies in the source image and in both views, and that read only finite values of the map. Other cells are 0.

    Raises:
        ValueError: If a shape, dtype or device is not as described.

    Examples:
        >>> a = coords_from_boxes(torch.tensor([[0.0, 0.0, 0.6, 1.0]]))
        >>> b = coords_from_boxes(torch.tensor([[0.4, 0.0, 1.0, 1.0]]))
        >>> features, valid = align(torch.rand(1, 8, 6, 6), a, b, size=(4, 4))
        >>> features.shape, valid.shape
        (torch.Size([1, 8, 4, 4]), torch.Size([1, 4, 4]))
    """
    check_tensor(map, "map", "a floating point map (B, C, H, W)")
    if map.ndim != 4 or not map.is_floating_point():
        raise ValueError(f"map: expected a floating point map (B, C, H, W), got {map.dtype} {tuple(map.shape)}")
    check_pair(coords_from, coords_to, ("coords_from", "coords_to"))
    if map.shape[0] != coords_from.shape[0] or map.device != coords_from.device:
        raise ValueError(
            f"coords_from: expected B = {map.shape[0]} on {map.device} as map, "
            f"got B = {coords_from.shape[0]} on {coords_from.device}"
        )
    h, w = checked_size(size, "size")
    first, second = checked(coords_from, "coords_from"), checked(coords_to, "coords_to")
    with torch.no_grad():
        (low_a, high_a), (low_b, high_b) = _bounds(first), _bounds(second)
        low, high = torch.maximum(low_a, low_b).clamp(min=0), torch.minimum(high_a, high_b).clamp(max=1)
        shared = (high > low).all(1)
        box = torch.where(shared[:, None], torch.cat([low, high], 1), low.new_tensor([0, 0, 1, 1]))
        places = cell_centers(coords_from_boxes(box), (h, w))
        here = _positions(first, places)
        valid = in_source(places) & in_source(here) & in_source(_positions(second, places)) & shared[:, None]
        grid = torch.where(valid[..., None], here, 0.5).mT.unflatten(2, (h, w))
        known = map.isfinite().all(1, keepdim=True)
        seen = warp(known.to(grid.dtype), grid, (h, w), outside="border")[:, 0]
        valid = valid.unflatten(1, (h, w)) & (seen > 1 - 1e-5)
    aligned = warp(torch.where(known, map, 0.0), grid, (h, w), outside="border")
    return torch.where(valid[:, None], aligned, 0.0), valid


def _bounds(coords: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest x and y of a view in the source, each (B, 2)."""
    if coords.ndim == 3:
        points = torch.stack(project(coords, *coords.new_tensor([[0, 1, 0, 1], [0, 0, 1, 1]]))[:2], -1)
        return points.amin(1), points.amax(1)
    h, w = coords.shape[-2:]
    x, y = (torch.arange(n + 1, device=coords.device, dtype=coords.dtype) / n for n in (w, h))
    corners = torch.stack([x.repeat(h + 1), y.repeat_interleave(w + 1)], -1).expand(len(coords), -1, -1)
    points = torch.cat([sample_dense(coords, corners), coords.flatten(2).mT], 1)
    known = points.isfinite().all(-1, keepdim=True)
    return torch.where(known, points, torch.inf).amin(1), torch.where(known, points, -torch.inf).amax(1)


def _positions(coords: Tensor, places: Tensor) -> Tensor:
    """Where in a view places (B, N, 2) of the source lie, (B, N, 2); NaN where they do not."""
    if coords.ndim == 3:
        x, y, _ = project(inverse_homography(coords), *places.unbind(-1))
        return torch.stack([x, y], -1)
    h, w = coords.shape[-2:]
    at = _nearest(coords, places)
    step_x, step_y = places.new_tensor([0.5 / w, 0]), places.new_tensor([0, 0.5 / h])
    for _ in range(_STEPS):
        missing = places - sample_dense(coords, at)
        ax, ay = _slope(coords, at, step_x).unbind(-1)
        bx, by = _slope(coords, at, step_y).unbind(-1)
        determinant = ax * by - bx * ay
        mx, my = missing.unbind(-1)
        move = torch.stack([(by * mx - bx * my) / determinant, (ax * my - ay * mx) / determinant], -1)
        # Beyond the edge nothing can be read; a step that is not known leaves the place as it was.
        at = torch.where(move.isfinite(), at + move, at).clamp(0, 1)
    off = torch.linalg.vector_norm(places - sample_dense(coords, at), dim=-1)
    pixel = torch.hypot(_slope(coords, at, step_x).norm(dim=-1) / w, _slope(coords, at, step_y).norm(dim=-1) / h)
    # A twentieth of a pixel: what Newton's method does not reach lies outside of the view or behind something.
    return torch.where((off <= 0.05 * pixel)[..., None], at, torch.nan)


def _slope(coords: Tensor, at: Tensor, step: Tensor) -> Tensor:
    """Derivative of the source position along a step of half a pixel, (B, N, 2), from the sides that are known."""
    after, before = (at + step).clamp(max=1), (at - step).clamp(min=0)
    middle = sample_dense(coords, at)
    ahead, behind = sample_dense(coords, after) - middle, middle - sample_dense(coords, before)
    length_ahead, length_behind = (after - at).sum(-1, keepdim=True), (at - before).sum(-1, keepdim=True)
    known_ahead = ahead.isfinite() & (length_ahead > 0)
    known_behind = behind.isfinite() & (length_behind > 0)
    total = torch.where(known_ahead, ahead, 0.0) + torch.where(known_behind, behind, 0.0)
    length = torch.where(known_ahead, length_ahead, 0.0) + torch.where(known_behind, length_behind, 0.0)
    return total / length


def _nearest(coords: Tensor, places: Tensor) -> Tensor:
    """Centre of the view's pixel that lies nearest to each place, (B, N, 2) in the view's unit square."""
    h, w = coords.shape[-2:]
    points = coords.flatten(2).mT
    points = torch.where(points.isfinite().all(-1, keepdim=True), points, 1e4)
    step = max(1, _DISTANCES // (h * w * max(len(coords), 1)))
    blocks = [
        (
            (places[:, start : start + step, None, 0] - points[:, None, :, 0]).square()
            + (places[:, start : start + step, None, 1] - points[:, None, :, 1]).square()
        ).argmin(2)
        for start in range(0, places.shape[1], step)
    ]
    index = torch.cat(blocks, 1)
    return torch.stack([(index % w + 0.5) / w, (index // w + 0.5) / h], -1).to(coords.dtype)
