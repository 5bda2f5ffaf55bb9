"""Pascal VOC's boxes: ``VOCdevkit/VOC2007/{Annotations,ImageSets/Main,JPEGImages}``, checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection

from examples.transfer.datasets.sizes import is_turned, load, shown_size

# fmt: off
NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
         "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
# fmt: on

# COCO's evaluation counts objects of at most 1e10 square pixels. Larger ones are set aside with the detections on
# them, by the plain overlap, where its crowds would forgive every detection that lies inside of them.
SET_ASIDE = 1e11


def voc_boxes(folder: str, split: str, transform: Callable) -> VocBoxes:
    """A split of Pascal VOC.

    Args:
        folder: Folder that holds ``VOCdevkit``.
        split: ``"VOC2007/trainval"``.
        transform: Takes and returns ``(image, target)``.

    Returns:
        A dataset of an image, uint8 ``(3, H, W)``, and a target: boxes x0 y0 x1 y1 at pixel edges, labels from 1, and
        areas, which set objects marked difficult aside in the evaluation.

    Raises:
        ValueError: If a list, image or annotation is missing, a class is unknown or a box has no area, by file and
            entry.
    """
    year, _, image_set = split.partition("/")
    if not image_set:
        raise ValueError(f"data.train, data.val: expected a split of Pascal VOC such as VOC2007/test, got {split!r}")
    root = Path(folder, "VOCdevkit", year)
    names = root / "ImageSets" / "Main" / f"{image_set}.txt"
    if not names.is_file():
        raise ValueError(f"data.folder: expected VOCdevkit/{split} in {folder}, got no {names}")
    listed = [line.split()[0] for line in names.read_text().splitlines() if line.strip()]
    double = next((name for name, count in Counter(listed).items() if count > 1), None)
    if double is not None:
        raise ValueError(f"{names}: entry {double!r} is listed twice")
    samples = []
    for name in listed:
        image, annotation = root / "JPEGImages" / f"{name}.jpg", root / "Annotations" / f"{name}.xml"
        for path in (image, annotation):
            if not path.is_file():
                raise ValueError(f"{names}: entry {name!r}: no file {path}")
        try:
            root_of_file = ElementTree.parse(annotation).getroot()
            tree = VOCDetection.parse_voc_xml(root_of_file)["annotation"]
            objects = tree["object"]
            # Of an object without entries torchvision makes a text, or nothing at all.
            if len(objects) != len(root_of_file.findall("object")) or not all(isinstance(o, dict) for o in objects):
                raise TypeError("an object without entries")
        except (ElementTree.ParseError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{annotation}: expected a VOC annotation, got {error!r}") from error
        try:
            said = _said_size(tree)
            turned = is_turned(image, said)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{annotation}: size: {_told(error)}") from error
        for number, entry in enumerate(objects, 1):
            try:
                _check(entry, said or shown_size(image))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{annotation}: object {number}: {_told(error)}") from error
        samples.append((image, turned, objects))
    return VocBoxes(samples, transform)


class VocBoxes(Dataset):
    """Photos of a split with their objects.

    Args:
        samples: For each photo its path, whether its objects mean it as EXIF turns it, and its objects.
        transform: Takes an image and a target.
    """

    def __init__(self, samples: list[tuple[Path, bool, list[dict[str, Any]]]], transform: Callable) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        path, turned, objects = self.samples[index]
        return _convert(self.transform, load(path, turned), objects)


def _said_size(tree: dict[str, Any]) -> tuple[int, int] | None:
    said = tree.get("size")
    return None if said is None else (int(said["height"]), int(said["width"]))


def _check(entry: dict[str, Any], size: tuple[int, int]) -> None:
    if entry["name"] not in NAMES:
        raise ValueError(f"expected one of VOC's {len(NAMES)} classes, got {entry['name']!r}")
    if entry.get("difficult", "0") not in ("0", "1"):
        raise ValueError(f"difficult: expected 0 or 1, got {entry['difficult']!r}")
    x0, y0, x1, y1 = box = _box(entry)
    if not all(map(math.isfinite, box)):
        raise ValueError(f"expected finite numbers, got {entry['bndbox']}")
    if not (np.float32(x1) > np.float32(x0) and np.float32(y1) > np.float32(y0)):
        raise ValueError(f"a box of no area: {entry['bndbox']}")
    height, width = size
    # A pixel of tolerance: other sets count from 0.
    if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
        raise ValueError(f"expected a box inside of the image, {width}x{height} pixels, got {entry['bndbox']}")
    if max(x1, y1) <= 1 and min(size) > 2:
        raise ValueError(f"expected pixels, got {entry['bndbox']}, which looks like shares of the image")


def _told(error: Exception) -> str:
    if isinstance(error, TypeError):
        return f"expected one entry of each name, got {error}"
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _box(entry: dict[str, Any]) -> tuple[float, float, float, float]:
    """Pixels counted from 1, both ends inside, to edges counted from 0."""
    x0, y0, x1, y1 = (float(entry["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
    return x0 - 1, y0 - 1, x1, y1


def _convert(
    transform: Callable, image: tv_tensors.Image, objects: list[dict[str, Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    boxes = torch.tensor([_box(entry) for entry in objects]).reshape(-1, 4)
    difficult = torch.tensor([entry.get("difficult", "0") == "1" for entry in objects], dtype=torch.bool)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.shape[1], image.shape[2])),
        "labels": torch.tensor([1 + NAMES.index(entry["name"]) for entry in objects], dtype=torch.int64),
        "area": torch.where(difficult, SET_ASIDE, areas),
    }
    return transform(image, target)
