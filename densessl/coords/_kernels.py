"""Coords as torchvision tv_tensors: they follow every geometric transform of torchvision v2.

Each geometric functional is one map from the pixels of its output to the pixels of its input. It is written down once
below; ``ViewCoords`` multiplies it on, ``DenseCoords`` resamples itself with it. torchvision passes a tensor
type for which a functional has no kernel through unchanged: pixels would move and coords would stay. So every
functional of the installed torchvision is either followed, known to leave pixels where they are, or registered here to
raise.

Positions are continuous: pixel i covers [i, i + 1], edges at integers, as torchvision's own samplers have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl.coords._functionals import (
    FOLLOWED,
    QUERIES,
    STATIONARY,
    CanvasSize,
    Matrix,
    Move,
    dispatched_functionals,
    pad_move,
)
from densessl.geometry import cell_centers, check_precision, sample_dense


def _single(data: Any) -> Tensor:
    """Coords as float32; half precision is refused, because what it lost does not come back."""
    if isinstance(data, Tensor) and (data.is_floating_point() or data.is_complex()):
        check_precision(data, "data")
    return torch.as_tensor(data, dtype=torch.float32)


class ViewCoords(tv_tensors.TVTensor):
    """The homography from the view's unit square to the source image's unit square.

    It is the identity at first, when the view still is the source image; afterwards every geometric transform of
    torchvision v2 moves it along with the image. A transform that is no homography (elastic, five-crop, a crop with
    mirrored padding) raises ValueError.

    Args:
        data: Homography ``(3, 3)``; None means the identity.
        canvas_size: Height and width of the image that these coords belong to, in pixels.

    Attributes:
        canvas_size: Height and width of the current view, in pixels.

    Raises:
        ValueError: If ``data`` is not ``(3, 3)`` or is in half precision, or ``canvas_size`` is not (height, width).

    Examples:
        >>> coords = ViewCoords(canvas_size=(80, 100))
        >>> v2.functional.horizontal_flip(coords)[0].tolist()
        [-1.0, 0.0, 1.0]
    """

    canvas_size: CanvasSize

    def __new__(cls, data: Any = None, *, canvas_size: Sequence[int]) -> ViewCoords:
        matrix = torch.eye(3) if data is None else _single(data)
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

    These are the dense counterpart of ``ViewCoords``, for pipelines with elastic transforms. They also know which
    pixels are padding, wherever in the pipeline it came in.

    Args:
        data: Dense coords ``(2, H, W)``, x and y; None means the identity.
        canvas_size: Height and width of the image in pixels; needed if ``data`` is None.

    Attributes:
        canvas_size: Height and width of the current view, in pixels.

    Raises:
        ValueError: If ``data`` is not ``(2, H, W)``, or neither it nor ``canvas_size`` is given.

    Examples:
        >>> coords = DenseCoords(canvas_size=(80, 100))
        >>> v2.functional.crop(coords, 10, 20, 40, 50).shape
        torch.Size([2, 40, 50])
    """

    def __new__(cls, data: Any = None, *, canvas_size: Sequence[int] | None = None) -> DenseCoords:
        if data is None:
            if canvas_size is None:
                raise ValueError("canvas_size: expected (height, width) where no data is given, got None")
            h, w = canvas_size
            data = torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"))
        dense = _single(data)
        if dense.ndim != 3 or dense.shape[0] != 2:
            raise ValueError(f"data: expected dense coords (2, H, W), got {tuple(dense.shape)}")
        return dense.as_subclass(cls)

    @property
    def canvas_size(self) -> CanvasSize:
        return self.shape[-2], self.shape[-1]


# --- the two kernels --------------------------------------------------------------------------------------------------


def _between_units(matrix: Matrix, source: CanvasSize, view: CanvasSize) -> Tensor:
    """Turns a move between pixels, (view) -> (source), into one between unit squares, in float64."""
    per_source, per_view = (source[1], source[0], 1), (view[1], view[0], 1)
    rows = [[matrix[i][j] * per_view[j] / per_source[i] for j in range(3)] for i in range(3)]
    return torch.tensor(rows, dtype=torch.float64)


def _follow(move: Callable[..., Move]) -> Callable[..., ViewCoords]:
    def kernel(coords: ViewCoords, *args: Any, **kwargs: Any) -> ViewCoords:
        matrix, canvas = move(coords.canvas_size, *args, **kwargs)
        plain = coords.as_subclass(Tensor)
        moved = plain.double() @ _between_units(matrix, coords.canvas_size, canvas).to(plain.device)
        # The sign says what lies before the horizon and must stay; the weight at the corner may be none, or behind.
        scale = moved[2, 2] if moved[2, 2] > 1e-6 * moved.abs().amax() else moved.abs().amax()
        return ViewCoords((moved / scale).float(), canvas_size=canvas)

    return kernel


def _follow_densely(move: Callable[..., Move]) -> Callable[..., DenseCoords]:
    def kernel(coords: DenseCoords, *args: Any, **kwargs: Any) -> DenseCoords:
        matrix, canvas = move(coords.canvas_size, *args, **kwargs)
        points = cell_centers(_between_units(matrix, coords.canvas_size, canvas)[None], canvas)[0]
        return _resample(coords, points.float(), canvas)

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
    return _follow(pad_move)(coords, padding)


def _shows_whole_source(coords: ViewCoords) -> bool:
    """Then everything beyond the view's edges is beyond the source's, and matches nothing."""
    view_from_image = torch.linalg.inv(coords.as_subclass(Tensor).double())
    corners = view_from_image @ view_from_image.new_tensor([[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
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
    done = {functional.__name__ for functional in FOLLOWED} | {"elastic"} | STATIONARY | QUERIES
    for cls in (ViewCoords, DenseCoords):
        F.register_kernel(F.get_size, cls)(_canvas)
        for name in sorted(STATIONARY & set(dispatched_functionals())):
            F.register_kernel(name, cls)(_stay)
        for name in ("five_crop", "ten_crop"):
            F.register_kernel(getattr(F, name), cls)(_refuse(name, "it returns several views; give MultiView several."))
    # A newer torchvision may bring functionals that move pixels: an error is better than wrong coords.
    for name in sorted(set(dispatched_functionals()) - done - {"five_crop", "ten_crop"}):
        for cls in (ViewCoords, DenseCoords):
            F.register_kernel(name, cls)(_refuse(name, "this version of densessl does not know the functional."))


_register()
