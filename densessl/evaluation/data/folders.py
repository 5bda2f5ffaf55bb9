"""CamVid, and one's own images and masks."""

from __future__ import annotations

from pathlib import Path

from densessl.evaluation.data._files import images_below, need_folder
from densessl.evaluation.data.labelled import IGNORED, LabelledImages


def camvid(folder: str | Path, split: str = "test") -> LabelledImages:
    """CamVid with the 11 classes of SegNet; pixels of number 11 are not labelled and are ignored.

    Args:
        folder: Folder that holds ``images/SPLIT/*`` and ``labels/SPLIT/*.png`` of the same stems.
        split: "train", "val" or "test".

    Raises:
        ValueError: If folders or files are missing.
    """
    root = Path(folder)
    layout = f"images/{split}/* and labels/{split}/*.png of the same stems in {root}"
    return _pairs(root, split, "labels", layout, 11, {**{number: number for number in range(11)}, 11: IGNORED})


def own_masks(folder: str | Path, split: str = "test") -> LabelledImages:
    """One's own images and masks, in the layout of the segmentation recipe.

    Args:
        folder: Folder that holds ``images/SPLIT/*``, ``masks/SPLIT/*.png`` (or ``labels/SPLIT/*.png``) of the same
            stems with a class number for each pixel (255 where it is ignored), and ``classes.txt``, the name of a class
            a line, in the order of their numbers from 0.
        split: Name of the folders of a split.

    Raises:
        ValueError: If folders or files are missing, if a mask has no image, or if ``classes.txt`` names fewer than 2 or
            more than 255 classes, or one of them twice.
    """
    root = Path(folder)
    kind = "labels" if (root / "labels" / split).is_dir() and not (root / "masks" / split).is_dir() else "masks"
    layout = f"images/{split}/*, {kind}/{split}/*.png of the same stems and classes.txt in {root}"
    path = root / "classes.txt"
    if not path.is_file():
        raise ValueError(f"folder: expected {layout}, got no file {path}")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not 2 <= len(names) <= 255 or len(set(names)) < len(names):
        raise ValueError(f"folder: expected 2 to 255 different names in {path}, got {len(names)} lines")
    known = {**{number: number for number in range(len(names))}, 255: IGNORED}
    return _pairs(root, split, kind, layout, len(names), known)


def _pairs(root: Path, split: str, kind: str, layout: str, classes: int, class_of: dict[int, int]) -> LabelledImages:
    masks = need_folder(root / kind / split, layout)
    images = images_below(need_folder(root / "images" / split, layout))
    orphans = sorted({file.stem for file in masks.glob("[!.]*.png")} - {path.stem for path in images})
    if orphans:
        raise ValueError(f"folder: {masks / orphans[0]}.png has no image ({len(orphans)} such files)")
    return LabelledImages(images, [masks / f"{path.stem}.png" for path in images], classes, class_of, layout)
