"""One's own masks: ``images/SPLIT/*``, ``masks/SPLIT/*.png`` of the same stems, and ``classes.txt``, a name a line."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from examples.pretrain.common.data.decode import shown
from examples.pretrain.common.data.finding import find_photos


def class_names(folder: str) -> list[str]:
    """Names of the classes, in the order of their ids from 0.

    Raises:
        ValueError: If there is no such file, if it names fewer than 2 or more than 255 classes, or one of them twice.
    """
    path = Path(folder, "classes.txt")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.folder: expected the names of the classes, a line each, in {path}: {error}") from error
    if not 2 <= len(names) <= 255 or len(set(names)) < len(names):
        raise ValueError(f"data.folder: expected 2 to 255 different names in {path}, got {len(names)} lines: {names}")
    return names


def find_masks(folder: str, split: str) -> tuple[list[Path], list[Path]]:
    """Photos of a split and their masks.

    Raises:
        ValueError: If there is no photo, if a mask has no photo, or if a mask is in colours; by file.
    """
    images = find_photos(Path(folder, "images", split))
    place = Path(folder, "masks", split)
    masks = [place / f"{path.stem}.png" for path in images]
    orphans = sorted({path.stem for path in place.glob("[!.]*.png")} - {path.stem for path in images})
    if orphans:
        raise ValueError(f"data.folder: {place / orphans[0]}.png has no image ({len(orphans)} such masks)")
    for path in masks:
        if path.is_file():  # what is missing is told later, with its number
            _check_mode(path)
    return images, masks


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
