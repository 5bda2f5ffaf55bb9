"""What a run's options make of the images: files, crops and matches, counted on a sample."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from densessl import DistanceMatcher, MaskedView, View
from densessl.geometry import inside
from examples.pretrain.common.data.decode import read_photo
from examples.pretrain.common.data.label_masks import mask_warning
from examples.pretrain.common.data.sources import evenly
from examples.pretrain.common.data.views import Batch, DrawViews
from examples.pretrain.common.step import valid_cells

FILES = 2000  # whose headers are read
PAIRS = 240  # that are drawn
SECONDS = 10.0  # after which no further photo is drawn from


class Files(NamedTuple):
    """What the folder holds.

    Attributes:
        found: Number of images to train on.
        held_out: Number of images kept for the probe.
        looked_at: Number of files whose headers were read, evenly spaced.
        unreadable: Those of them, and of the photos that were drawn from, that cannot be read.
        small: How many of those looked at are smaller than the views.
        sides: Median width and height of those looked at.
        masks: A warning where the files look like label masks; None where they do not.
    """

    found: int
    held_out: int
    looked_at: int
    unreadable: list[Path]
    small: int
    sides: tuple[int, int]
    masks: str | None


class Pairs(NamedTuple):
    """What the draws gave.

    Attributes:
        drawn: Number of pairs of views.
        unmatched: Share of the pairs that match nothing, drawn once.
        unmatched_redrawn: Share of the pairs that match nothing, drawn again as ``data.redraws`` says.
        positives: Mean number of positives of a query cell.
        enlarged: Share of the crops that have fewer pixels than the view that is made of them.
        shrinking: Median of the pixels of the image that one pixel of a view stands for, along a side.
        nodata: Share of the views' pixels that show nothing: outside of the image, or without data.
    """

    drawn: int
    unmatched: float
    unmatched_redrawn: float
    positives: float
    enlarged: float
    shrinking: float
    nodata: float


class Drawn(NamedTuple):
    """A photo and what was drawn of it: the pair of the run, and further ones."""

    name: str
    image: Tensor
    pairs: list[Batch]


def look_at_files(paths: Sequence[Path], held_out: int, size: int) -> Files:
    """Reads headers: a size costs a hundredth of a decoded image."""
    sides, unreadable = [], []
    chosen = evenly(len(paths), FILES)
    for index in chosen:
        try:
            with Image.open(paths[index]) as file:
                sides.append(file.size)
        except Exception:  # Pillow raises whatever its decoders do
            unreadable.append(paths[index])
    middle = (0, 0)
    if sides:
        middle = tuple(sorted(side[axis] for side in sides)[len(sides) // 2] for axis in range(2))
    small = sum(min(side) < size for side in sides)
    masks = mask_warning(paths, "data.folder")
    return Files(len(paths), held_out, len(chosen), unreadable, small, middle, masks)


def draw_pairs(
    paths: Sequence[Path], draw: DrawViews, channels: int, cells: tuple[int, int], threshold: float, in_pixels: bool
) -> tuple[Pairs, list[Drawn], list[Path]]:
    """Draws pairs of views as the run would, over several epochs of a sample of photos.

    Args:
        paths: Paths of the photos.
        draw: Draws the two views of a photo, as the run does.
        channels: Number of channels of the images.
        cells: Size of the feature map of a view.
        threshold: Cells match below this distance, in diagonals of a cell.
        in_pixels: Whether distances are measured in pixels of the image.

    Returns:
        The counts, the first draws of the photos, and the photos that cannot be read.

    Raises:
        ValueError: If none can be read.
    """
    once, match = copy.copy(draw), DistanceMatcher(threshold)
    once.redraws = 0
    counts: list[tuple[bool, bool, float]] = []
    crops: list[Tensor] = []
    seen, unreadable, kept = [], [], []
    photos = evenly(len(paths), PAIRS // 6)
    begun = time.perf_counter()
    for index in photos:
        if kept and time.perf_counter() - begun > SECONDS:
            break
        try:
            image = read_photo(paths[index], channels)
        except (RuntimeError, OSError):
            unreadable.append(paths[index])
            continue
        drawn = []
        for epoch in range(max(6, PAIRS // len(photos))):
            pair = once(image, str(paths[index]), epoch, index)
            masks = [match_of(pair, match, cells, in_pixels)]
            # A draw that shares cells is the run's: the first of its draws is the same.
            if draw.redraws and not draw.share_cells(pair.view1, pair.view2):
                pair = draw(image, str(paths[index]), epoch, index)
                masks.append(match_of(pair, match, cells, in_pixels))
            counts.append((not masks[0].any(), not masks[-1].any(), float(masks[-1].sum()) / masks[-1].shape[0]))
            for view in (pair.view1, pair.view2):
                crops.append(crop_sides(view))
                seen.append(share_without_data(view))
            drawn.append(pair)
        kept.append(Drawn(paths[index].name, image, drawn))
    if not kept:
        raise ValueError(f"data.folder: expected photos, got {len(unreadable)} files of which none can be read")
    first, last, positives = (torch.tensor(column, dtype=torch.float64) for column in zip(*counts, strict=True))
    shrinking = torch.stack(crops) / draw.size
    pairs = Pairs(
        len(counts),
        float(first.mean()),
        float(last.mean()),
        float(positives.mean()),
        float((shrinking < 1).double().mean()),
        float(shrinking.median()),
        sum(seen) / len(seen),
    )
    return pairs, kept, unreadable


def match_of(pair: Batch, match: DistanceMatcher, cells: tuple[int, int], in_pixels: bool) -> Tensor:
    """The mask of one pair, ``(N, N)``."""
    one, other = (type(view)(*(part[None] for part in view)) for view in (pair.view1, pair.view2))
    size = one.source_size if in_pixels else None
    return match(one.coords, other.coords, cells, cells, size, valid_cells(one, cells), valid_cells(other, cells))[0]


def crop_sides(view: View | MaskedView) -> Tensor:
    """Side in pixels of the image of a square as large as the crop."""
    corners = corners_of(view)
    rolled = corners.roll(-1, 0)
    area = (corners[:, 0] * rolled[:, 1] - corners[:, 1] * rolled[:, 0]).sum().abs() / 2
    height, width = view.source_size.tolist()
    return (area * height * width).sqrt()


def corners_of(view: View | MaskedView) -> Tensor:
    """The view's corners in its image's unit square, ``(4, 2)``, x and y."""
    square = torch.tensor([[0.0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    placed = square @ view.coords.mT
    return placed[:, :2] / placed[:, 2:]


def share_without_data(view: View | MaskedView) -> float:
    """Share of a view's pixels that show nothing."""
    if isinstance(view, MaskedView):
        return float((view.mask == 0).double().mean())
    return float((~inside(view.coords[None], (view.image.shape[-2], view.image.shape[-1]))).double().mean())
