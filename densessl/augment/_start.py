"""Views of an image whose pixels are known in another image: their coords are carried on to that one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from densessl._tensors import check_tensor
from densessl.coords import DenseCoords, ViewCoords
from densessl.geometry import cell_centers, check_precision, sample_dense

_SLACK = 1e-4  # of the unit square: how far rounding may put a point beyond an image's edge


def checked_start(coords: Tensor, size: tuple[int, int]) -> Tensor:
    """The coords of a whole image in another one, checked while their values are at hand.

    Args:
        coords: Coords ``(3, 3)`` or dense ``(2, H, W)``, with or without a leading 1.
        size: The image's height and width.

    Returns:
        Coords ``(1, 3, 3)`` or ``(1, 2, H, W)``, float32 or float64.

    Raises:
        ValueError: If the shape or dtype differs (half precision included), if dense coords are not of the image's
            size, or if the values are no coords in a unit square but pixels or a flow.
    """
    check_tensor(coords, "coords", "(3, 3), or dense coords (2, H, W)")
    shape = tuple(coords.shape)
    shape = shape[1:] if len(shape) in (3, 4) and shape[0] == 1 and shape[-2:] != (1, 3) else shape
    if shape not in ((3, 3), (2, *size)) or not coords.is_floating_point():
        raise ValueError(
            f"coords: expected floating point (3, 3), or dense coords (2, H, W) = {(2, *size)} of the image's size, "
            f"got {coords.dtype} {tuple(coords.shape)}"
        )
    check_precision(coords, "coords")
    start = coords.as_subclass(Tensor).reshape(1, *shape)
    if start.device.type != "cpu":
        return start
    line = torch.linspace(0, 1, 9, dtype=start.dtype)
    places = start[0].flatten(1) if start.ndim == 4 else _projected(start[0], torch.cartesian_prod(line, line)).T
    places = places[:, places.isfinite().all(0)]
    if start.ndim == 3 and not places.numel():
        raise ValueError(f"coords: expected a homography, got a matrix that maps no point: {start[0].tolist()}")
    # A homography may reach far outside where the other image is a small part of this one, but it must come near that
    # image along both axes. In dense coords, whatever is not in the other image is NaN.
    if ((places < -1) | (places > 2)).any() if start.ndim == 4 else _apart(places):
        raise ValueError(
            "coords: expected positions in the other image's unit square, 0..1, NaN where there is none, got values "
            f"from {float(places.min()):.4g} to {float(places.max()):.4g}; of pixels or a flow, coords_from_flow "
            "makes coords"
        )
    return start


def _apart(places: Tensor) -> bool:
    """Whether all of the places (2, N) lie far to the same side of the unit square."""
    return bool(((places.amin(1) > 2) | (places.amax(1) < -1)).any())


def checked_source_size(source_size: Tensor | Sequence[int]) -> Tensor:
    """Height and width of the other image as int64 ``(2,)``; ValueError on anything else."""
    size = torch.as_tensor(source_size)
    if size.numel() != 2 or size.is_floating_point() or int(size.min()) < 1:
        raise ValueError(f"source_size: expected height and width of the other image, two integers, got {source_size}")
    return size.reshape(2).long()


class Start(NamedTuple):
    """Where a whole image lies in another one.

    Attributes:
        coords: The coords as given, ``(1, 3, 3)`` or ``(1, 2, H, W)``.
        dense: The same coords as a map of the image's size, ``(1, 2, H, W)``.
        other: Height and width of the other image in pixels.
    """

    coords: Tensor
    dense: Tensor
    other: tuple[int, int]

    @classmethod
    def of(cls, coords: Tensor, size: tuple[int, int], source_size: Tensor | Sequence[int] | None) -> Start:
        """Checked as MultiView checks them; without ``source_size``, the other image has the image's size."""
        start = checked_start(coords, size)
        height, width = checked_source_size(size if source_size is None else source_size).tolist()
        dense = start if start.ndim == 4 else cell_centers(start, size).mT.unflatten(2, size)
        return cls(start, dense, (height, width))


def carried(view: ViewCoords | DenseCoords, start: Tensor) -> ViewCoords | DenseCoords:
    """Coords of a view in the image, carried on to the other image.

    Args:
        view: Coords of the view in the image.
        start: Coords of the image in the other image, from ``checked_start``.

    Returns:
        Coords of the view in the other image: a homography if both are homographies, otherwise dense.

    Raises:
        ValueError: If both are homographies and the view reaches beyond the image. Its fill would get positions in the
            other image, and would match there.
    """
    plain, size = view.as_subclass(Tensor), view.canvas_size
    if start.ndim == 3 and isinstance(view, ViewCoords):
        seen = _projected(plain.double(), plain.new_tensor([[0, 0], [1, 0], [0, 1], [1, 1]]).double())
        if not bool(((seen >= -_SLACK) & (seen <= 1 + _SLACK)).all()):
            raise ValueError(
                "coords: the view reaches beyond the image, and a homography would give positions to its fill; "
                "use MultiView(..., dense=True), or transforms that stay inside"
            )
        moved = start[0].double() @ plain.double()
        weight = moved[2].sum() / 2 + moved[2, 2] / 2  # at the view's centre, as everywhere: its sign must stay
        return ViewCoords(moved / weight.abs().clamp(min=1e-6), canvas_size=size)
    if isinstance(view, ViewCoords):
        points = cell_centers(plain[None].double(), size).to(start.dtype)
    else:
        points = plain[None].flatten(2).mT.to(start.dtype)
    if start.ndim == 4:
        # A pixel on the edge may lie beyond it by rounding.
        near = (points > -_SLACK) & (points < 1 + _SLACK)
        places = sample_dense(start, torch.where(near, points.clamp(0, 1), points))
    else:
        inside = ((points >= -_SLACK) & (points <= 1 + _SLACK)).all(-1, keepdim=True)
        places = torch.where(inside, _projected(start[0], points), torch.nan)
    return DenseCoords(places[0].T.unflatten(1, size))


def _projected(matrix: Tensor, points: Tensor) -> Tensor:
    """A homography (3, 3) applied to points (..., 2); NaN behind the horizon."""
    image = torch.cat([points, torch.ones_like(points[..., :1])], -1) @ matrix.T
    return image[..., :2] / torch.where(image[..., 2:] > 0, image[..., 2:], torch.nan)
