"""The recipe's AP beside pycocotools' own, in float64, on random detections."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from examples.transfer.detection import Detection

CLASSES, SIDE = 3, 640


@pytest.fixture(scope="module")
def metric():
    return Detection("fcos_fpn", CLASSES, "resnet18", sizes=(64,), max_size=64).coco_ap


def drawn(seed: int, images: int = 12) -> tuple[list[dict], list[dict]]:
    """Objects on whole pixels, and detections: shifted copies of them by whole pixels, others anywhere."""
    rng = np.random.default_rng(seed)
    found, targets = [], []
    for _ in range(images):
        count = int(rng.integers(0, 8))
        start, size = rng.integers(0, SIDE // 2, (count, 2)), rng.integers(10, SIDE // 2, (count, 2))
        boxes, labels = np.concatenate([start, start + size], 1), rng.integers(1, CLASSES + 1, count)
        near = np.repeat(boxes, 2, 0) + rng.integers(-9, 10, (2 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        away = rng.integers(0, SIDE // 2, (5, 2))
        found.append({
            "boxes": torch.tensor(np.concatenate([near, np.concatenate([away, away + 40], 1)]), dtype=torch.float32),
            "labels": torch.tensor(np.concatenate([np.repeat(labels, 2), rng.integers(1, CLASSES + 1, 5)])),
            "scores": torch.tensor(rng.random(2 * count + 5), dtype=torch.float32),
        })  # fmt: skip
        targets.append({
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "area": torch.tensor(size.prod(1), dtype=torch.float32),
            "iscrowd": torch.tensor(rng.random(count) < 0.1).long(),
        })  # fmt: skip
    return found, targets


def by_pycocotools(found: list[dict], targets: list[dict]) -> tuple[float, float, float]:
    """AP, AP50 and AP75 in float64."""
    coco, number = COCO(), 0
    entries, results = [], []
    for image, (one, target) in enumerate(zip(found, targets, strict=True)):
        for box, label, area, crowd in zip(*(target[key].tolist() for key in ("boxes", "labels", "area", "iscrowd")),
                                           strict=True):  # fmt: skip
            number += 1
            entries.append({"id": number, "image_id": image, "category_id": label, "area": area, "iscrowd": crowd,
                            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})  # fmt: skip
        for box, label, score in zip(*(one[key].tolist() for key in ("boxes", "labels", "scores")), strict=True):
            results.append({"image_id": image, "category_id": label, "score": score,
                            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})  # fmt: skip
    categories = sorted({entry["category_id"] for entry in [*entries, *results]})
    coco.dataset = {"info": {}, "images": [{"id": image} for image in range(len(found))], "annotations": entries,
                    "categories": [{"id": number} for number in categories]}  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, categories; all areas, 100 detections

    def mean(of: np.ndarray) -> float:
        return float(of[of > -1].mean())

    return mean(precision), mean(precision[0]), mean(precision[5])


def gap(metric, seed: int) -> float:
    found, targets = drawn(seed)
    metric.reset()
    metric.update(found, targets)
    values = metric.compute()
    ours = [float(values[key]) for key in ("map", "map_50", "map_75")]
    theirs = by_pycocotools(found, targets)
    assert 0.05 < theirs[0] < 0.9
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_ap_is_pycocotools_own(metric):
    """What is left is the float32 of the result: half a step of it, 3e-8, below 1."""
    gaps = [gap(metric, seed) for seed in range(8)]
    assert max(gaps) < 4e-8, gaps
    assert not math.isnan(sum(gaps))
