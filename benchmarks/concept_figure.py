"""Draws the figure of the page Concepts, from an image drawn here, with densessl's own views, geometry and matcher.

python benchmarks/concept_figure.py      (writes docs/assets/concept.png)
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Polygon
from torch import Tensor
from torchvision.transforms import v2

from densessl import DistanceMatcher, MultiView, View, cell_centers

SIZE = (7, 7)
COLORS = ("#d1495b", "#2a6f97")  # first view, second view


def concept_figure() -> bytes:
    """Image, two views, their cells and matches, as PNG."""
    image = _scene()
    first, second = _views(image)
    mask = DistanceMatcher(0.7)(first.coords[None], second.coords[None], SIZE, source_size=first.source_size[None])[0]

    figure = Figure(figsize=(11, 3.7), layout="constrained")
    FigureCanvasAgg(figure)
    source, left, right = figure.subplots(1, 3, width_ratios=[4 / 3, 1, 1])
    _draw_source(source, image, (first, second))
    _draw_view(left, first, COLORS[0], "view 1, 7 x 7 cells")
    _draw_view(right, second, COLORS[1], "view 2, turned and mirrored, 7 x 7 cells")
    _draw_matches(figure, (source, left, right), (first, second), mask)

    out = BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def _scene() -> Tensor:
    """An image with texture: sky, hills and discs, uint8 (3, 240, 320)."""
    h, w = 240, 320
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, w / h, w), indexing="ij")
    image = torch.stack([0.62 + 0.3 * y, 0.78 + 0.12 * y, 0.95 - 0.1 * y])
    for base, color in ((0.50, (0.45, 0.60, 0.55)), (0.62, (0.33, 0.50, 0.36)), (0.78, (0.20, 0.36, 0.22))):
        ridge = base + 0.05 * torch.sin(7 * x + 20 * base) + 0.025 * torch.sin(17 * x + 9 * base)
        shade = 1 + 0.08 * torch.sin(90 * x + 40 * y) * torch.sin(70 * y)
        image = torch.where(y > ridge, torch.tensor(color)[:, None, None] * shade, image)
    for cx, cy, radius, color in ((1.05, 0.2, 0.09, (1.0, 0.86, 0.4)), (0.45, 0.72, 0.1, (0.40, 0.28, 0.52))):
        distance = ((x - cx) ** 2 + (y - cy) ** 2).sqrt()
        image = torch.where(distance < radius, torch.tensor(color)[:, None, None], image)
    return (image.clamp(0, 1) * 255).to(torch.uint8)


def _views(image: Tensor) -> list[View]:
    """Two overlapping crops of different scale; the second is turned a little and mirrored."""
    first = v2.Compose([v2.RandomCrop((170, 170)), v2.Resize((224, 224))])
    turn = v2.RandomRotation((-12, -12), interpolation=v2.InterpolationMode.BILINEAR)
    second = v2.Compose([turn, v2.CenterCrop(190), v2.RandomCrop(150), v2.RandomHorizontalFlip(1.0), v2.Resize(224)])
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return MultiView(first, second)(image)


def _centers(view: View) -> Tensor:
    """Centres of a view's cells in source pixels, (N, 2)."""
    return cell_centers(view.coords[None], SIZE)[0] * view.source_size.flip(0)


def _corners(view: View) -> Tensor:
    """Corners of a view in source pixels, (4, 2)."""
    unit = torch.tensor([[0.0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    seen = view.coords @ unit
    return (seen[:2] / seen[2]).T * view.source_size.flip(0)


def _draw_source(axes: Any, image: Tensor, views: tuple[View, View]) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, image.shape[2], image.shape[1], 0))
    for view, color, marker in zip(views, COLORS, "ox", strict=True):
        axes.add_patch(Polygon(_corners(view).tolist(), closed=True, fill=False, edgecolor=color, linewidth=2))
        axes.scatter(*_centers(view).T.numpy(), s=14, c=color, marker=marker, linewidths=1.2)
    axes.set_title("source image, both views and the centres of their cells", fontsize=10)
    axes.set_axis_off()


def _draw_view(axes: Any, view: View, color: str, title: str) -> None:
    h, w = view.image.shape[-2:]
    axes.imshow(view.image.permute(1, 2, 0).numpy(), extent=(0, w, h, 0))
    for k in range(SIZE[0] + 1):
        axes.axhline(k * h / SIZE[0], color="white", linewidth=0.6)
    for k in range(SIZE[1] + 1):
        axes.axvline(k * w / SIZE[1], color="white", linewidth=0.6)
    for side in axes.spines.values():
        side.set(color=color, linewidth=3)
    axes.set(xlim=(0, w), ylim=(h, 0), xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def _draw_matches(figure: Figure, panels: tuple[Any, Any, Any], views: tuple[View, View], mask: Tensor) -> None:
    """Cells without a match darkened; one cell of view 1 and its matches filled and joined."""
    source, left, right = panels
    shown = int(mask.sum(1).argmax())
    for axes, matched in ((left, mask.any(1)), (right, mask.any(0))):
        for cell in (~matched).nonzero().flatten().tolist():
            _fill_cell(axes, cell, "black", 0.45)
    _fill_cell(left, shown, COLORS[0], 0.75)
    start = _place(left, shown)
    for cell in mask[shown].nonzero().flatten().tolist():
        _fill_cell(right, cell, COLORS[1], 0.75)
        line = ConnectionPatch(start, _place(right, cell), "data", "data", axesA=left, axesB=right, color="black", lw=1)
        figure.add_artist(line)
    x, y = _centers(views[0])[shown].tolist()
    source.scatter([x], [y], s=130, facecolors="none", edgecolors="black", linewidths=1.6)


def _place(axes: Any, cell: int) -> tuple[float, float]:
    """Centre of a cell in the view's own pixels."""
    (_, w), (h, _) = axes.get_xlim(), axes.get_ylim()
    row, column = divmod(cell, SIZE[1])
    return (column + 0.5) * w / SIZE[1], (row + 0.5) * h / SIZE[0]


def _fill_cell(axes: Any, cell: int, color: str, alpha: float) -> None:
    (_, w), (h, _) = axes.get_xlim(), axes.get_ylim()
    x, y = _place(axes, cell)
    dx, dy = w / SIZE[1] / 2, h / SIZE[0] / 2
    corners = [(x - dx, y - dy), (x + dx, y - dy), (x + dx, y + dy), (x - dx, y + dy)]
    axes.add_patch(Polygon(corners, closed=True, facecolor=color, alpha=alpha, edgecolor="none"))


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "assets" / "concept.png").write_bytes(concept_figure())
