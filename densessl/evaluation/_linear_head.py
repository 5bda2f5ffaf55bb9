"""Trains and tests a linear layer on frozen features by published settings, over one process or several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl.evaluation._batches import IGNORED, Features, Labelled, batches, encode, pairs, resized
from densessl.evaluation._crops import flipped, recoloured, resized_crop, scaled_crop, short_side
from densessl.evaluation._refuse import check_is_pair
from densessl.evaluation._together import order, rank, summed
from densessl.evaluation.matched import overlap_of

_TABLE = 1 << 24  # logits at full size held at once


class LinearProbe(NamedTuple):
    """Settings of the linear segmentation.

    Attributes:
        source: Where the settings come from.
        optimizer: "sgd" with momentum 0.9, or "adamw" with betas 0.9 and 0.999.
        lr: Learning rate of the optimiser, after the warm-up.
        weight_decay: Weight decay of the optimiser.
        batch_size: Number of crops in a step, over all processes.
        epochs: Number of passes over the images; an incomplete last batch is left out. None: ``steps`` counts.
        steps: Number of steps of the optimiser, where ``epochs`` is None.
        schedule: "drop" multiplies the rate by 0.1 every ``drop`` epochs; "cosine" warms up over ``warmup`` steps, then
            falls to 0 along a cosine.
        drop: Number of epochs at one rate.
        warmup: Number of steps of linear warm-up.
        size: Side of the training crops, in pixels.
        crop: "resized" takes a share ``scale`` of the image's area and resizes it to the crop; the test resizes whole
            images to squares. "scaled" scales the image by a factor from ``scale`` and cuts; the test slides a window
            over images whose shorter side is ``size``.
        scale: The least and the greatest share or factor.
        colours: Whether brightness, contrast, saturation and hue of the training crops change.
        norm: Whether features pass a batch normalisation, over all processes, before the layer.
        dropout: Share of the channels set to 0 in training.
        grid: Number of cells a side that logits and labels are compared on; None: at the size of the crop or the image.
        stride: Stride of the sliding window, in pixels.
        absent: Whether classes that occur in neither labels nor answers count as 0 in the mean, or not at all.
    """

    source: str
    optimizer: Literal["sgd", "adamw"]
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int | None
    steps: int
    schedule: Literal["drop", "cosine"]
    drop: int
    warmup: int
    size: int
    crop: Literal["resized", "scaled"]
    scale: tuple[float, float]
    colours: bool
    norm: bool
    dropout: float
    grid: int | None
    stride: int
    absent: Literal["zero", "skip"]


class Head(nn.Module):
    """Batch normalisation over all processes where asked for, dropout of channels, and a 1x1 convolution."""

    def __init__(self, channels: int, classes: int, protocol: LinearProbe, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if protocol.norm else None
        self.layer = nn.Conv2d(channels, classes, 1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.layer.parameters():
            nn.init.uniform_(parameter, -(channels**-0.5), channels**-0.5, generator=generator)

    def normalized(self, maps: Tensor) -> Tensor:
        """Maps normalised by the batch in training, the batch being that of all processes, else by the averages."""
        norm = self.norm
        if norm is None:
            return maps
        mean, var = norm.running_mean, norm.running_var
        if self.training:
            # The features are frozen: no gradient flows through the moments.
            with torch.no_grad():
                axes = (0, 2, 3)
                count = summed(torch.tensor(float(maps.numel() // maps.shape[1]), device=maps.device).double())
                mean = (summed(maps.double().sum(axes)) / count).float()
                var = (summed((maps - mean.view(-1, 1, 1)).double().square().sum(axes)) / count).float()
                if norm.running_mean is not None and norm.running_var is not None:
                    norm.running_mean.lerp_(mean, 0.1)
                    norm.running_var.lerp_(var * float(count / (count - 1).clamp(min=1)), 0.1)
        return F.batch_norm(maps, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)

    def forward(self, maps: Tensor) -> Tensor:
        return self.layer(self.normalized(maps))


def train_head(
    features: Features,
    fit: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    protocol: LinearProbe,
    batch_size: int,
    seed: int,
) -> Head:
    """Trains the layer on crops of this process's images together with all other processes."""
    if len(fit) == 0:
        raise ValueError("fit: expected (image, labels) pairs, got none")
    places = order(len(fit))
    count = len(places)
    a_pass = max(1, count // protocol.batch_size)
    steps = protocol.steps if protocol.epochs is None else protocol.epochs * a_pass
    head, optimizer, labelled = None, None, False
    turns = _turns(count, protocol.batch_size, a_pass, seed)
    for step in range(steps):
        crops, kept = [], []
        for index in next(turns):
            process, place = places[index]
            if process == rank():
                generator = torch.Generator().manual_seed(_seed(seed, step, index))
                crops.append(_crop(_one(fit, place, classes), protocol, generator))
                kept.append(generator)
        # A process without an image in this batch encodes one, which then does not count.
        idle = not crops
        if idle:
            crops.append(_crop(_one(fit, 0, classes), protocol, torch.Generator()))
        images, labels = (torch.stack(parts) for parts in zip(*crops, strict=True))
        maps = torch.cat([encode(features, part) for part in images.split(batch_size)])
        if head is None or optimizer is None:
            head = Head(maps.shape[1], classes, protocol, seed).to(maps.device)
            optimizer = _optimizer(head, protocol)
        labels = labels.to(maps.device)
        if idle:
            maps, labels = maps[:0], labels[:0]
        pixels = int(summed((labels != IGNORED).sum()))
        labelled = labelled or pixels > 0
        if pixels == 0:
            continue  # the mean over no pixel is NaN
        for group in optimizer.param_groups:
            group["lr"] = protocol.lr * _rate(step, steps, a_pass, protocol)
        _descend(head, optimizer, maps, labels, pixels, protocol, kept)
    if head is None or not labelled:
        raise ValueError(f"fit: expected labels in 0..{classes - 1}, got none in {count} images")
    return head.eval()


def _descend(
    head: Head,
    optimizer: torch.optim.Optimizer,
    maps: Tensor,
    labels: Tensor,
    pixels: int,
    protocol: LinearProbe,
    generators: list[torch.Generator],
) -> None:
    """One step on the mean cross entropy over the labelled pixels of all processes."""
    head.train()
    optimizer.zero_grad()
    with torch.enable_grad():  # the caller may have switched gradients off
        values = head.normalized(maps)
        if protocol.dropout:
            keep = [torch.rand(maps.shape[1], generator=generator) >= protocol.dropout for generator in generators]
            mask = torch.stack(keep) if keep else torch.ones(0, maps.shape[1])
            values = values * (mask.to(maps.device)[..., None, None] / (1 - protocol.dropout))
        coarse = head.layer(values)
        # Logits at full size are large: their gradients are taken part by part and gathered at the coarse ones.
        leaf = coarse.detach().requires_grad_()
        block = max(1, _TABLE // (labels[0].numel() * coarse.shape[1])) if len(labels) else 1
        for part, answer in zip(leaf.split(block), labels.split(block), strict=True):
            full = F.interpolate(part, answer.shape[1:], mode="bilinear", align_corners=False)
            (F.cross_entropy(full, answer, ignore_index=IGNORED, reduction="sum") / pixels).backward()
        coarse.backward(torch.zeros_like(coarse) if leaf.grad is None else leaf.grad)
    for parameter in head.parameters():
        parameter.grad = summed(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    optimizer.step()


def _optimizer(head: Head, protocol: LinearProbe) -> torch.optim.Optimizer:
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(head.parameters(), protocol.lr, momentum=0.9, weight_decay=protocol.weight_decay)
    return torch.optim.AdamW(head.parameters(), protocol.lr, weight_decay=protocol.weight_decay)


def _rate(step: int, steps: int, a_pass: int, protocol: LinearProbe) -> float:
    """The learning rate's factor."""
    if protocol.schedule == "drop":
        return 0.1 ** (step // a_pass // protocol.drop)
    if step < protocol.warmup:
        # DINOv3's warm-up begins at a millionth and falls with the training's progress besides.
        return (1 - (1 - step / protocol.warmup) * (1 - 1e-6)) * (1 - step / steps)
    return (1 + math.cos(math.pi * (step + 1) / steps)) / 2


def _turns(count: int, batch_size: int, a_pass: int, seed: int) -> Iterator[list[int]]:
    """The images of each step, drawn anew in each pass; what is left of a pass is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shuffled = torch.randperm(count, generator=generator).tolist()
        yield from (shuffled[at * batch_size : (at + 1) * batch_size] for at in range(a_pass))


def _seed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _one(fit: Sequence[tuple[Tensor, Tensor]], place: int, classes: int) -> tuple[Tensor, Tensor]:
    """One image and its labels, checked."""
    pair = fit[place]
    check_is_pair(pair, f"fit[{place}]")
    image, labels = pair
    if image.ndim != 3:
        raise ValueError(f"fit[{place}]: expected one image uint8 (3, H, W), got {tuple(image.shape)}")
    return next(pairs([(image, labels)], classes, f"fit[{place}]"))


def _crop(pair: tuple[Tensor, Tensor], protocol: LinearProbe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    cut = resized_crop if protocol.crop == "resized" else scaled_crop
    image, labels = flipped(*cut(*pair, protocol.size, protocol.scale, generator), generator)
    image = recoloured(image, generator) if protocol.colours else image
    return image, labels if protocol.grid is None else _gridded(labels, protocol.grid)


def _gridded(labels: Tensor, grid: int) -> Tensor:
    """Labels (H, W) at the grid's size, each that of the pixel at its cell's upper left corner."""
    return F.interpolate(labels[None, None].double(), (grid, grid), mode="nearest")[0, 0].long()


@torch.no_grad()
def score_head(
    features: Features, head: Head, test: Labelled, classes: int, protocol: LinearProbe, batch_size: int
) -> Tensor:
    """Pixels of each class by answer (classes, classes), over all processes."""
    overlap = torch.zeros(classes, classes, dtype=torch.int64)
    if protocol.crop == "resized":
        square = (protocol.size, protocol.size)
        whole = (resized(*pair, square) for pair in pairs(test, classes, "test"))
        for images, answers in batches(whole, batch_size):
            coarse = head(encode(features, images))
            for logits, answer in zip(coarse, answers, strict=True):
                truth = answer if protocol.grid is None else _gridded(answer, protocol.grid)
                predicted = F.interpolate(logits[None], truth.shape, mode="bilinear", align_corners=False)[0].argmax(0)
                overlap += overlap_of(predicted.cpu(), truth, classes, classes)
    else:
        for image, answer in pairs(test, classes, "test"):
            scaled, _ = short_side(image, answer, protocol.size)
            logits = _slid(features, head, scaled, protocol, batch_size)
            full = F.interpolate(logits[None], answer.shape, mode="bilinear", align_corners=False)[0]
            overlap += overlap_of(full.argmax(0).cpu(), answer, classes, classes)
    return summed(overlap)


def _slid(features: Features, head: Head, image: Tensor, protocol: LinearProbe, batch_size: int) -> Tensor:
    """Logits (classes, H, W): the mean over windows, the last of which ends at the image's border."""
    size, (height, width) = protocol.size, image.shape[1:]
    corners = [
        (top, left) for top in _starts(height, size, protocol.stride) for left in _starts(width, size, protocol.stride)
    ]
    windows = torch.stack([image[:, top : top + size, left : left + size] for top, left in corners])
    coarse = torch.cat([head(encode(features, part)) for part in windows.split(batch_size)])
    logits = torch.zeros(coarse.shape[1], height, width, device=coarse.device)
    counts = torch.zeros(height, width, device=coarse.device)
    for (top, left), part in zip(corners, coarse, strict=True):
        window = (slice(top, top + size), slice(left, left + size))
        shape = counts[window].shape
        logits[:, *window] += F.interpolate(part[None], shape, mode="bilinear", align_corners=False)[0]
        counts[window] += 1
    return logits / counts


def _starts(length: int, size: int, stride: int) -> list[int]:
    count = max(length - size + stride - 1, 0) // stride + 1
    return [max(min(number * stride + size, length) - size, 0) for number in range(count)]
