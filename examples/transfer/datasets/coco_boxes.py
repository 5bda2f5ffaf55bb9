"""Boxes and masks from COCO's json, read by pycocotools, checked."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as masks_of
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from examples.transfer.common.labelled import labelled
from examples.transfer.datasets.coco_checks import check_annotation, check_structure, has_no_area, said_size
from examples.transfer.datasets.sizes import is_turned, load, shown_size

log = logging.getLogger(__name__)


def coco_boxes(
    images: Path, annotations: Path, transform: Callable, masks: bool, train: bool, drop_degenerate: bool = False
) -> CocoBoxes:
    """A split in COCO's layout.

    Args:
        images: Folder of the images.
        annotations: The json file.
        transform: Takes and returns ``(image, target)``.
        masks: Whether targets hold masks.
        train: Whether to leave out crowds, and images without objects. Both stay in for evaluation.
        drop_degenerate: Whether to leave out boxes of no area, by name in the log. COCO's train2017 has two.

    Returns:
        A dataset of an image, uint8 ``(3, H, W)``, and a target: boxes x0 y0 x1 y1, labels from 1 in the order of the
        file's category ids, area, iscrowd, and masks (uint8) on demand.

    Raises:
        ValueError: If there is a file that cannot be read, an annotation of an image that is missing, a category that
            is not
            listed, a box of no area or a missing mask, by file and entry.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        check_structure(content)
        coco = COCO()
        coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            coco.createIndex()
        entries = content["annotations"]
        labels = {number: label for label, number in enumerate(sorted(coco.cats), 1)}
        paths = {number: images / entry["file_name"] for number, entry in coco.imgs.items()}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{annotations}: expected COCO's json, got {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{annotations}: {error}") from error
    turned, sizes = {}, {}
    for number, path in paths.items():
        try:
            if not path.is_file():
                raise ValueError(f"no file {path}")
            said = said_size(coco.imgs[number])
            turned[number] = is_turned(path, said)
            sizes[number] = said or shown_size(path)
        except (ValueError, OSError) as error:  # the file system's, of a name that is too long
            raise ValueError(f"{annotations}: image {number}: {error}") from error
    degenerate = set()
    for entry in entries:
        try:
            if entry["image_id"] not in paths:
                raise ValueError(f"image_id {entry['image_id']} is not among the file's images")
            if entry["category_id"] not in labels:
                raise ValueError(
                    f"category_id {entry['category_id']} is not among the file's {len(labels)} categories, "
                    f"{min(labels, default=None)} to {max(labels, default=None)}"
                )
            check_annotation(entry, sizes[entry["image_id"]], masks)
        except (ValueError, KeyError) as error:
            told = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{annotations}: annotation {entry.get('id')}: {told}") from error
        if has_no_area(entry["bbox"]):
            told = f"{annotations}: annotation {entry['id']}: a box of no area: {entry['bbox']}"
            if not drop_degenerate:
                raise ValueError(f"{told}; data.drop_degenerate leaves such boxes out")
            log.warning("%s: left out", told)
            degenerate.add(entry["id"])
    keep = partial(_is_kept, degenerate=degenerate, train=train)
    ids = sorted(paths)
    if train:
        full = {entry["image_id"] for entry in entries if keep(entry)}
        log.info("%s: %d of %d images have objects", annotations, len(full), len(ids))
        ids = [number for number in ids if number in full]
    return CocoBoxes(coco, ids, paths, turned, partial(_convert, transform, keep, labels, masks))


class CocoBoxes(Dataset):
    """Photos of a file in COCO's layout, each with what is made of its annotations.

    Args:
        coco: The file.
        ids: Ids of the images, in order.
        paths: Path of each image, by id.
        turned: Whether the annotations mean the image as EXIF turns it, by id.
        convert: Makes a sample of a uint8 image ``(3, H, W)`` and its annotations.
    """

    def __init__(
        self, coco: COCO, ids: list[int], paths: Mapping[int, Path], turned: Mapping[int, bool], convert: Callable
    ) -> None:
        self.coco, self.ids, self.paths, self.turned, self.convert = coco, ids, paths, turned, convert

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        number = self.ids[index]
        return self.convert(load(self.paths[number], self.turned[number]), self.coco.imgToAnns[number])


def keep_share(data: CocoBoxes, share: float, seed: int) -> None:
    """Keeps the labels of a share of all the images of the file, also of those left out for want of objects."""
    chosen = set(labelled(list(data.coco.imgs), share, seed))
    data.ids = [number for number in data.ids if number in chosen]
    log.info("labels of %d images, %d of them with objects", len(chosen), len(data.ids))


def _is_kept(entry: Mapping[str, Any], degenerate: set[int], train: bool) -> bool:
    return entry["id"] not in degenerate and not (train and entry.get("iscrowd"))


def _convert(
    transform: Callable,
    keep: Callable,
    labels: Mapping[int, int],
    masks: bool,
    image: tv_tensors.Image,
    entries: list[dict[str, Any]],
) -> tuple[Tensor, dict[str, Tensor]]:
    entries = [entry for entry in entries if keep(entry)]
    size = (image.shape[1], image.shape[2])
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.tensor([labels[entry["category_id"]] for entry in entries], dtype=torch.int64),
        "iscrowd": torch.tensor([entry.get("iscrowd", 0) for entry in entries], dtype=torch.int64),
        # 0 stands for "not given": the metric takes the box's or the mask's then
        "area": torch.tensor([entry.get("area", 0.0) for entry in entries], dtype=torch.float32),
    }
    if masks:
        drawn = [torch.from_numpy(_draw(entry["segmentation"], *size)) for entry in entries]
        target["masks"] = tv_tensors.Mask(torch.stack(drawn) if drawn else torch.zeros(0, *size, dtype=torch.uint8))
    return transform(image, target)


def _draw(segmentation: Any, height: int, width: int) -> Any:
    """Polygons, or a run-length code as COCO's crowds have it."""
    if isinstance(segmentation, list):
        return masks_of.decode(masks_of.merge(masks_of.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return masks_of.decode(masks_of.frPyObjects(segmentation, height, width))
    return masks_of.decode(segmentation)
