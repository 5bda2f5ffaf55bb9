"""Homographies between unit squares: chained, inverted, and made of what others keep."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl._tensors import check_tensor
from densessl.geometry._points import Size, check_precision, checked_size


def compose(outer: Tensor, inner: Tensor) -> Tensor:
    """Homography ``outer after inner``, scaled so that its weight at the unit square's centre is 1.

    Args:
        outer: Homography ``(B, 3, 3)`` that is applied last.
        inner: Homography ``(B, 3, 3)`` that is applied first.

    Returns:
        The chained homography ``(B, 3, 3)``.

    Raises:
        ValueError: If a matrix is in half precision, or the dtypes differ.

    Examples:
        >>> left = coords_from_boxes(torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
        >>> compose(left, left)[0, 0].tolist()
        [0.25, 0.0, 0.0]
    """
    check_precision(outer, "outer")
    check_tensor(inner, "inner", f"{outer.dtype} as outer")
    if inner.dtype != outer.dtype:
        raise ValueError(f"inner: expected {outer.dtype} as outer, got {inner.dtype}")
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
        matrix: Homography ``(B, 3, 3)``.

    Returns:
        The inverse ``(B, 3, 3)``; infinite or NaN where the matrix is singular.

    Raises:
        ValueError: If the matrix is in half precision.

    Examples:
        >>> left = coords_from_boxes(torch.tensor([[0.0, 0.0, 0.5, 1.0]]))
        >>> inverse_homography(left)[0, 0].tolist()
        [2.0, 0.0, 0.0]
    """
    check_precision(matrix, "matrix")
    a, b, c = matrix.unbind(-2)
    rows = [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]
    determinant = (a * rows[0]).sum(-1)
    return torch.stack(rows, -1) / determinant[:, None, None]


def coords_from_boxes(boxes: Tensor) -> Tensor:
    """Coords of axis-parallel crops given as boxes, the form in which the published code keeps them.

    Args:
        boxes: Boxes ``(B, 4)`` as x0, y0, x1, y1 in 0..1. A view that is flipped along x has ``x0 > x1``, and the same
            holds for y.

    Returns:
        Coords ``(B, 3, 3)``. The boxes are taken unchanged, although the published code divides pixel indices by (size
        - 1), while ours are pixel edges divided by size.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> coords_from_boxes(torch.tensor([[0.25, 0.0, 0.75, 1.0]]))[0]
        tensor([[0.5000, 0.0000, 0.2500],
                [0.0000, 1.0000, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    check_tensor(boxes, "boxes", "floating point (B, 4) x0 y0 x1 y1")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"boxes: expected floating point (B, 4) x0 y0 x1 y1, got {boxes.dtype} {tuple(boxes.shape)}")
    check_precision(boxes, "boxes")
    x0, y0, x1, y1 = boxes.unbind(-1)
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    return torch.stack([x1 - x0, zero, x0, zero, y1 - y0, y0, zero, zero, one], -1).unflatten(-1, (3, 3))


def coords_from_kornia(matrix: Tensor, image_size: Size, view_size: Size) -> Tensor:
    """Coords from kornia's transform matrix.

    kornia's matrices lead from image to view, in pixel indices (the centre of pixel i lies at i).

    Args:
        matrix: kornia's ``augmentation.transform_matrix``, ``(B, 3, 3)``.
        image_size: Height and width of the image that went in, in pixels.
        view_size: Height and width of the view that came out, in pixels.

    Returns:
        Coords ``(B, 3, 3)``, ``image_from_view`` between unit squares.

    Raises:
        ValueError: If a shape or dtype is not as described.

    Examples:
        >>> coords_from_kornia(torch.eye(3)[None], image_size=(60, 80), view_size=(60, 80)).shape
        torch.Size([1, 3, 3])
    """
    check_tensor(matrix, "matrix", "floating point (B, 3, 3)")
    if matrix.ndim != 3 or tuple(matrix.shape[-2:]) != (3, 3) or not matrix.is_floating_point():
        raise ValueError(f"matrix: expected floating point (B, 3, 3), got {matrix.dtype} {tuple(matrix.shape)}")
    check_precision(matrix, "matrix")
    image_h, image_w = checked_size(image_size, "image_size")
    view_h, view_w = checked_size(view_size, "view_size")
    # float64: the inverse of a pixel-unit perspective mixes numbers of size 1e-4 and 1e3.
    wide = matrix.double()
    unit_from_index = wide.new_tensor([[1 / image_w, 0, 0.5 / image_w], [0, 1 / image_h, 0.5 / image_h], [0, 0, 1]])
    index_from_unit = wide.new_tensor([[view_w, 0, -0.5], [0, view_h, -0.5], [0, 0, 1]])
    index_from_index = inverse_homography(wide)
    coords = compose(compose(unit_from_index.expand_as(wide), index_from_index), index_from_unit.expand_as(wide))
    return coords.to(matrix.dtype)
