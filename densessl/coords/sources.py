"""Dense coords from elsewhere: optical flow, stereo disparity, depth with camera poses, point tracks.

They say for each pixel of a frame where the same point is seen in another frame, the source. Pixels are continuous here
as everywhere: pixel (row i, column j) covers [j, j + 1] along x, and its centre lies at j + 0.5.

Places up to one side length beyond the source's edges are kept, so that cells across an edge get their full size. Cells
whose centre lies out there never match. Everything farther away, occluded or unknown is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densessl._tensors import check_number, check_tensor
from densessl.coords._matrices import check_camera, matrix_of, refuse_half

SourceSize = Tensor | Sequence[int] | None
_BLOCK = 1 << 22  # distances between pixels and tracks that are held at once


def coords_from_flow(flow: Tensor, visible: Tensor | None = None, source_size: SourceSize = None) -> Tensor:
    """Dense coords of a frame in another one, from the optical flow that leads there.

    Args:
        flow: Optical flow ``(B, 2, H, W)`` or ``(2, H, W)``, floating point: x and y in pixels from each pixel's centre
            in this frame to its position in the source frame. NaN and infinite values are unknown.
        visible: Optional boolean tensor ``(B, H, W)`` or ``(H, W)``, False where the point is occluded in the source or
            its flow is unknown.
        source_size: Height and width of the source frame in pixels, ``(h, w)`` or an integer tensor ``(B, 2)``; None
            means those of this frame. The flow stays in pixels: it ends in pixels of the source.

    Returns:
        Dense coords ``(B, 2, H, W)``, float32: x and y in the source's unit square, NaN where the point is occluded,
        unknown or far outside.

    Raises:
        ValueError: If a shape, dtype or device is not as described.

    Examples:
        >>> flow = torch.zeros(2, 60, 80)
        >>> coords_from_flow(flow).shape
        torch.Size([1, 2, 60, 80])
    """
    flow = _batched(flow, "flow", "(B, 2, H, W) or (2, H, W)", 4, channels=2)
    x, y = _pixel_centers(flow)
    return _finished(torch.stack([flow[:, 0] + x, flow[:, 1] + y], 1), visible, source_size)


def coords_from_disparity(disparity: Tensor, visible: Tensor | None = None) -> Tensor:
    """Dense coords of the left image of a rectified stereo pair in its right image.

    A point at x in the left image is seen at ``x - disparity`` in the right one, in the same row. For the coords of the
    right image in the left one, pass the right image's disparity with its sign changed.

    Args:
        disparity: Disparity in pixels, floating point, ``(B, H, W)``, ``(B, 1, H, W)`` or ``(H, W)``. NaN and infinite
            values are unknown; 0 is a point at infinity. If a data set writes 0 for unknown, mark those pixels in
            ``visible``.
        visible: Optional boolean tensor ``(B, H, W)`` or ``(H, W)``, False where the point is occluded in the right
            image or unknown.

    Returns:
        Dense coords ``(B, 2, H, W)``, float32, in the right image's unit square; NaN where the point is occluded,
        unknown or far outside.

    Raises:
        ValueError: If a shape, dtype or device is not as described.

    Examples:
        >>> coords_from_disparity(torch.full((60, 80), 4.0)).shape
        torch.Size([1, 2, 60, 80])
    """
    disparity = _one_channel(disparity, "disparity")
    x, y = _pixel_centers(disparity)
    x = x - disparity
    return _finished(torch.stack([x, torch.where(x.isfinite(), y, torch.nan)], 1), visible, None)


def coords_from_depth(
    depth: Tensor,
    intrinsics: Tensor,
    pose: Tensor,
    visible: Tensor | None = None,
    *,
    source_intrinsics: Tensor | None = None,
    source_size: SourceSize = None,
) -> Tensor:
    """Dense coords of a frame in another one of a still scene, from depth and the cameras.

    Depth does not tell which points are occluded in the source frame. Say so in ``visible``.

    Args:
        depth: Depth along the optical axis, floating point, ``(B, H, W)``, ``(B, 1, H, W)`` or ``(H, W)``. Values that
            are not positive and finite are unknown.
        intrinsics: Matrix of this camera in pixels, ``(B, 3, 3)`` or ``(3, 3)``, with edges at integers: the middle of
            an image of width W is W / 2. If your matrix has its origin at the centre of the first pixel, add 0.5 to
            both entries of the principal point.
        pose: Matrix ``(B, 4, 4)`` or ``(4, 4)`` from this camera's coordinates (x right, y down, z forward) to the
            coordinates of the source's camera, in the depth's unit of length.
        visible: Optional boolean tensor ``(B, H, W)`` or ``(H, W)``, False where the point is occluded in the source or
            unknown.
        source_intrinsics: Matrix of the source's camera, in the form of ``intrinsics``; None means the same camera.
        source_size: Height and width of the source frame in pixels, ``(h, w)`` or an integer tensor ``(B, 2)``; None
            means those of this frame.

    Returns:
        Dense coords ``(B, 2, H, W)``, float32, in the source's unit square; NaN where the point is occluded, unknown,
        behind the source's camera or far outside.

    Raises:
        ValueError: If a shape, dtype or device is not as described; on a CPU also if a matrix cannot be inverted or is
            transposed.

    Examples:
        >>> camera = torch.tensor([[50.0, 0.0, 40.0], [0.0, 50.0, 30.0], [0.0, 0.0, 1.0]])
        >>> coords_from_depth(torch.ones(60, 80), camera, pose=torch.eye(4)).shape
        torch.Size([1, 2, 60, 80])
    """
    depth = _one_channel(depth, "depth")
    depth = depth if depth.device.type == "mps" else depth.double()  # which that device does not have
    camera = matrix_of(intrinsics, "intrinsics", 3, depth)
    other = camera if source_intrinsics is None else matrix_of(source_intrinsics, "source_intrinsics", 3, depth)
    move = matrix_of(pose, "pose", 4, depth)
    for matrix, name in ((camera, "intrinsics"), (other, "source_intrinsics"), (move, "pose")):
        check_camera(matrix, name)
    x, y = _pixel_centers(depth)
    with torch.autocast(depth.device.type, enabled=False):
        pixels = torch.stack([x.expand(y.shape[0], -1), y.expand(-1, x.shape[1]), torch.ones_like(x + y)])
        points = torch.linalg.inv(camera) @ pixels.flatten(1) * depth.flatten(1)[:, None]
        points = move[:, :3, :3] @ points + move[:, :3, 3:]
        seen = (other @ points).unflatten(2, depth.shape[1:])
    ahead = (depth > 0) & depth.isfinite() & (seen[:, 2] > 0)
    position = torch.where(ahead[:, None], seen[:, :2] / seen[:, 2:], torch.nan)
    return _finished(position, visible, source_size)


def coords_from_points(
    points: Tensor,
    source_points: Tensor,
    size: Sequence[int],
    visible: Tensor | None = None,
    *,
    radius: float = 8.0,
    source_size: SourceSize = None,
) -> Tensor:
    """Dense coords of a frame in another one, from sparse point tracks.

    Every pixel within a radius of a track moves as the nearest track does; the others are unknown. Cells of a feature
    map need positions around their centre to be measured, so the radius should be half a cell or more.

    Args:
        points: Positions x and y of the tracks in this frame, in pixels with edges at integers, ``(B, N, 2)`` or ``(N,
            2)``, float32 or float64. NaN means that there is no track.
        source_points: Positions of the same tracks in the source frame, in the same shape.
        size: Height and width of this frame in pixels.
        visible: Optional boolean tensor ``(B, N)`` or ``(N,)``, True for the tracks that are seen in both frames.
        radius: Distance in pixels of this frame up to which a pixel follows the nearest track.
        source_size: Height and width of the source frame in pixels, ``(h, w)`` or an integer tensor ``(B, 2)``; None
            means those of this frame.

    Returns:
        Dense coords ``(B, 2, H, W)``, float32, in the source's unit square; NaN away from the tracks.

    Raises:
        ValueError: If a shape, dtype or device is not as described, or the radius is not positive.

    Examples:
        >>> tracks = torch.tensor([[10.5, 20.5], [40.5, 30.5]])
        >>> coords_from_points(tracks, tracks + 3.0, size=(60, 80)).shape
        torch.Size([1, 2, 60, 80])
    """
    for values, name in ((points, "points"), (source_points, "source_points")):
        refuse_half(values, name, "(B, N, 2) or (N, 2)")
    points = _batched(points, "points", "(B, N, 2) or (N, 2)", 3)
    source_points = _batched(source_points, "source_points", "(B, N, 2) or (N, 2)", 3)
    if points.shape[2] != 2:
        raise ValueError(f"points: expected (B, N, 2) or (N, 2), got {tuple(points.shape)}")
    if source_points.shape != points.shape or source_points.device != points.device:
        raise ValueError(
            f"source_points: expected {tuple(points.shape)} on {points.device} as points, "
            f"got {tuple(source_points.shape)} on {source_points.device}"
        )
    _check_sides(size, "size", Integral)
    check_number(radius, "radius", "a positive number of pixels", lambda value: value > 0)
    known = points.isfinite().all(2) & source_points.isfinite().all(2)
    if visible is not None:
        known = known & _valid(visible, known, "visible", "(B, N) or (N,)")
    x, y = _pixel_centers(points.new_empty(1, int(size[0]), int(size[1])))
    batch, tracks = known.shape
    centers = torch.stack([x.expand(len(y), -1), y.expand(-1, x.shape[1])], -1).flatten(0, 1)
    if tracks == 0:
        return _finished(points.new_full((batch, 2, len(y), x.shape[1]), torch.nan), None, source_size)
    placed = torch.where(known[..., None], points, 0.0)
    move = torch.where(known[..., None], source_points - points, torch.nan)
    found = []
    for block in centers.split(max(1, _BLOCK // (batch * tracks))):
        # By differences: products would lose the digits that near tracks differ in.
        apart = torch.hypot(
            block[None, :, None, 0] - placed[:, None, :, 0], block[None, :, None, 1] - placed[:, None, :, 1]
        )
        nearest, track = torch.where(known[:, None], apart, torch.inf).min(2)
        place = block + move.gather(1, track[..., None].expand(-1, -1, 2))
        found.append(torch.where((nearest <= radius)[..., None], place, torch.nan))
    return _finished(torch.cat(found, 1).mT.unflatten(2, (len(y), x.shape[1])), None, source_size)


def _batched(values: Tensor, name: str, expected: str, dims: int, channels: int | None = None) -> Tensor:
    """Values with a leading B, in float32 or float64."""
    check_tensor(values, name, f"floating point {expected}")
    fits = values.ndim in (dims - 1, dims) and values.is_floating_point()
    if not fits or (channels is not None and values.shape[-3] != channels):
        raise ValueError(f"{name}: expected floating point {expected}, got {values.dtype} {tuple(values.shape)}")
    values = values if values.ndim == dims else values[None]
    return values if values.dtype == torch.float64 else values.float()


def _one_channel(values: Tensor, name: str) -> Tensor:
    """(B, H, W) of (B, H, W), (B, 1, H, W) or (H, W)."""
    check_tensor(values, name, "floating point (B, H, W), (B, 1, H, W) or (H, W)")
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    return _batched(values, name, "(B, H, W), (B, 1, H, W) or (H, W)", 3)


def _check_sides(size: Any, name: str, kind: type) -> None:
    pair = isinstance(size, (Sequence, np.ndarray)) and len(size) == 2 and all(isinstance(side, kind) for side in size)
    if not pair or not all(1 <= side < float("inf") for side in size):
        raise ValueError(f"{name}: expected (height, width), both at least 1, got {size}")


def _valid(valid: Tensor, like: Tensor, name: str, expected: str) -> Tensor:
    check_tensor(valid, name, f"bool {expected}")
    if valid.dtype != torch.bool or tuple(valid.shape) not in (tuple(like.shape), tuple(like.shape[1:])):
        raise ValueError(
            f"{name}: expected bool {expected}, of shape {tuple(like.shape)}, got {valid.dtype} {tuple(valid.shape)}"
        )
    if valid.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} as the others, got {valid.device}")
    return valid


def _pixel_centers(like: Tensor) -> tuple[Tensor, Tensor]:
    """x ``(1, W)`` and y ``(H, 1)`` of all pixel centres, in pixels."""
    h, w = like.shape[-2:]
    y = torch.arange(h, device=like.device, dtype=like.dtype) + 0.5
    x = torch.arange(w, device=like.device, dtype=like.dtype) + 0.5
    return x[None], y[:, None]


def _finished(position: Tensor, visible: Tensor | None, source_size: SourceSize) -> Tensor:
    """Positions (B, 2, H, W) in source pixels as dense coords."""
    batch, _, h, w = position.shape
    if source_size is None:
        source_size = (h, w)
    if isinstance(source_size, Tensor):
        if source_size.shape not in ((2,), (batch, 2)) or source_size.device != position.device:
            raise ValueError(
                f"source_size: expected (h, w) or a tensor (B, 2) = ({batch}, 2) on {position.device}, "
                f"got {tuple(source_size.shape)} on {source_size.device}"
            )
        sides = source_size.to(position.dtype).expand(batch, 2).flip(-1)[:, :, None, None]
    else:
        _check_sides(source_size, "source_size", Real)  # a resized source may have had broken sides
        sides = position.new_tensor([source_size[1], source_size[0]])[:, None, None]
    coords = position / sides
    known = ((coords >= -1) & (coords <= 2)).all(1)  # NaN compares as False
    if visible is not None:
        known = known & _valid(visible, known, "visible", "(B, H, W) or (H, W)")
    return torch.where(known[:, None], coords, torch.nan).float()
