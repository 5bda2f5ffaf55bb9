"""Draws what pretraining changed: a photo's feature map and one cell's similarities, before and after.

    python benchmarks/studies/weights_figure.py docs/assets/weights.png

The photo is that of a cup which comes with scikit-image (CC0, by Rachel Michetti), or ``--photo FILE``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2.functional import resize

from densessl import hub
from densessl.plots import pca_colours
from examples.quickstart.loop import frozen_features

STRIDE = 8
BEFORE = "untrained_r10_study"


def read_photo(path: Path | None, width: int) -> Tensor:
    """The photo at this width, both sides whole numbers of cells, uint8 ``(3, H, W)``."""
    if path is None:
        from skimage.data import coffee

        photo = torch.from_numpy(coffee().copy()).permute(2, 0, 1)
    else:
        photo = decode_image(str(path), mode="RGB")
    height = round(photo.shape[1] * width / photo.shape[2] / STRIDE) * STRIDE
    return resize(photo, [height, width // STRIDE * STRIDE], antialias=True)


def similarity(features: Tensor, cell: tuple[int, int]) -> Tensor:
    """Cosine of one cell (row, column) to every cell of the map, ``(h, w)``, after the map's mean is taken away.

    Behind a ReLU no feature is negative, so that all cosines are large before that.
    """
    centred = torch.nn.functional.normalize(features - features.mean((1, 2), keepdim=True), dim=0)
    return torch.einsum("c,chw->hw", centred[:, cell[0], cell[1]], centred)


def draw(photo: Tensor, before: Tensor, after: Tensor, name: str, cell: tuple[int, int], path: Path) -> None:
    """Draws the figure.

    Args:
        photo: The photo, uint8 ``(3, H, W)``.
        before: Its feature map without training ``(C, h, w)``.
        after: Its feature map by the trained encoder.
        name: What the trained encoder is called.
        cell: Row and column of the cell that is compared with all others.
        path: File of the figure.
    """
    height, width = photo.shape[1:]
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 5.9 * height / width + 0.75), layout="constrained")
    extent = (0, width, height, 0)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.imshow(photo.permute(1, 2, 0).numpy(), extent=extent)
    axes[0, 0].set_title("photo", fontsize=10)
    axes[1, 0].set_title("one cell, compared with all", fontsize=10)
    for column, (title, features) in enumerate((("before: random weights", before), (f"after: {name}", after)), 1):
        colours, held = pca_colours(features[None])
        axes[0, column].imshow(colours[0].permute(1, 2, 0).numpy(), extent=extent, interpolation="nearest")
        axes[0, column].set_title(f"{title}\n3 components hold {held:.0%}", fontsize=10)
        heat = axes[1, column].imshow(
            similarity(features, cell).numpy(), cmap="cividis", vmin=-1, vmax=1, extent=extent, interpolation="nearest"
        )
    for axis in axes[1]:
        corner = (cell[1] * STRIDE, cell[0] * STRIDE)
        for edge, line in (("black", 4), ("white", 2)):
            axis.add_patch(Rectangle(corner, STRIDE, STRIDE, fill=False, edgecolor=edge, linewidth=line))
    figure.colorbar(heat, ax=axes[1], fraction=0.03, shrink=0.85, label="centred cosine")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the figure to the file that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="File of the figure.")
    parser.add_argument("--name", default="pixpro_infonce_r10_study", help="The trained encoder (%(default)s).")
    parser.add_argument("--photo", type=Path, help="Another photo (scikit-image's cup of coffee).")
    parser.add_argument("--width", type=int, default=512, help="Width of the photo in pixels (%(default)s).")
    parser.add_argument("--cell", default="0.85,0.9", help="Place of the cell, y,x in 0..1 (%(default)s).")
    args = parser.parse_args(argv)
    photo = read_photo(args.photo, args.width)
    before, after = (frozen_features(hub.load(name), photo[None])[0] for name in (BEFORE, args.name))
    y, x = (float(part) for part in args.cell.split(","))
    cell = (int(y * before.shape[1]), int(x * before.shape[2]))
    draw(photo, before, after, args.name, cell, args.out)


if __name__ == "__main__":
    main()
