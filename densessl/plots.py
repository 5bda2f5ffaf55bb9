"""Figures: which cells match, what one cell is similar to, what a feature map looks like.

Each function returns a ``matplotlib.figure.Figure`` made without pyplot, so nothing is shown, registered or left open;
``figure.savefig("name.png")`` writes it. matplotlib is the extra ``plots`` and is imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from densessl._pca import pca_colours as pca_colours  # a part of this module's interface
from densessl._sums import check_mask, positive_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Size = tuple[int, int]
_MATCH = "#ffd400"  # with its black rim it is readable on dark and on bright photos


def plot_correspondence(
    image_q: Tensor,
    image_k: Tensor,
    mask: Tensor,
    size_q: Size,
    size_k: Size | None = None,
    *,
    cell: int | None = None,
    max_lines: int = 40,
) -> Figure:
    """Draws two views side by side, joins matched cells by lines, and shows one cell with all its matches large.

    Args:
        image_q: Query view ``(3, H, W)``, uint8 or float in 0..1 (clipped).
        image_k: Key view in the same form; its size may differ.
        mask: One image's slice of a matcher's mask, boolean ``(Nq, Nk)``, strided or sparse.
        size_q: Height and width ``(h, w)`` of the query map in cells.
        size_k: Height and width of the key map; None means those of the query map.
        cell: Row-major index of the query cell to draw large; None takes the matched cell nearest to the map's centre.
        max_lines: Largest number of thin lines, which are picked evenly among the matched pairs.

    Returns:
        The figure. If there is no match, it says so.

    Raises:
        ValueError: If a shape, dtype or indices is not as described.
        ImportError: If matplotlib is not installed.

    Examples:
        >>> mask = torch.eye(49, dtype=torch.bool)
        >>> figure = plot_correspondence(torch.rand(3, 64, 64), torch.rand(3, 64, 64), mask, size_q=(7, 7))
        >>> figure.savefig("matches.png")
    """
    from_q, from_k = _pixels(image_q, "image_q"), _pixels(image_k, "image_k")
    size_k = size_q if size_k is None else size_k
    n_q, n_k = _cells(size_q, "size_q"), _cells(size_k, "size_k")
    if mask.dtype != torch.bool or tuple(mask.shape) != (n_q, n_k):
        raise ValueError(
            f"mask: expected bool (Nq, Nk) = {(n_q, n_k)} of one image, got {mask.dtype} {tuple(mask.shape)}"
        )
    check_mask(mask[None])
    if mask.layout == torch.sparse_coo:
        found = positive_pairs(mask[None])
        pairs = found[1:, found[0] == 0].T.cpu()
    else:
        pairs = mask.nonzero().cpu()
    if cell is None:
        cell = _most_central(pairs[:, 0].unique(), size_q)
    _check_cell(cell, n_q)

    figure, (left, right) = _panels((from_q, from_k))
    left.set_title(f"query view, {size_q[0]}x{size_q[1]} cells")
    right.set_title(f"key view, {len(pairs)} matched pairs")
    for axes, pixels, size in ((left, from_q, size_q), (right, from_k, size_k)):
        _show(axes, pixels)
        _grid(axes, pixels, size)
    for index in np.unique(np.linspace(0, len(pairs) - 1, min(max_lines, len(pairs))).astype(int)):
        start = _center(int(pairs[index, 0]), from_q, size_q)
        _join(figure, left, right, start, _center(int(pairs[index, 1]), from_k, size_k), "#ffffff", 0.5, 0.45)
    matches = [int(key) for query, key in pairs.tolist() if query == cell]
    for key in matches:
        _frame(right, key, from_k, size_k, _MATCH)
        start, end = _center(cell, from_q, size_q), _center(key, from_k, size_k)
        _join(figure, left, right, start, end, _MATCH, 2.0, 1.0, dots=True)
    _frame(left, cell, from_q, size_q, _MATCH)
    if not len(pairs):
        figure.suptitle("no matched pair")
    return figure


def plot_similarity(
    features_q: Tensor,
    image_q: Tensor,
    cell: int,
    features_k: Tensor | None = None,
    image_k: Tensor | None = None,
) -> Figure:
    """Cosine similarity of one cell to all cells of the same or of another map, as a heat map over the image.

    Args:
        features_q: Feature map ``(C, h, w)``, floating point, that the cell lies in.
        image_q: Image of that map, ``(3, H, W)``, uint8 or float in 0..1 (clipped).
        cell: Row-major index of the query cell.
        features_k: Feature map to compare with, ``(C, h', w')``; None means ``features_q``.
        image_k: Image of ``features_k``; the two are given together.

    Returns:
        The figure: the query image with the cell framed, the key image if there is one, and the compared image under
        its similarities.

    Raises:
        ValueError: If a shape, dtype or indices is not as described.
        ImportError: If matplotlib is not installed.

    Examples:
        >>> figure = plot_similarity(torch.rand(32, 7, 7), torch.rand(3, 64, 64), cell=24)
    """
    if (features_k is None) != (image_k is None):
        given, missing = ("image_k", "features_k") if features_k is None else ("features_k", "image_k")
        raise ValueError(f"{missing}: expected together with {given}, got None")
    features_k = features_q if features_k is None else features_k
    query, key = _unit_map(features_q, "features_q"), _unit_map(features_k, "features_k")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"features_k: expected C = {query.shape[0]} channels as features_q, got {tuple(key.shape)}")
    from_q = _pixels(image_q, "image_q")
    from_k = from_q if image_k is None else _pixels(image_k, "image_k")
    size_q: Size = (query.shape[1], query.shape[2])
    _check_cell(cell, size_q[0] * size_q[1])
    similarity = torch.einsum("c,chw->hw", query.flatten(1)[:, cell], key).numpy()

    figure, panels = _panels((from_q, from_k) if image_k is None else (from_q, from_k, from_k))
    panels[0].set_title("query cell")
    _show(panels[0], from_q)
    _frame(panels[0], cell, from_q, size_q, _MATCH)
    if image_k is not None:
        panels[1].set_title("key image")
        _show(panels[1], from_k)
    right = panels[-1]
    right.set_title("cosine to the query cell")
    _show(right, from_k.mean(2, keepdims=True).repeat(3, 2))
    height, width = from_k.shape[:2]
    heat = right.imshow(
        similarity, cmap="magma", vmax=1.0, alpha=0.75, extent=(0, width, height, 0), interpolation="nearest"
    )
    figure.colorbar(heat, ax=right, fraction=0.046, label="cosine")
    return figure


def plot_pca(features: Tensor, image: Tensor) -> Figure:
    """The first three principal components of a feature map as colours, beside its image: see ``pca_colours``.

    Args:
        features: Feature map ``(C, h, w)``, floating point, with C and h * w at least 3.
        image: Image of that map, ``(3, H, W)``, uint8 or float in 0..1 (clipped).

    Returns:
        The figure; its title says how much of the variance the three components hold. A map without variance is grey.

    Raises:
        ValueError: If a shape or dtype is not as described.
        ImportError: If matplotlib is not installed.

    Examples:
        >>> figure = plot_pca(torch.rand(32, 7, 7), torch.rand(3, 64, 64))
    """
    pixels = _pixels(image, "image")
    unit = _unit_map(features, "features")
    channels, h, w = unit.shape
    if channels < 3 or h * w < 3:
        raise ValueError(f"features: expected (C, h, w) with C and h * w at least 3, got {tuple(features.shape)}")
    colours, held = pca_colours(unit[None])

    figure, (left, right) = _panels((pixels, pixels))
    left.set_title("image")
    _show(left, pixels)
    right.set_title(f"{h}x{w} cells, 3 components hold {held:.0%}")
    right.set_axis_off()
    extent = (0, pixels.shape[1], pixels.shape[0], 0)
    right.imshow(colours[0].permute(1, 2, 0).numpy(), extent=extent, interpolation="nearest")
    return figure


def _pixels(image: Tensor, name: str) -> np.ndarray:
    """(H, W, 3) float in 0..1."""
    if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ValueError(
            f"{name}: expected uint8, or floating point in 0..1, (3, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    image = image.detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)
    return image.permute(1, 2, 0).numpy()


def _unit_map(features: Tensor, name: str) -> Tensor:
    if features.ndim != 3 or not features.is_floating_point():
        raise ValueError(f"{name}: expected floating point (C, h, w), got {features.dtype} {tuple(features.shape)}")
    return torch.nn.functional.normalize(features.detach().cpu().float(), dim=0)


def _cells(size: Size, name: str) -> int:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{name}: expected (h, w), both at least 1, got {size}")
    return size[0] * size[1]


def _check_cell(cell: int, cells: int) -> None:
    if not 0 <= cell < cells:
        raise ValueError(f"cell: expected a row-major index in 0..{cells - 1}, got {cell}")


def _most_central(candidates: Tensor, size: Size) -> int:
    h, w = size
    if not len(candidates):
        return (h // 2) * w + w // 2
    off_y = (candidates // w + 0.5) / h - 0.5
    off_x = (candidates % w + 0.5) / w - 0.5
    return int(candidates[(off_y.square() + off_x.square()).argmin()])


def _panels(images: tuple[np.ndarray, ...]) -> tuple[Figure, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("densessl.plots draws with matplotlib: pip install densessl[plots]") from error
    ratios = [image.shape[1] / image.shape[0] for image in images]
    figure = Figure(figsize=(3.4 * sum(ratios) + 0.4, 4.1), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(images), width_ratios=ratios, squeeze=False)
    return figure, list(axes[0])


def _show(axes: Axes, pixels: np.ndarray) -> None:
    """In pixel-edge coordinates, like densessl's coords: the image spans 0..W and 0..H."""
    axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0), interpolation="nearest")
    axes.set_axis_off()


