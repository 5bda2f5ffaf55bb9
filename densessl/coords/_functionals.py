"""What each geometric functional of torchvision v2 does: from the pixels of its output to the pixels of its input.

Each function takes the height and width of the input and the functional's own arguments, and returns a Move. Written
from the functionals' behaviour, which the tracer tests check on the installed torchvision; its private helpers are not
used. Positions are continuous: pixel i covers [i, i + 1], edges at integers, as torchvision's own samplers have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision.transforms.v2 import functional as F

CanvasSize = tuple[int, int]
Matrix = list[list[float]]
Move = tuple[Matrix, CanvasSize]  # (3, 3) from output pixels to input pixels; output height and width


# Plain Python numbers: on 3 x 3 matrices they are several times faster than tensors, and exact to float64.


def multiply(*matrices: Matrix) -> Matrix:
    """The product of matrices, the last one applied first."""
    out = matrices[0]
    for right in matrices[1:]:
        out = [[sum(row[k] * right[k][j] for k in range(3)) for j in range(3)] for row in out]
    return out


def _shift(dx: float, dy: float) -> Matrix:
    return [[1.0, 0.0, dx], [0.0, 1.0, dy], [0.0, 0.0, 1.0]]


def _horizontal_flip(canvas: CanvasSize) -> Move:
    return [[-1.0, 0.0, canvas[1]], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], canvas


def _vertical_flip(canvas: CanvasSize) -> Move:
    return [[1.0, 0.0, 0.0], [0.0, -1.0, canvas[0]], [0.0, 0.0, 1.0]], canvas


def _crop(canvas: CanvasSize, top: int, left: int, height: int, width: int) -> Move:
    return _shift(left, top), (height, width)


def pad_move(canvas: CanvasSize, padding: int | Sequence[int], **_: Any) -> Move:
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = {1: sides * 4, 2: sides * 2}.get(len(sides), sides)
    return _shift(-left, -top), (canvas[0] + top + bottom, canvas[1] + left + right)


def _resize(canvas: CanvasSize, size: int | Sequence[int] | None, max_size: int | None = None, **_: Any) -> Move:
    height, width = _resized(canvas, size, max_size)
    return [[canvas[1] / width, 0.0, 0.0], [0.0, canvas[0] / height, 0.0], [0.0, 0.0, 1.0]], (height, width)


def _resized(canvas: CanvasSize, size: int | Sequence[int] | None, max_size: int | None) -> CanvasSize:
    """torchvision's output size: one number is the length of the shorter edge, with truncation of the longer."""
    if size is not None and not isinstance(size, int) and len(size) == 2:
        return size[0], size[1]
    short, long = min(canvas), max(canvas)
    if size is None:
        if max_size is None:
            raise ValueError("max_size: expected an int where size is None, got None")
        new_short, new_long = int(max_size * short / long), max_size
    else:
        new_short = size if isinstance(size, int) else size[0]
        new_long = int(new_short * long / short)
        if max_size is not None and new_long > max_size:
            new_short, new_long = int(max_size * new_short / new_long), max_size
    return (new_short, new_long) if canvas[0] <= canvas[1] else (new_long, new_short)


def _resized_crop(
    canvas: CanvasSize, top: int, left: int, height: int, width: int, size: int | Sequence[int], **_: Any
) -> Move:
    cropped, canvas = _crop(canvas, top, left, height, width)
    resized, canvas = _resize(canvas, size)
    return multiply(cropped, resized), canvas


def _center_crop(canvas: CanvasSize, output_size: int | Sequence[int]) -> Move:
    sides = [output_size] if isinstance(output_size, int) else list(output_size)
    height, width = sides * 2 if len(sides) == 1 else sides
    h, w = canvas
    # Smaller images are padded first, the odd pixel after them; then cropped at half the rest, rounded to even.
    pad_top, pad_left = max(height - h, 0) // 2, max(width - w, 0) // 2
    top, left = round((max(h, height) - height) / 2), round((max(w, width) - width) / 2)
    return _shift(left - pad_left, top - pad_top), (height, width)


