"""How much of the labels a linear layer reads off frozen features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl.evaluation._common import IGNORED, Features, Labelled, check_labelled, check_probe, encoded, mean_iou
from densessl.evaluation._refuse import check_at_least, check_positive


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
        ValueError: if a split is empty or ``fit`` has no label, if a feature is not finite or a setting out of
            range, or on other shapes and dtypes.
    """
    check_probe(classes, batch_size)
    check_at_least(steps, 1, "steps")
    check_positive(lr, "lr")
    check_at_least(label_stride, 1, "label_stride")
    check_labelled(fit, "fit")
    check_labelled(test, "test")
    maps, labels = _gathered(features, fit, classes, batch_size, label_stride)
    mean, std = _moments(maps)
    linear = nn.Conv2d(maps.shape[1], classes, 1).to(maps.device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)

    def upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(linear((x - mean) / std), size, mode="bilinear", align_corners=False)

    coarse = (labels.shape[1], labels.shape[2])
    for _ in range(steps):
        chosen = torch.randint(len(maps), (batch_size,), generator=generator).to(maps.device)
        with torch.enable_grad():  # the caller may have switched gradients off
            loss = F.cross_entropy(upsampled(maps[chosen].float(), coarse), labels[chosen].long(), ignore_index=IGNORED)
        if not bool((labels[chosen] != IGNORED).any()):
            continue  # the mean over no pixel is NaN
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    meter = mean_iou(classes).to(maps.device)
    with torch.no_grad():
        for x, answer in encoded(features, test, classes, batch_size):
            meter.update(upsampled(x, (answer.shape[1], answer.shape[2])).argmax(1), answer)
    return float(meter.compute())


def _gathered(
    features: Features, fit: Labelled, classes: int, batch_size: int, label_stride: int
) -> tuple[Tensor, Tensor]:
    """Maps (N, C, h, w) and coarse labels of all images, in one allocation each.

    Collected in a list and joined, they would be held twice.
    """
    maps, answers, start = torch.empty(0), torch.empty(0), 0
    for part, labels in encoded(features, fit, classes, batch_size):
        height, width = labels.shape[1:]
        coarse = (max(1, height // label_stride), max(1, width // label_stride))
        reduced = F.interpolate(labels[:, None].double(), coarse, mode="nearest-exact")[:, 0].to(torch.int16)
        if start == 0:
            maps = part.new_empty(len(fit), *part.shape[1:])
            answers = reduced.new_empty(len(fit), *coarse)
        maps[start : start + len(part)] = part
        answers[start : start + len(part)] = reduced
        start += len(part)
    if not bool((answers != IGNORED).any()):
        raise ValueError(f"fit: expected labels in 0..{classes - 1}, got none in {len(fit)} images")
    return maps, answers


def _moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (1, C, 1, 1), image by image: a difference of all maps is large."""
    count = maps.numel() // maps.shape[1]
    mean = sum((image.sum((1, 2)).double() for image in maps), maps.new_zeros(maps.shape[1]).double()) / count
    square = torch.zeros_like(mean)
    for image in maps:
        square += (image - mean.to(image.dtype)[:, None, None]).square().sum((1, 2)).double()
    std = (square / max(count - 1, 1)).sqrt().clamp(min=1e-6)
    return mean.to(maps.dtype).view(1, -1, 1, 1), std.to(maps.dtype).view(1, -1, 1, 1)