def _grid(axes: Axes, pixels: np.ndarray, size: Size) -> None:
    height, width = pixels.shape[:2]
    axes.vlines(np.linspace(0, width, size[1] + 1), 0, height, color="white", linewidth=0.3, alpha=0.5)
    axes.hlines(np.linspace(0, height, size[0] + 1), 0, width, color="white", linewidth=0.3, alpha=0.5)


def _center(cell: int, pixels: np.ndarray, size: Size) -> tuple[float, float]:
    h, w = size
    return (cell % w + 0.5) * pixels.shape[1] / w, (cell // w + 0.5) * pixels.shape[0] / h


def _frame(axes: Axes, cell: int, pixels: np.ndarray, size: Size, colour: str) -> None:
    from matplotlib.patches import Rectangle

    x, y = _center(cell, pixels, size)
    width, height = pixels.shape[1] / size[1], pixels.shape[0] / size[0]
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="black", linewidth=4))
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=2))


def _join(
    figure: Figure,
    left: Axes,
    right: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    width: float,
    alpha: float,
    dots: bool = False,
) -> None:
    from matplotlib.patches import ConnectionPatch

    patch = ConnectionPatch(
        start, end, "data", "data", axesA=left, axesB=right, color=colour, linewidth=width, alpha=alpha
    )
    patch.set_in_layout(False)  # otherwise it pushes the titles off the figure
    figure.add_artist(patch)
    if dots:
        for axes, point in ((left, start), (right, end)):
            axes.plot(*point, "o", color=colour, markeredgecolor="black", markersize=5)
