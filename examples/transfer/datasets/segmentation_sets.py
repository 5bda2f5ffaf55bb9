"""Cityscapes, Pascal VOC and CamVid as pairs of an image and a map of class numbers, checked as they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes, SBDataset, VOCSegmentation
from torchvision.transforms.v2 import functional as F

from examples.pretrain.common.data.decode import read_photo
from examples.pretrain.common.data.depths import as_bytes
from examples.transfer.datasets.own_masks import check_masks, find_masks, required_class_names

IGNORE = 255  # the class number of pixels that neither loss nor metric counts, in all three
CLASSES = {"cityscapes": 19, "voc": 21, "camvid": 11}
LAYOUT = {
    "cityscapes": "leftImg8bit/{split}/CITY/*_leftImg8bit.png and gtFine/{split}/CITY/*_gtFine_labelIds.png",
    "voc": "VOCdevkit/VOC2012/ with ImageSets/Segmentation/{split}.txt, JPEGImages and SegmentationClass",
    "camvid": "images/{split}/*.jpg or *.png and labels/{split}/*.png",
    "own": "images/, masks/*.png and classes.txt",
}


def find_camvid(root: str, split: str) -> tuple[list[Path], list[Path]]:
    """CamVid's photos and its label images of the same names.

    Args:
        root: Folder that holds ``images/SPLIT`` and ``labels/SPLIT``.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        OSError: If there is no such folder.
        ValueError: If a label has no image.
    """
    photos, labels = Path(root) / "images" / split, Path(root) / "labels" / split
    images = [path for path in photos.iterdir() if path.suffix in (".jpg", ".png") and path.name[0] != "."]
    orphans = sorted({path.stem for path in labels.glob("[!.]*.png")} - {path.stem for path in images})
    if orphans:
        raise ValueError(
            f"data.folder: {labels / orphans[0]}.png labels an image that is not in {photos} "
            f"({len(orphans)} such labels)"
        )
    return images, [labels / f"{path.stem}.png" for path in images]


class Labelled(Dataset):
    """Image and class numbers, as tv_tensors through a transform.

    Args:
        images: Paths of the images.
        labels: Paths of their label images, or of the .mat files of SBD.
        class_of: ``(256,)``, the class number of each id in the label images, -1 where an id is not allowed.
        transform: Takes and returns a ``tv_tensors.Image`` and a ``tv_tensors.Mask``, both uint8.

    Raises:
        ValueError: If a file is missing, or there is none.
    """

    def __init__(
        self,
        images: list[Any],
        labels: list[Any],
        class_of: Tensor,
        transform: Callable[..., Any],
    ) -> None:
        missing = [(image, label) for image, label in zip(images, labels, strict=True) if not Path(label).is_file()]
        if missing:
            image, label = missing[0]
            raise ValueError(
                f"data.folder: expected a label image for each of {len(images)} images, {len(missing)} are missing; "
                f"the first is {label}, of the image {image}"
            )
        gone = [image for image in images if not Path(image).is_file()]
        if gone:
            raise ValueError(
                f"data.folder: {len(gone)} of {len(images)} listed images are missing; the first is {gone[0]}"
            )
        self.images, self.labels = images, labels
        self.class_of, self.transform = class_of, transform
        # File systems list in orders of their own: sorted, a seed draws the same batches everywhere.
        self.order = sorted(range(len(images)), key=lambda index: str(images[index]))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        number = self.order[index]
        name = self.labels[number]
        try:
            label = _read_label(name)
            image = read_photo(self.images[number], 3)
            if image.shape[1:] != (label.height, label.width):  # drawn on the pixels as they are stored, perhaps
                image = read_photo(self.images[number], 3, turn=False)
        except Exception as error:  # Pillow and scipy raise whatever their decoders do
            raise ValueError(f"data.folder: {self.images[number]} or {name} cannot be read: {error}") from error
        if image.shape[1:] != (label.height, label.width):
            raise ValueError(
                f"data.folder: {name} is {label.width}x{label.height} pixels, its image {self.images[number]} "
                f"{image.shape[2]}x{image.shape[1]}: expected equal sizes"
            )
        if label.mode not in ("L", "P"):
            raise ValueError(f"data.folder: expected ids in one channel of 8 bits in {name}, got mode {label.mode}")
        ids = F.pil_to_tensor(label)[0].long()
        classes = self.class_of[ids]
        if (classes < 0).any():
            allowed = (self.class_of >= 0).nonzero().flatten().tolist()
            raise ValueError(
                f"data.folder: expected ids among {_ranges(allowed)} in {name}, "
                f"got {_ranges(ids[classes < 0].unique().tolist())}"
            )
        return self.transform(tv_tensors.Image(as_bytes(image)), tv_tensors.Mask(classes.byte()))


def _read_label(path: str | Path) -> Image.Image:
    if Path(path).suffix == ".mat":
        from scipy.io import loadmat

        return Image.fromarray(loadmat(path)["GTcls"][0]["Segmentation"][0])
    with Image.open(path) as file:
        file.load()  # Pillow decodes on demand
        return file


def open_set(name: str, folder: str, split: str, transform: Callable[..., Any], sbd: str | None = None) -> Labelled:
    """A split of one of the sets, with all its files in place.

    Args:
        name: A key of ``LAYOUT``.
        folder: Folder that holds the layout above.
        split: ``"train"``, ``"val"`` or ``"test"``.
        transform: As in ``Labelled``.
        sbd: Folder of the Semantic Boundaries Dataset (``img``, ``cls``, ``train.txt``, ``val.txt``), whose images that
            are not in VOC's own train and val are added; for VOC's train split. Needs scipy.

    Raises:
        ValueError: If folders or files are missing.
    """
    try:
        if name == "cityscapes":
            dataset = Cityscapes(folder, split, target_type="semantic")
            images, labels = dataset.images, [targets[0] for targets in dataset.targets]
            # Negative ids are not drawn in label images.
            known = {entry.id: entry.train_id for entry in Cityscapes.classes if entry.id >= 0}
        elif name == "voc":
            dataset = VOCSegmentation(folder, "2012", split)
            images, labels = dataset.images, dataset.masks
            known = {**{number: number for number in range(21)}, 255: IGNORE}
        elif name == "own":
            images, labels = find_masks(folder, split)
            known = {**{number: number for number in range(len(required_class_names(folder)))}, 255: IGNORE}
        else:
            images, labels = find_camvid(folder, split)
            known = {**{number: number for number in range(11)}, 11: IGNORE}
    except (OSError, RuntimeError) as error:
        layout = LAYOUT[name].format(split=split)
        raise ValueError(f"data.folder: expected {layout} below {folder}: {error}") from error
    if not images:
        raise ValueError(f"data.folder: expected {LAYOUT[name].format(split=split)} below {folder}, found no image")
    if sbd is not None:
        images, labels = _with_sbd(dataset, folder, sbd)
    class_of = torch.full((256,), -1, dtype=torch.int16)
    class_of[list(known)] = torch.tensor(list(known.values()), dtype=torch.int16)
    data = Labelled(images, labels, class_of, transform)
    if name == "own":
        check_masks(images, labels, len(known) - 1, split == "train")
    return data


def _with_sbd(voc: VOCSegmentation, folder: str, sbd: str) -> tuple[list[Any], list[Any]]:
    """VOC's training images, and those of SBD that neither VOC's train nor its val split holds: 10,582 in all."""
    try:
        taken = {Path(path).stem for path in voc.images + VOCSegmentation(folder, "2012", "val").images}
        images, labels = list(voc.images), list(voc.masks)
        for split in ("train", "val"):
            part = SBDataset(sbd, split, mode="segmentation")
            new = [index for index, path in enumerate(part.images) if Path(path).stem not in taken]
            images += [part.images[index] for index in new]
            labels += [part.masks[index] for index in new]
    except (OSError, RuntimeError) as error:
        raise ValueError(f"data.sbd: expected img, cls, train.txt and val.txt below {sbd}: {error}") from error
    return images, labels


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers with runs put together: ``0..20, 255``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("..".join(map(str, run)) for run in runs)
