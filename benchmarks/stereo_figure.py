"""Draws docs/assets/stereo.png: scikit-image's stereo pair, matched by its disparity. Run from the root."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from skimage.data import stereo_motorcycle

from densessl import DistanceMatcher, coords_from_disparity
from densessl.plots import plot_correspondence

left, right, measured = stereo_motorcycle()
disparity = torch.from_numpy(measured)  # infinite where it is not known
height, width = disparity.shape
cells = (31, 46)
coords = coords_from_disparity(disparity)
whole = torch.eye(3)[None]  # the right image is the source
mask = DistanceMatcher(0.7, unit="key", sparse=True)(coords, whole, cells, None, torch.tensor([[height, width]]))

_, query, key = mask.indices().numpy()
row, column = query // cells[1], query % cells[1]
y, x = (row + 0.5) * height / cells[0], (column + 0.5) * width / cells[1]
truth = (x - measured[y.astype(int), x.astype(int)]) * cells[1] / width  # in cells of the right image
across = np.abs(truth - (key % cells[1] + 0.5))
near = np.mean((across <= 1) & (np.abs(key // cells[1] - row) <= 1))

shown = 12 * cells[1] + 22
images = (torch.from_numpy(image.copy()).permute(2, 0, 1) for image in (left, right))
figure = plot_correspondence(*images, mask[0], cells, cell=shown, max_lines=60)
without = np.setdiff1d(np.arange(cells[0] * cells[1]), query)
for cell in without:
    corner = (cell % cells[1] * width / cells[1], cell // cells[1] * height / cells[0])
    size = (width / cells[1], height / cells[0])
    figure.axes[0].add_patch(Rectangle(corner, *size, color="black", alpha=0.6, linewidth=0))
figure.suptitle(f"{near:.1%} of {len(query)} matched pairs within one cell of the disparity")
buffer = BytesIO()
figure.savefig(buffer)
# 256 colours are a third of the bytes.
Image.open(buffer).convert("RGB").quantize(256).save(
    Path(__file__).parents[1] / "docs" / "assets" / "stereo.png", optimize=True
)
print(f"{len(query)} pairs, {near:.4f} near, {len(without)} of {cells[0] * cells[1]} left cells match nothing")
