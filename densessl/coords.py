"""Coords as torchvision tv_tensors: they follow every geometric transform of torchvision v2.

Each geometric functional is one map from the pixels of its output to the pixels of its input. It is written down once
below; ``ViewCoords`` multiplies it on, ``DenseCoords`` resamples itself with it. torchvision passes a tensor
type for which a functional has no kernel through unchanged: pixels would move and coords would stay. So every
functional of the installed torchvision is either followed, known to leave pixels where they are, or registered here to
raise.

Positions are continuous: pixel i covers [i, i + 1], edges at integers, as torchvision's own samplers have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.geometry import sample_dense

CanvasSize = tuple[int, int]
Move = tuple[Tensor, CanvasSize]  # float64 (3, 3) from output pixels to input pixels; output height and width


class ViewCoords(tv_tensors.TVTensor):
    """The homography from the view's unit square to the source image's unit square.

    Identity at birth, when the view still is the source image; afterwards every geometric transform of torchvision v2
    moves it along with the image. What is no homography (elastic, five-crop, mirrored padding of a crop) raises.

    Args:
        data: ``(3, 3)``; None: the identity.
        canvas_size: height and width of the image that these coords belong to, in pixels.

    Attributes:
        canvas_size: the same of the current view.

    Raises:
        ValueError: if ``data`` is not ``(3, 3)`` or ``canvas_size`` not (height, width).
    """

    canvas_size: CanvasSize

    def __new__(cls, data: Any = None, *, canvas_size: Sequence[int]) -> ViewCoords:
        matrix = torch.eye(3) if data is None else torch.as_tensor(data, dtype=torch.float32)
        if matrix.shape != (3, 3):
            raise ValueError(f"data: expected a homography (3, 3), got {tuple(matrix.shape)}")
        if len(canvas_size) != 2 or min(canvas_size) < 1:
            raise ValueError(f"canvas_size: expected (height, width), both at least 1, got {tuple(canvas_size)}")
        coords = matrix.as_subclass(cls)
        coords.canvas_size = (int(canvas_size[0]), int(canvas_size[1]))
        return coords

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if isinstance(out, cls) and isinstance(args[0], cls) and "canvas_size" not in out.__dict__:
            out.canvas_size = args[0].canvas_size  # clone, to, detach and pin_memory keep the type: keep the size too
        return out

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return self._make_repr(canvas_size=self.canvas_size)


class DenseCoords(tv_tensors.TVTensor):
    """Where the centre of every view pixel lies in the source's unit square, ``(2, H, W)``; NaN where there is none.

    The dense twin of ``ViewCoords``, for pipelines with elastic transforms. It also knows which pixels are
    padding, wherever in the pipeline they came in.

    Args:
        data: ``(2, H, W)`` x and y; None: the identity.
        canvas_size: height and width of the image; needed where ``data`` is None.

    Attributes:
        canvas_size: height and width of the current view.

    Raises:
        ValueError: if ``data`` is not ``(2, H, W)``, or neither it nor ``canvas_size`` is given.
    """

    def __new__(cls, data: Any = None, *, canvas_size: Sequence[int] | None = None) -> DenseCoords:
        if data is None:
            if canvas_size is None:
                raise ValueError("canvas_size: expected (height, width) where no data is given, got None")
            h, w = canvas_size
            data = torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"))
        dense = torch.as_tensor(data, dtype=torch.float32)
        if dense.ndim != 3 or dense.shape[0] != 2:
            raise ValueError(f"data: expected dense coords (2, H, W), got {tuple(dense.shape)}")
        return dense.as_subclass(cls)

    @property
    def canvas_size(self) -> CanvasSize:
        return self.shape[-2], self.shape[-1]


# --- what each functional does: output pixels -> input pixels -------------------------------------------------------


def _matrix(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _shift(dx: float, dy: float) -> Tensor:
    return _matrix((1, 0, dx), (0, 1, dy), (0, 0, 1))


def _horizontal_flip(canvas: CanvasSize) -> Move:
    return _matrix((-1, 0, canvas[1]), (0, 1, 0), (0, 0, 1)), canvas


def _vertical_flip(canvas: CanvasSize) -> Move:
    return _matrix((1, 0, 0), (0, -1, canvas[0]), (0, 0, 1)), canvas


def _crop(canvas: CanvasSize, top: int, left: int, height: int, width: int) -> Move:
    return _shift(left, top), (height, width)


def _pad(canvas: CanvasSize, padding: int | Sequence[int], **_: Any) -> Move:
    sides = [padding] if isinstance(padding, int) else list(padding)
    left, top, right, bottom = {1: sides * 4, 2: sides * 2}.get(len(sides), sides)
    return _shift(-left, -top), (canvas[0] + top + bottom, canvas[1] + left + right)


def _resize(canvas: CanvasSize, size: int | Sequence[int] | None, max_size: int | None = None, **_: Any) -> Move:
    height, width = _resized(canvas, size, max_size)
    return _matrix((canvas[1] / width, 0, 0), (0, canvas[0] / height, 0), (0, 0, 1)), (height, width)


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
    return cropped @ resized, canvas


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
    sides = [shear, 0.0] if isinstance(shear, int | float) else list(shear)
    shear_x, shear_y = (math.radians(s) for s in (sides * 2 if len(sides) == 1 else sides))
    turn = math.radians(angle)
    cx, cy = (canvas[1] / 2, canvas[0] / 2) if center is None else center
    rotation = _matrix((math.cos(turn), -math.sin(turn), 0), (math.sin(turn), math.cos(turn), 0), (0, 0, 1))
    sheared_y = _matrix((1, 0, 0), (-math.tan(shear_y), 1, 0), (0, 0, 1))
    sheared_x = _matrix((1, -math.tan(shear_x), 0), (0, 1, 0), (0, 0, 1))
    scaled = torch.diag(torch.tensor([scale, scale, 1.0], dtype=torch.float64))
    view_from_image = (
        _shift(translate[0], translate[1])
        @ _shift(cx, cy)
        @ rotation
        @ scaled
        @ sheared_y
        @ sheared_x
        @ _shift(-cx, -cy)
    )
    return torch.linalg.inv(view_from_image), canvas


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
    return matrix @ _shift((w - width) / 2, (h - height) / 2), (height, width)


def _expanded(matrix: Tensor, canvas: CanvasSize) -> CanvasSize:
    """The canvas that torchvision draws for a rotation with expand, to the pixel.

    It takes the bounds of the corners under the map from output to input, in float32, and cuts them at 1e-4 before
    rounding outwards; any other arithmetic is one pixel off now and then.
    """
    h, w = canvas
    half = torch.tensor([w / 2, h / 2])
    centered = _shift(-w / 2, -h / 2) @ matrix @ _shift(w / 2, h / 2)
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, -1.0]]) * half
    turned = torch.cat([corners, torch.ones(4, 1)], 1) @ centered[:2].float().T
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
        rows, values = [], []
        for (x, y), (u, v) in zip(endpoints, startpoints, strict=True):
            rows += [(x, y, 1, 0, 0, 0, -u * x, -u * y), (0, 0, 0, x, y, 1, -v * x, -v * y)]
            values += [u, v]
        solution = torch.linalg.lstsq(_matrix(*rows), torch.tensor(values, dtype=torch.float64)[:, None]).solution
        coefficients = solution.flatten().tolist()
    return torch.tensor([*coefficients, 1.0], dtype=torch.float64).reshape(3, 3), canvas


FOLLOWED: dict[Callable[..., Any], Callable[..., Move]] = {
    F.horizontal_flip: _horizontal_flip,
    F.vertical_flip: _vertical_flip,
    F.crop: _crop,
    F.pad: _pad,
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
_QUERIES = frozenset(["get_dimensions", "get_num_channels", "get_num_frames", "get_size"])


# --- the two kernels --------------------------------------------------------------------------------------------------


def _unit_from_pixel(canvas: CanvasSize) -> Tensor:
    return torch.diag(torch.tensor([1 / canvas[1], 1 / canvas[0], 1.0], dtype=torch.float64))


def _pixel_from_unit(canvas: CanvasSize) -> Tensor:
    return torch.diag(torch.tensor([canvas[1], canvas[0], 1.0], dtype=torch.float64))


def _follow(move: Callable[..., Move]) -> Callable[..., ViewCoords]:
    def kernel(coords: ViewCoords, *args: Any, **kwargs: Any) -> ViewCoords:
        matrix, canvas = move(coords.canvas_size, *args, **kwargs)
        unit_from_unit = _unit_from_pixel(coords.canvas_size) @ matrix @ _pixel_from_unit(canvas)
        plain = coords.as_subclass(Tensor)
        moved = plain.double() @ unit_from_unit.to(plain.device)
        return ViewCoords(moved / moved[2, 2], canvas_size=canvas)

    return kernel


def _follow_densely(move: Callable[..., Move]) -> Callable[..., DenseCoords]:
    def kernel(coords: DenseCoords, *args: Any, **kwargs: Any) -> DenseCoords:
        matrix, (height, width) = move(coords.canvas_size, *args, **kwargs)
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centers = torch.stack([x, y, torch.ones_like(x)]).flatten(1).double()
        seen = (_unit_from_pixel(coords.canvas_size) @ matrix @ centers).float()
        return _resample(coords, (seen[:2] / torch.where(seen[2] > 0, seen[2], torch.nan)).T, (height, width))

    return kernel


def _resample(coords: DenseCoords, points: Tensor, canvas: CanvasSize) -> DenseCoords:
    plain = coords.as_subclass(Tensor)
    sampled = sample_dense(plain[None], points[None].to(plain.device))
    return DenseCoords(sampled[0].T.unflatten(1, canvas))


def _elastic_densely(coords: DenseCoords, displacement: Tensor, **_: Any) -> DenseCoords:
    """displacement: (1, H, W, 2), in half sides of the image, added to where each pixel looks."""
    height, width = coords.canvas_size
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    points = torch.stack([x, y], -1) + 0.5 * displacement[0].float().cpu()
    return _resample(coords, points.flatten(0, 1), (height, width))


def _refuse_mirrored_crop(coords: ViewCoords, padding: int | Sequence[int], **kwargs: Any) -> ViewCoords:
    mode = kwargs.get("padding_mode", "constant")
    if mode in ("reflect", "symmetric") and not _shows_whole_source(coords):
        raise ValueError(
            f"pad with padding_mode={mode!r} cannot be followed after a crop: the padding shows mirrored pixels where "
            "the coords continue into the source image. Pad before cropping, or use MultiView(dense=True)."
        )
    return _follow(_pad)(coords, padding)


def _shows_whole_source(coords: ViewCoords) -> bool:
    """Then everything beyond the view's edges is beyond the source's, and matches nothing."""
    view_from_image = torch.linalg.inv(coords.as_subclass(Tensor).double())
    corners = view_from_image @ _matrix((0, 1, 1, 0), (0, 0, 1, 1), (1, 1, 1, 1)).to(view_from_image.device)
    seen = corners[:2] / corners[2]
    return bool(((seen >= -1e-4) & (seen <= 1 + 1e-4)).all())


def _refuse(functional_name: str, advice: str) -> Callable[..., Any]:
    def kernel(coords: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"{functional_name} cannot be followed by {type(coords).__name__}: {advice}")

    return kernel


def _stay(coords: Any, *args: Any, **kwargs: Any) -> Any:
    return coords


def _canvas(coords: ViewCoords | DenseCoords) -> list[int]:
    return list(coords.canvas_size)


def _register() -> None:
    for functional, move in FOLLOWED.items():
        mirrored = functional is F.pad
        F.register_kernel(functional, ViewCoords)(_refuse_mirrored_crop if mirrored else _follow(move))
        F.register_kernel(functional, DenseCoords)(_follow_densely(move))
    F.register_kernel(F.elastic, ViewCoords)(_refuse("elastic", "it is no homography; use MultiView(dense=True)."))
    F.register_kernel(F.elastic, DenseCoords)(_elastic_densely)
    done = {functional.__name__ for functional in FOLLOWED} | {"elastic"} | STATIONARY | _QUERIES
    for cls in (ViewCoords, DenseCoords):
        F.register_kernel(F.get_size, cls)(_canvas)
        for name in sorted(STATIONARY & set(dispatched_functionals())):
            F.register_kernel(name, cls)(_stay)
        for name in ("five_crop", "ten_crop"):
            F.register_kernel(getattr(F, name), cls)(_refuse(name, "it returns several views; give MultiView several."))
    # Whatever a newer torchvision brings may move pixels: better an error than coords that lie.
    for name in sorted(set(dispatched_functionals()) - done - {"five_crop", "ten_crop"}):
        for cls in (ViewCoords, DenseCoords):
            F.register_kernel(name, cls)(_refuse(name, "this version of densessl does not know the functional."))


def dispatched_functionals() -> list[str]:
    """Names of the installed torchvision's functionals that take an image and may have kernels per type.

    Recognised by their kernel for images, ``{name}_image``, which every one of them has beside it.
    """
    return [name for name in dir(F) if not name.startswith("_") and hasattr(F, f"{name}_image")]


_register()
