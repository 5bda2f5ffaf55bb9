"""A linear segmentation probe: how much of the labels a linear layer reads off frozen features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Labelled = Sequence[tuple[Tensor, Tensor]]


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts of (label, prediction) pairs.

    Args:
        predicted: int64, any shape, 0..classes-1.
        labels: int64, same shape; labels outside 0..classes-1 are ignored.
        classes: how many there are.

    Returns:
        int64 ``(classes, classes)``, row = label, column = prediction.
    """
    counted = (labels >= 0) & (labels < classes)
    pairs = labels[counted] * classes + predicted[counted]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(confusion: Tensor) -> float:
    """Mean intersection over union, over the classes that occur in labels or predictions.

    Args:
        confusion: ``(classes, classes)``, row = label, column = prediction.

    Returns:
        0..1; NaN where nothing was counted.
    """
    hits = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - hits
    return float((hits / union)[union > 0].mean())


def linear_probe(
    features: Callable[[Tensor], Tensor],
    fit: Labelled,
    test: Labelled,
    classes: int,
    *,
    steps: int = 200,
    batch_size: int = 16,
    lr: float = 0.02,
    label_stride: int = 2,
    seed: int = 0,
) -> float:
    """Fits one logit per class and cell on frozen features, bilinearly upsampled to the labels, and tests it.

    Features are standardised per channel with the fit split's mean and deviation, so that networks whose features
    differ in scale get the same step sizes; this is part of the linear map.

    Args:
        features: images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        fit: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs of one size to fit on.
        test: the same to report on.
        classes: labels run 0..classes-1; all others are ignored.
        steps: of AdamW on the linear layer, cosine learning rate.
        batch_size: images a step.
        lr: at the start.
        label_stride: every how-many-th pixel is fitted on, for speed; the test uses all.
        seed: of the order of images.

    Returns:
        Mean intersection over union on the test split.
    """
    maps = _encode(features, fit, batch_size)
    mean, std = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    labels = torch.stack([label for _, label in fit]).to(maps.device)
    labels = labels.masked_fill((labels < 0) | (labels >= classes), -1)
    linear = nn.Conv2d(maps.shape[1], classes, 1).to(maps.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)

    def upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(linear((x - mean) / std), size, mode="bilinear", align_corners=False)

    height, width = labels.shape[1:]
    coarse = (max(1, height // label_stride), max(1, width // label_stride))
    labels = F.interpolate(labels[:, None].double(), coarse, mode="nearest-exact")[:, 0].long()
    for _ in range(steps):
        chosen = torch.randint(len(maps), (batch_size,), generator=generator).to(maps.device)
        loss = F.cross_entropy(upsampled(maps[chosen], coarse), labels[chosen], ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    with torch.no_grad():
        for start in range(0, len(test), batch_size):
            part = [test[i] for i in range(start, min(start + batch_size, len(test)))]
            answer = torch.stack([label for _, label in part])
            x = features(torch.stack([image for image, _ in part]))
            predicted = upsampled(x, (answer.shape[1], answer.shape[2])).argmax(1)
            confusion += confusion_matrix(predicted.cpu(), answer, classes)
    return mean_iou(confusion)


@torch.no_grad()
def _encode(features: Callable[[Tensor], Tensor], labelled: Labelled, batch_size: int) -> Tensor:
    images = [labelled[i][0] for i in range(len(labelled))]
    return torch.cat([features(torch.stack(images[i : i + batch_size])) for i in range(0, len(images), batch_size)])