def _affine(
    canvas: CanvasSize,
    angle: float,
    translate: Sequence[float],
    scale: float,
    shear: float | Sequence[float],
    center: Sequence[float] | None = None,
    **_: Any,
) -> Move:
    sides = [shear, 0.0] if isinstance(shear, (int, float)) else list(shear)
    shear_x, shear_y = (math.radians(s) for s in (sides * 2 if len(sides) == 1 else sides))
    turn = math.radians(angle)
    cx, cy = (canvas[1] / 2, canvas[0] / 2) if center is None else center
    cos, sin, zoom = math.cos(turn), math.sin(turn), 1 / scale
    # The image is sheared along x, along y, scaled, turned and shifted; backwards, the last comes first.
    matrix = multiply(
        _shift(cx, cy),
        [[1.0, math.tan(shear_x), 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        [[1.0, 0.0, 0.0], [math.tan(shear_y), 1.0, 0.0], [0.0, 0.0, 1.0]],
        [[zoom * cos, zoom * sin, 0.0], [-zoom * sin, zoom * cos, 0.0], [0.0, 0.0, 1.0]],
        _shift(-cx - translate[0], -cy - translate[1]),
    )
    return matrix, canvas


def _rotate(
    canvas: CanvasSize, angle: float, expand: bool = False, center: Sequence[float] | None = None, **_: Any
) -> Move:
    matrix, _same = _affine(canvas, -angle, (0, 0), 1.0, 0.0, center)  # counter-clockwise, unlike affine
    if not expand:
        return matrix, canvas
    h, w = canvas
    if center is None and angle % 180 == 0:
        height, width = h, w
    elif center is None and angle % 90 == 0:
        height, width = w, h
    else:
        height, width = _expanded(matrix, canvas)
    # The enlarged canvas keeps its middle on the middle of the old one.
    return multiply(matrix, _shift((w - width) / 2, (h - height) / 2)), (height, width)


def _expanded(matrix: Matrix, canvas: CanvasSize) -> CanvasSize:
    """The canvas that torchvision draws for a rotation with expand, to the pixel.

    It takes the bounds of the corners under the map from output to input, in float32, and cuts them at 1e-4 before
    rounding outwards; any other arithmetic is one pixel off now and then.
    """
    h, w = canvas
    half = torch.tensor([w / 2, h / 2])
    centered = torch.tensor(multiply(_shift(-w / 2, -h / 2), matrix, _shift(w / 2, h / 2)))
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, -1.0]]) * half
    turned = torch.cat([corners, torch.ones(4, 1)], 1) @ centered[:2].T
    low, high = ((bound + half).mul(1e4).trunc().mul(1e-4) for bound in turned.aminmax(dim=0))
    width, height = (high.ceil() - low.floor()).int().tolist()
    return height, width


def _perspective(
    canvas: CanvasSize,
    startpoints: Sequence[Sequence[float]] | None,
    endpoints: Sequence[Sequence[float]] | None,
    coefficients: Sequence[float] | None = None,
    **_: Any,
) -> Move:
    if coefficients is None:
        if startpoints is None or endpoints is None:
            raise ValueError("perspective: expected startpoints and endpoints, or coefficients, got neither")
        rows: list[list[float]] = []
        values: list[float] = []
        for (x, y), (u, v) in zip(endpoints, startpoints, strict=True):
            rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
            values += [u, v]
        system, right = torch.tensor(rows, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
        coefficients = torch.linalg.lstsq(system, right[:, None]).solution.flatten().tolist()
    a, b, c, d, e, f, g, h = coefficients
    matrix = [[a, b, c], [d, e, f], [g, h, 1.0]]
    return (matrix if _mostly_in_front(matrix, canvas) else [[-x for x in row] for row in matrix]), canvas


def _mostly_in_front(matrix: Matrix, canvas: CanvasSize) -> bool:
    """Whether most of what the output shows of the input has a positive weight.

    A homography and its negative are the same map, and the sign says which side of the horizon is seen. Coefficients
    fix it by the corner at (0, 0), which strong perspective may throw behind the horizon although hardly anything of
    the input is to be seen there.
    """
    height, width = canvas
    if all(matrix[2][0] * x + matrix[2][1] * y + matrix[2][2] > 0 for x in (0, width) for y in (0, height)):
        return True
    x = (torch.arange(_SIGN_GRID, dtype=torch.float64) + 0.5) * width / _SIGN_GRID
    y = (torch.arange(_SIGN_GRID, dtype=torch.float64) + 0.5) * height / _SIGN_GRID
    points = torch.stack([x.repeat(_SIGN_GRID), y.repeat_interleave(_SIGN_GRID), torch.ones(_SIGN_GRID**2)])
    u, v, weight = torch.tensor(matrix, dtype=torch.float64) @ points
    u, v = u / weight, v / weight
    shown = (u >= 0) & (u <= width) & (v >= 0) & (v <= height)
    return int((shown & (weight > 0)).sum()) >= int((shown & (weight < 0)).sum())


_SIGN_GRID = 48  # points along each side that the sign of a homography is decided by


FOLLOWED: dict[Callable[..., Any], Callable[..., Move]] = {
    F.horizontal_flip: _horizontal_flip,
    F.vertical_flip: _vertical_flip,
    F.crop: _crop,
    F.pad: pad_move,
    F.resize: _resize,
    F.resized_crop: _resized_crop,
    F.center_crop: _center_crop,
    F.affine: _affine,
    F.rotate: _rotate,
    F.perspective: _perspective,
}

# Functionals that leave every pixel where it is, by name: torchvision versions differ in which they have.
STATIONARY = frozenset(
    [
        "adjust_brightness",
        "adjust_contrast",
        "adjust_gamma",
        "adjust_hue",
        "adjust_saturation",
        "adjust_sharpness",
        "autocontrast",
        "equalize",
        "erase",
        "gaussian_blur",
        "gaussian_noise",
        "grayscale_to_rgb",
        "invert",
        "jpeg",
        "normalize",
        "permute_channels",
        "posterize",
        "rgb_to_grayscale",
        "solarize",
        "to_dtype",
        "to_grayscale",
        "uniform_temporal_subsample",
    ]
)
QUERIES = frozenset(["get_dimensions", "get_num_channels", "get_num_frames", "get_size"])


def dispatched_functionals() -> list[str]:
    """Names of the installed torchvision's functionals that take an image and may have kernels per type.

    Recognised by their kernel for images, ``{name}_image``, which every one of them has beside it.
    """
    return [name for name in dir(F) if not name.startswith("_") and hasattr(F, f"{name}_image")]
