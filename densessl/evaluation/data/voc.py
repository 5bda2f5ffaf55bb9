"""Pascal VOC 2012, and its training images with the labels of SBD ("trainaug")."""

from __future__ import annotations

from pathlib import Path

from densessl.evaluation.data._files import lines_of, need_folder
from densessl.evaluation.data.labelled import IGNORED, LabelledImages

_CLASS_OF = {**{number: number for number in range(21)}, 255: IGNORED}


def voc(folder: str | Path, split: str = "val", *, sbd: str | Path | None = None) -> LabelledImages:
    """Pascal VOC 2012 for segmentation, 21 classes with the background; the rims of objects are ignored.

    Args:
        folder: Folder that holds ``VOCdevkit/VOC2012``, or ``VOC2012``, or is that folder.
        split: "train", "val", "trainval", or "trainaug", the 10,582 images of VOC's train split and of the Semantic
            Boundaries Dataset (SBD) without VOC's val split.
        sbd: Folder of SBD, for "trainaug", which holds ``img``, ``cls``, ``train.txt`` and ``val.txt``. None: the
            folder of VOC holds ``ImageSets/Segmentation/trainaug.txt`` and ``SegmentationClassAug``, the form in which
            the merged labels are passed on.

    Raises:
        ValueError: If the split is unknown, or folders or files are missing.
    """
    if split not in ("train", "val", "trainval", "trainaug"):
        raise ValueError(f'split: expected "train", "val", "trainval" or "trainaug", got {split!r}')
    if sbd is not None and split != "trainaug":
        raise ValueError(f'sbd: expected None for split {split!r}; it serves "trainaug" alone')
    root = _root(Path(folder))
    layout = f"VOC 2012's JPEGImages, SegmentationClass and ImageSets/Segmentation in {root}"
    lists = root / "ImageSets" / "Segmentation"
    if split == "trainaug" and sbd is None:
        layout = f"trainaug.txt and SegmentationClassAug in {root}, or the folder of SBD (sbd=...)"
        names = lines_of(lists / "trainaug.txt", layout)
        # Lists that are passed around name files (/JPEGImages/2007_000032.jpg ...), or stems as VOC's own do.
        stems = [Path(name).stem for name in names]
        masks = need_folder(root / "SegmentationClassAug", layout)
    else:
        stems = lines_of(lists / f"{'train' if split == 'trainaug' else split}.txt", layout)
        masks = need_folder(root / "SegmentationClass", layout)
    images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    labels = [masks / f"{stem}.png" for stem in stems]
    if sbd is not None:
        taken = set(stems) | set(lines_of(lists / "val.txt", layout))
        place = Path(sbd)
        for part in ("train", "val"):
            stated = f"SBD's img, cls, train.txt and val.txt in {place}"
            new = [stem for stem in lines_of(place / f"{part}.txt", stated) if stem not in taken]
            images += [place / "img" / f"{stem}.jpg" for stem in new]
            labels += [place / "cls" / f"{stem}.mat" for stem in new]
    return LabelledImages(images, labels, 21, _CLASS_OF, layout)


def _root(folder: Path) -> Path:
    for place in (folder / "VOCdevkit" / "VOC2012", folder / "VOC2012", folder):
        if (place / "JPEGImages").is_dir():
            return place
    raise ValueError(f"folder: expected VOCdevkit/VOC2012 with JPEGImages below {folder}, found no such folder")
