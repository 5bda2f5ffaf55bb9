"""Fine-tunes a backbone with an FCN head on labelled images that are held in memory, and scores it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

from examples.transfer.datasets.segmentation_sets import IGNORE
from examples.transfer.segmentation import fcn_head, segmentation_metrics

Labelled = Sequence[tuple[Tensor, Tensor]]


def fine_tuned_miou(
    backbone: nn.Module,
    fit: Labelled,
    test: Labelled,
    classes: int,
    normalize: Callable[[Tensor], Tensor],
    *,
    share: float = 1.0,
    steps: int = 400,
    batch_size: int = 8,
    side: int = 160,
    lr: float = 1e-4,
    seed: int = 0,
) -> float:
    """Trains a copy of the backbone end to end, a head of two 3x3 convolutions on its map, by AdamW on a cosine.

    Args:
        backbone: Images to a map ``(B, C, h, w)``; it is left as it is. The work is done on its device.
        fit: Images, uint8 ``(3, H, W)``, and labels, int64 ``(H, W)``, to train on; labels that are not in
            0..classes-1 are ignored.
        test: Images and labels to score on.
        classes: Number of classes.
        normalize: Makes the backbone's input from images, uint8 ``(B, 3, H, W)``.
        share: Share of ``fit`` that is trained on, chosen by the seed, the same for all backbones.
        steps: Number of optimiser steps, whatever the share.
        batch_size: Images of a step.
        side: Side of the crops that are trained on, in pixels.
        lr: Peak learning rate of the backbone; the head has ten times as much.
        seed: Seed of the share, the head, the crops and the order.

    Returns:
        mIoU over all pixels of ``test``, 0..1.
    """
    torch.manual_seed(seed)
    chosen = torch.randperm(len(fit))[: max(1, round(share * len(fit)))].tolist()
    net = copy.deepcopy(backbone)
    device = next(net.parameters()).device
    with torch.no_grad():
        width = net.eval()(normalize(fit[0][0][None]).to(device)).shape[1]
    head = fcn_head(width, classes, dilation=1).to(device)  # made on the CPU: it begins alike on every device
    rates = [{"params": net.parameters(), "lr": lr}, {"params": head.parameters(), "lr": 10 * lr}]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    augment = v2.Compose([
        v2.ScaleJitter(fit[0][0].shape[1:], (0.75, 1.5)),
        v2.RandomCrop(side, pad_if_needed=True, fill={Image: 0, Mask: IGNORE}),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    net.train()
    for _ in range(steps):
        of_step = [chosen[i] for i in torch.randint(len(chosen), (batch_size,)).tolist()]
        pairs = [augment(Image(fit[i][0]), Mask(_ignored(fit[i][1], classes))) for i in of_step]
        images, labels = (
            torch.stack([part.as_subclass(Tensor) for part in column]).to(device) for column in zip(*pairs, strict=True)
        )
        logits = _logits(net, head, normalize(images), labels.shape[1:])
        counted = (labels != IGNORE).sum().clamp(min=1)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / counted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    metric = segmentation_metrics(classes)["miou"]
    net.eval(), head.eval()
    with torch.no_grad():
        for image, labels in test:
            logits = _logits(net, head, normalize(image[None]).to(device), labels.shape)
            metric.update(logits.cpu(), _ignored(labels, classes)[None])
    return float(metric.compute())


def _logits(net: nn.Module, head: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(head(net(images)), tuple(size), mode="bilinear", align_corners=False)


def _ignored(labels: Tensor, classes: int) -> Tensor:
    return torch.where((labels >= 0) & (labels < classes), labels, IGNORE)
