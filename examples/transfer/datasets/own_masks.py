"""One's own masks: ``images/`` and ``masks/*.png`` of the same names, and ``classes.txt``, a class a line.

With sub-folders ``train`` and ``val`` in both, or without: then every fifth image is evaluated.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from examples.pretrain.common.data.decode import shown
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.sources import evenly
from examples.pretrain.common.samples import IGNORED
from examples.transfer.datasets.sizes import is_turned

log = logging.getLogger(__name__)

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
SPLITS = ("train", "val", "test")
EVALUATED = 5  # one image of so many, where there are no folders for the splits
CHECKED = 2000  # masks of a split that are read before the first step


def required_class_names(folder: str) -> list[str]:
    """Names of the classes, in the order of their ids from 0.

    Raises:
        ValueError: If there is no such file, if it names fewer than 2 or more than 255 classes, or one of them twice,
            or if a line is a plain number.
    """
    path = Path(folder, "classes.txt")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.folder: expected the names of the classes, a line each, in {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if NUMBER.fullmatch(line):
            raise ValueError(
                f"data.folder: expected a name in each line of {path}, got the number {line} in line {number}: the "
                "place of a line, counted from 0, is the number of its class in the masks"
            )
    names = [line for line in lines if line]
    if not 2 <= len(names) <= 255 or len(set(names)) < len(names):
        raise ValueError(f"data.folder: expected 2 to 255 different names in {path}, got {len(names)} lines: {names}")
    return names


def find_masks(folder: str, split: str) -> tuple[list[Path], list[Path]]:
    """Photos of a split and their masks.

    Args:
        folder: Folder that holds ``images`` and ``masks``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        ValueError: If there is no photo, if a mask has no photo or two, or if a mask is in colours; by file.
    """
    images, masks = Path(folder, "images"), Path(folder, "masks")
    there = [name for name in SPLITS if (images / name).is_dir()]
    if there and split not in there:
        wanted = f"a folder {split}" if split == "test" else "the folders train and val"
        raise ValueError(
            f"data.folder: expected {wanted} in {shown(images)}, or images without such folders, got "
            f"{' and '.join(there)} alone"
        )
    if not there and split == "test":
        raise ValueError(
            f"data.folder: expected a folder test in {shown(images)}, for run test, got images without such folders"
        )
    if there:
        images, masks = images / split, masks / split
    found = list(find_photos(images))
    places = [masks / path.relative_to(images).with_suffix(".png") for path in found]
    _check_pairs(found, places, masks)
    for path in places:
        if path.is_file():  # what is missing is told later, with its number
            _check_mode(path)
    if not there:
        kept = [i for i in range(len(found)) if (i % EVALUATED == EVALUATED // 2) == (split == "val")]
        found, places = [found[i] for i in kept], [places[i] for i in kept]
    return found, places


def check_masks(images: Sequence[Path], masks: Sequence[Path], classes: int, train: bool) -> None:
    """Reads masks before the first step, at most 2,000 of them; the others are checked when they are read.

    Args:
        images: Photos.
        masks: Their masks, one channel of 8 bits, all in place.
        classes: Number of classes.
        train: Whether they are to be trained on, for which one class is not enough.

    Raises:
        ValueError: If a mask cannot be read, has another size than its photo, or holds the number of no class; by file.
    """
    seen = np.zeros(256, dtype=bool)
    for i in evenly(len(masks), CHECKED):
        try:
            with Image.open(masks[i]) as file:
                numbers = np.array(file)
        except Exception as error:  # Pillow raises whatever its decoders do
            raise ValueError(f"data.folder: {shown(masks[i])} cannot be read: {error}") from error
        try:
            is_turned(images[i], (numbers.shape[0], numbers.shape[1]))
        except ValueError as error:
            raise ValueError(f"data.folder: the mask {shown(masks[i])}: {error}") from error
        here = np.bincount(numbers.ravel(), minlength=256) > 0
        unknown = np.flatnonzero(here[classes:IGNORED]) + classes
        if len(unknown):
            raise ValueError(
                f"data.folder: expected ids among 0..{classes - 1}, {IGNORED} in {shown(masks[i])}, got "
                f"{', '.join(map(str, unknown[:8]))}; classes.txt has {classes} lines"
            )
        seen |= here
    found = np.flatnonzero(seen[:IGNORED])
    if train and len(found) < 2:
        beside = f", beside {IGNORED}, which counts as nothing" if seen[IGNORED] else ""
        raise ValueError(
            f"data.folder: expected at least 2 classes in the masks of {shown(masks[0].parent)}, got "
            f"{', '.join(map(str, found)) or 'none'}{beside}: a mask holds in each pixel the number of its class, 0, "
            "1, 2, ..., a number for each line of classes.txt"
        )
    log.info("%d masks: %d with the right size and numbers", len(masks), min(len(masks), CHECKED))


def _check_pairs(images: list[Path], places: list[Path], masks: Path) -> None:
    """Each mask needs an image, and no two images share one."""
    image_of: dict[Path, Path] = {}
    for image, place in zip(images, places, strict=True):
        other = image_of.setdefault(place, image)
        if other is not image:
            raise ValueError(
                f"data.folder: expected one image for each mask, got {shown(other)} and {shown(image)} for "
                f"{shown(place)}"
            )
    drawn = (path for path in masks.rglob("*.png") if not any(part[0] == "." for part in path.relative_to(masks).parts))
    orphans = sorted(set(drawn) - set(places))
    if orphans:
        raise ValueError(f"data.folder: {shown(orphans[0])} has no image ({len(orphans)} such masks)")


def _check_mode(path: Path) -> None:
    try:
        with Image.open(path) as file:
            mode = file.mode
    except Exception as error:  # Pillow raises whatever its decoders do
        raise ValueError(f"data.folder: {shown(path)} cannot be read: {error}") from error
    if mode not in ("L", "P"):
        what = "in colours" if mode in ("RGB", "RGBA") else f"of mode {mode}"
        raise ValueError(
            f"data.folder: expected masks of class numbers, one channel of 8 bits, got {shown(path)} {what}: "
            "give each colour the number of its line in classes.txt, from 0, and 255 to what is ignored"
        )
