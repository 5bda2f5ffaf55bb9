"""ADE20K, Cityscapes and COCO-Stuff."""

from __future__ import annotations

from itertools import chain, repeat
from pathlib import Path

from densessl.evaluation.data._files import images_below, need_folder
from densessl.evaluation.data.labelled import IGNORED, LabelledImages

# The ids of Cityscapes' label images that are scored, in the order of their train ids.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# Ids (from 0) of COCO's list of 91 things that no image holds.
_COCO_UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
# The groups of the things, as (group, how many ids in a row), and of each of the 91 kinds of stuff.
_COCO_THINGS = ((9, 1), (11, 8), (8, 6), (7, 10), (6, 8), (10, 10), (5, 8), (2, 10), (3, 10), (0, 6), (1, 6), (4, 8))
_COCO_STUFF = """
    17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 20 22 15
    17 16 15 22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 17 22
    14 18 18 18 18 18 18 18 26 26 19 19 24
"""


def ade20k(folder: str | Path, split: str = "validation") -> LabelledImages:
    """ADE20K's scene parsing benchmark, 150 classes; what belongs to none (number 0) is ignored.

    Args:
        folder: Folder that holds ``ADEChallengeData2016``, or is that folder: ``images/SPLIT/*.jpg``,
            ``annotations/SPLIT/*.png``.
        split: "training" or "validation".

    Raises:
        ValueError: If the split is unknown, or folders or files are missing.
    """
    _check_split(split, ("training", "validation"))
    root = Path(folder)
    root = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    layout = f"ADE20K's images/{split}/*.jpg and annotations/{split}/*.png in {root}"
    need_folder(root / "annotations" / split, layout)
    images = images_below(need_folder(root / "images" / split, layout))
    labels = [root / "annotations" / split / f"{path.stem}.png" for path in images]
    return LabelledImages(images, labels, 150, {0: IGNORED, **{number: number - 1 for number in range(1, 151)}}, layout)


def cityscapes(folder: str | Path, split: str = "val") -> LabelledImages:
    """Cityscapes with fine labels, the 19 classes that are scored.

    Args:
        folder: Folder that holds ``leftImg8bit/SPLIT/CITY/*_leftImg8bit.png`` and
            ``gtFine/SPLIT/CITY/*_gtFine_labelIds.png``.
        split: "train" or "val".

    Raises:
        ValueError: If the split is unknown, or folders or files are missing.
    """
    _check_split(split, ("train", "val"))
    root = Path(folder)
    layout = f"Cityscapes' leftImg8bit/{split}/CITY and gtFine/{split}/CITY in {root}"
    images = sorted(need_folder(root / "leftImg8bit" / split, layout).glob("*/*_leftImg8bit.png"))
    fine = need_folder(root / "gtFine" / split, layout)
    labels = [
        fine / path.parent.name / f"{path.name.removesuffix('_leftImg8bit.png')}_gtFine_labelIds.png" for path in images
    ]
    class_of = dict.fromkeys(range(34), IGNORED) | {number: place for place, number in enumerate(_CITYSCAPES)}
    return LabelledImages(images, labels, 19, class_of, layout)


def coco_stuff(folder: str | Path, split: str = "val2017", *, classes: int = 171) -> LabelledImages:
    """COCO-Stuff 164k by its label images ("stuffthingmaps"), numbers 0 to 181 and 255 where a pixel is not labelled.

    Args:
        folder: Folder that holds ``images/SPLIT/*.jpg`` (or ``SPLIT/*.jpg``) and ``annotations/SPLIT/*.png`` (or
            ``stuffthingmaps_trainval2017/SPLIT/*.png``).
        split: "train2017" or "val2017".
        classes: 171: all that occur, in the order of their numbers. 27: the groups that unsupervised segmentation is
            quoted on since PiCIE (Cho et al. 2021), 12 of things and 15 of stuff. Published rows of the 27 use a list
            of 2,175 of the val2017 images; here all of them are read.

    Raises:
        ValueError: If the split or the number of classes is unknown, or folders or files are missing.
    """
    _check_split(split, ("train2017", "val2017"))
    if classes not in (171, 27):
        raise ValueError(f"classes: expected 171 or 27, got {classes}")
    root = Path(folder)
    layout = f"COCO-Stuff's images/{split}/*.jpg and annotations/{split}/*.png in {root}"
    photos, maps = root / "images" / split, root / "annotations" / split
    photos = photos if photos.is_dir() else root / split
    maps = maps if maps.is_dir() else root / "stuffthingmaps_trainval2017" / split
    need_folder(maps, layout)
    images = images_below(need_folder(photos, layout))
    labels = [maps / f"{path.stem}.png" for path in images]
    return LabelledImages(images, labels, classes, {**_coco_class_of(classes), 255: IGNORED}, layout)


def _coco_class_of(classes: int) -> dict[int, int]:
    if classes == 171:
        return {number: place for place, number in enumerate(n for n in range(182) if n not in _COCO_UNUSED)}
    things = chain.from_iterable(repeat(group, count) for group, count in _COCO_THINGS)
    return dict(enumerate([*things, *map(int, _COCO_STUFF.split())]))


def _check_split(split: str, known: tuple[str, ...]) -> None:
    if split not in known:
        raise ValueError(f"split: expected one of {', '.join(known)}, got {split!r}")
