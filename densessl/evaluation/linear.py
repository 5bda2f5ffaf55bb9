"""How much of the labels a linear layer reads off frozen features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl.evaluation._common import IGNORED, Features, Labelled, check_labelled, encoded, mean_iou


def linear_segmentation(
    features: Features,
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
        Mean intersection over union on the test split, 0..1.

    Raises:
        ValueError: if a split is empty, or on other shapes and dtypes.
    """
    check_labelled(fit, "fit")
    check_labelled(test, "test")
    batches = list(encoded(features, fit, classes, batch_size))
    maps, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    mean, std = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    linear = nn.Conv2d(maps.shape[1], classes, 1).to(maps.device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
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
        loss = F.cross_entropy(upsampled(maps[chosen], coarse), labels[chosen], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    meter = mean_iou(classes).to(maps.device)
    with torch.no_grad():
        for x, answer in encoded(features, test, classes, batch_size):
            meter.update(upsampled(x, (answer.shape[1], answer.shape[2])).argmax(1), answer)
    return float(meter.compute())
