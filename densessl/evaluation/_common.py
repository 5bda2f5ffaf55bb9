"""What the probes share: batches of labelled images, and the mean intersection over union."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from densessl.evaluation._refuse import check_at_least, check_finite
from densessl.evaluation._stored import StoredFeatures
from densessl.evaluation.shares import class_shares

Features = Callable[[Tensor], Tensor]
Labelled = Sequence[tuple[Tensor, Tensor]] | StoredFeatures
IGNORED = -1

__all__ = [
    "IGNORED",
    "Features",
    "Labelled",
    "check_labelled",
    "check_probe",
    "class_shares",
    "encode",
    "encoded",
    "mean_iou",
    "stacked",
]


def check_labelled(labelled: Labelled, name: str) -> None:
    """Raises ValueError unless there are images, all of one size, with labels of that size."""
    sized = hasattr(labelled, "__len__") and hasattr(labelled, "__getitem__")
    if not (sized or isinstance(labelled, StoredFeatures)):
        raise ValueError(f"{name}: expected a sequence of (image, labels) pairs, got {type(labelled).__name__}")
    if len(labelled) == 0:
        raise ValueError(f"{name}: expected (image, labels) pairs, got none")
    if isinstance(labelled, StoredFeatures):
        return  # checked when it was made
    size = None
    for index in range(len(labelled)):
        size = _check_pair(*labelled[index], f"{name}[{index}]", size)


def _check_pair(image: Tensor, labels: Tensor, name: str, size: tuple[int, ...] | None) -> tuple[int, ...]:
    size = size or tuple(image.shape[-2:])
    if image.dtype != torch.uint8 or image.ndim != 3 or tuple(image.shape[-2:]) != size:
        raise ValueError(
            f"{name}: expected an image uint8 (3, H, W) with (H, W) = {size} as the first, "
            f"got {image.dtype} {tuple(image.shape)}"
        )
    if labels.dtype != torch.int64 or tuple(labels.shape) != size:
        raise ValueError(f"{name}: expected labels int64 (H, W) = {size}, got {labels.dtype} {tuple(labels.shape)}")
    return size


def check_probe(classes: int, batch_size: int) -> None:
    """Raises ValueError unless there are classes to tell apart and images to encode."""
    check_at_least(classes, 2, "classes")
    check_at_least(batch_size, 1, "batch_size")


def encode(features: Features, images: Tensor) -> Tensor:
    """Feature maps, float32 and finite, of a batch of images."""
    with torch.no_grad():
        maps = features(images)
    if maps.ndim != 4 or not maps.is_floating_point():
        raise ValueError(f"features: expected it to return maps (B, C, h, w), got {maps.dtype} {tuple(maps.shape)}")
    check_finite(maps, "features")
    return maps.detach().float()


def stacked(labelled: Sequence[tuple[Tensor, Tensor]], name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch, each pair read once and checked against the batch's first."""
    size, images, answers = None, [], []
    for index in range(start, stop):
        image, labels = labelled[index]
        size = _check_pair(image, labels, f"{name}[{index}]", size)
        images.append(image)
        answers.append(labels)
    return torch.stack(images), torch.stack(answers)


def encoded(
    features: Features, labelled: Labelled, classes: int, batch_size: int, *, own: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Feature maps and labels on their device, batch by batch; labels that name no class become IGNORED.

    With ``own``, of a store that several processes share each gets its own batches.
    """
    if isinstance(labelled, StoredFeatures):
        batches = labelled.batches(batch_size, own=own)
    else:
        batches = _computed(features, labelled, batch_size)
    for maps, labels in batches:
        yield maps, labels.masked_fill((labels < 0) | (labels >= classes), IGNORED)


def _computed(
    features: Features, labelled: Sequence[tuple[Tensor, Tensor]], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(labelled), batch_size):
        part = [labelled[i] for i in range(start, min(start + batch_size, len(labelled)))]
        maps = encode(features, torch.stack([image for image, _ in part]))
        yield maps, torch.stack([labels for _, labels in part]).to(maps.device)


def mean_iou(classes: int) -> MulticlassJaccardIndex:
    """Mean intersection over union over the classes that occur in labels or predictions."""
    return MulticlassJaccardIndex(classes, ignore_index=IGNORED, validate_args=False)
