"""Pascal VOC's boxes: ``VOCdevkit/VOC2007/{Annotations,ImageSets/Main,JPEGImages}``, read by torchvision, checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.transforms.v2.functional import pil_to_tensor

# fmt: off
NAMES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
         "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
# fmt: on

# COCO's evaluation counts objects of at most 1e10 square pixels. Larger ones are set aside with the detections on
# them, by the plain overlap, where its crowds would forgive every detection that lies inside of them.
SET_ASIDE = 1e11


def voc_boxes(folder: str, split: str, transform: Callable) -> VOCDetection:
    """A split of Pascal VOC.

    Args:
        folder: holds ``VOCdevkit``.
        split: ``"VOC2007/trainval"``.
        transform: of ``(image, target)``.

    Returns:
        A dataset of an image, uint8 ``(3, H, W)``, and a target: boxes x0 y0 x1 y1 at pixel edges, labels from 1, and
        areas, which set objects marked difficult aside in the evaluation.

    Raises:
        ValueError: on a missing list, image or annotation, an unknown class or a box of no area, by file and entry.
    """
    year, _, image_set = split.partition("/")
    if not image_set:
        raise ValueError(f"data.train, data.val: expected a split of Pascal VOC such as VOC2007/test, got {split!r}")
    root = Path(folder, "VOCdevkit", year)
    names = root / "ImageSets" / "Main" / f"{image_set}.txt"
    if not names.is_file():
        raise ValueError(f"data.folder: expected VOCdevkit/{split} in {folder}, got no {names}")
    try:
        data = VOCDetection(folder, year.removeprefix("VOC"), image_set, transforms=partial(_convert, transform))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"data.folder: {split} in {folder} cannot be read: {error}") from error
    for image, annotation in zip(data.images, data.annotations, strict=True):
        for path in (image, annotation):
            if not Path(path).is_file():
                raise ValueError(f"{names}: entry {Path(image).stem!r}: no file {path}")
        try:
            tree = VOCDetection.parse_voc_xml(ElementTree.parse(annotation).getroot())
            objects = tree["annotation"]["object"]
        except (ElementTree.ParseError, KeyError) as error:
            raise ValueError(f"{annotation}: expected a VOC annotation, got {error!r}") from error
        for number, entry in enumerate(objects, 1):
            try:
                _check(entry)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{annotation}: object {number}: {_told(error)}") from error
    return data


def _check(entry: dict[str, Any]) -> None:
    if entry["name"] not in NAMES:
        raise ValueError(f"expected one of VOC's {len(NAMES)} classes, got {entry['name']!r}")
    x0, y0, x1, y1 = _box(entry)
    if not (x1 > x0 and y1 > y0):
        raise ValueError(f"a box of no area: {entry['bndbox']}")


def _told(error: ValueError | KeyError) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def _box(entry: dict[str, Any]) -> tuple[float, float, float, float]:
    """Pixels counted from 1, both ends inside, to edges counted from 0."""
    x0, y0, x1, y1 = (float(entry["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
    return x0 - 1, y0 - 1, x1, y1


def _convert(transform: Callable, image: Image, tree: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    objects = tree["annotation"]["object"]
    boxes = torch.tensor([_box(entry) for entry in objects]).reshape(-1, 4)
    difficult = torch.tensor([entry.get("difficult", "0") == "1" for entry in objects], dtype=torch.bool)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width)),
        "labels": torch.tensor([1 + NAMES.index(entry["name"]) for entry in objects], dtype=torch.int64),
        "area": torch.where(difficult, SET_ASIDE, areas),
    }
    return transform(tv_tensors.Image(pil_to_tensor(image)), target)
