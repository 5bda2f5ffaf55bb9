"""How much of the labels a linear layer reads off frozen features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl.evaluation._batches import IGNORED, Features, Labelled, batches, encoded, nearest, own_share
from densessl.evaluation._held import Held
from densessl.evaluation._linear_head import LinearProbe, score_head, train_head
from densessl.evaluation._refuse import check_at_least, check_positive, check_probe
from densessl.evaluation._stored import StoredFeatures
from densessl.evaluation._together import in_turn, processes, summed
from densessl.evaluation.in_context import FAST, InContext
from densessl.evaluation.matched import class_ious, overlap_of

__all__ = ["DINOV3", "LEOPART", "LinearProbe", "linear_overlaps", "linear_segmentation"]

_FITTED = 4  # images whose logits at the labels' size are held at once, which are large

LEOPART = LinearProbe(
    "Ziegler and Asano 2022, Leopart, linear_finetune.py; NeCo's table uses it as well",
    optimizer="sgd",
    lr=0.01,
    weight_decay=1e-4,
    batch_size=128,
    epochs=25,
    steps=0,
    schedule="drop",
    drop=20,
    warmup=0,
    size=448,
    crop="resized",
    scale=(0.8, 1.0),
    colours=False,
    norm=False,
    dropout=0.0,
    grid=100,
    stride=0,
    absent="zero",
)
DINOV3 = LinearProbe(
    "Simeoni et al. 2025, DINOv3, config-ade20k-linear-training.yaml",
    optimizer="adamw",
    lr=1e-3,
    weight_decay=1e-3,
    batch_size=16,
    epochs=None,
    steps=40_000,
    schedule="cosine",
    drop=0,
    warmup=1_500,
    size=512,
    crop="scaled",
    scale=(0.5, 2.0),
    colours=True,
    norm=True,
    dropout=0.1,
    grid=None,
    stride=341,
    absent="skip",
)


@torch.inference_mode(False)  # the caller may be in it, where nothing can be fitted
def linear_segmentation(
    features: Features,
    fit: Labelled | StoredFeatures,
    test: Labelled | StoredFeatures,
    classes: int,
    protocol: LinearProbe | InContext = FAST,
    *,
    steps: int = 200,
    batch_size: int = 16,
    lr: float = 0.02,
    label_stride: int = 2,
    seed: int = 0,
) -> float:
    """Fits one logit per class and cell on frozen features, bilinearly upsampled to the labels, and tests it.

    With ``FAST`` each image is encoded once and the layer is fitted for a few steps on the maps, of which 0.25 GB stay
    in memory and the others lie in a temporary file. There features are standardised per channel with the fit split's
    mean and deviation, so that networks whose features differ in scale get the same step sizes; this is part of the
    linear map. ``LEOPART`` and ``DINOV3`` are the published settings: crops drawn anew and encoded in each step, hours
    on a GPU. Crops, flips, changes of colour and resizing are theirs; images are passed as they are, normalising them
    is part of ``features``.

    In several processes (``torch.distributed``) the work is shared: pass the same images in all, or each its own share,
    ``fit[rank::processes]``. All return the score over all images.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        fit: Labelled images to fit on, a sequence: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs of any
            sizes; for FAST also batches of them, or a store of their features (``store_features``).
        test: Labelled images to report on, in the same form; batches of them as well.
        classes: Number of classes, at least 2: labels run 0..classes-1; -1 and 255 are ignored.
        protocol: FAST, LEOPART, DINOV3 or settings of your own, such as ``LEOPART._replace(epochs=5)``.
        steps: Number of steps of AdamW on the linear layer, with a cosine learning rate; for FAST alone.
        batch_size: Number of images in a step of FAST; number of images encoded at once by the others.
        lr: Learning rate at the start; for FAST alone.
        label_stride: Step, in pixels, between the rows and columns of labels that are fitted on, for speed; the test
            uses all. For FAST alone.
        seed: Seed of the order of images, of crops and of the layer's first weights.

    Returns:
        Mean intersection over union on the test split, 0..1. A class that occurs neither in labels nor in answers
        counts as 0 by LEOPART and does not count by the others.

    Raises:
        ValueError: If the protocol is unknown, a split is empty, ``fit`` has no label, a feature is not finite, a label
            or a setting is out of range, or an argument has another shape or dtype.
    """
    check_probe(classes, batch_size)
    if isinstance(protocol, LinearProbe):
        if not (hasattr(fit, "__len__") and hasattr(fit, "__getitem__")):
            raise ValueError(f"fit: expected a sequence of (image, labels) pairs, got {type(fit).__name__}")
        fit, test = own_share(fit, "fit"), own_share(test, "test")
        head = train_head(features, cast(Sequence[tuple[Tensor, Tensor]], fit), classes, protocol, batch_size, seed)
        overlap = score_head(features, head, test, classes, protocol, batch_size)
        if not bool(overlap.any()):
            raise ValueError("test: expected at least one labelled pixel, got none")
        ious = class_ious(overlap)
        return float(ious.nan_to_num().mean() if protocol.absent == "zero" else ious.nanmean())
    if protocol != FAST:
        raise ValueError(f"protocol: expected LEOPART, DINOV3, FAST or a LinearProbe, got {protocol!r}")
    overlap = torch.zeros(classes, classes, dtype=torch.int64)
    for of_image in _image_overlaps(features, fit, test, classes, steps, batch_size, lr, label_stride, seed):
        overlap += of_image
    if not isinstance(test, StoredFeatures) or test.shared:
        overlap = summed(overlap)
    _check_labelled(overlap)
    return float(class_ious(overlap).nanmean())


@torch.inference_mode(False)
def linear_overlaps(
    features: Features,
    fit: Labelled | StoredFeatures,
    test: Labelled | StoredFeatures,
    classes: int,
    *,
    steps: int = 200,
    batch_size: int = 16,
    lr: float = 0.02,
    label_stride: int = 2,
    seed: int = 0,
) -> Tensor:
    """What ``linear_segmentation`` scores with FAST, image by image, for intervals over the test images (bootstrap).

    The arguments are those of ``linear_segmentation``.

    Returns:
        How many pixels of each class got each answer, int64 ``(images, classes, classes)``, for the test images of this
        process: all of them, or its share. ``linear_segmentation`` is the mean intersection over union of the sum over
        all images.

    Raises:
        ValueError: As ``linear_segmentation``.

    Examples:
        >>> pairs = [(torch.randint(256, (3, 16, 24), dtype=torch.uint8), torch.randint(3, (16, 24))) for _ in range(4)]
        >>> linear_overlaps(lambda images: images.float(), pairs, pairs, classes=3, steps=2).shape
        torch.Size([4, 3, 3])
    """
    check_probe(classes, batch_size)
    every = [*_image_overlaps(features, fit, test, classes, steps, batch_size, lr, label_stride, seed)]
    overlaps = torch.stack([*every, torch.zeros(classes, classes, dtype=torch.int64)])[:-1]  # the share may be empty
    overlap = overlaps.sum(0)
    if not isinstance(test, StoredFeatures) or test.shared:
        overlap = summed(overlap)
    _check_labelled(overlap)
    return overlaps


def _check_labelled(overlap: Tensor) -> None:
    """Refuses test images without a labelled pixel; the overlap is that of all processes, so that all refuse."""
    if not bool(overlap.any()):
        raise ValueError("test: expected (image, labels) pairs with at least one labelled pixel, got none")


def _image_overlaps(
    features: Features,
    fit: Labelled | StoredFeatures,
    test: Labelled | StoredFeatures,
    classes: int,
    steps: int,
    batch_size: int,
    lr: float,
    label_stride: int,
    seed: int,
) -> Iterator[Tensor]:
    """Fits the layer of FAST, and gives the overlap of each test image of this process."""
    check_at_least(steps, 1, "steps")
    check_positive(lr, "lr")
    check_at_least(label_stride, 1, "label_stride")
    fit = fit if isinstance(fit, StoredFeatures) else own_share(fit, "fit")
    test = test if isinstance(test, StoredFeatures) else own_share(test, "test")
    maps, labels, device = _gathered(features, fit, classes, batch_size, label_stride)
    mean, std = _moments(maps, device)
    linear = nn.Conv2d(len(mean), classes, 1).to(device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)

    def upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(linear((x - mean) / std), size, mode="bilinear", align_corners=False)

    for _ in range(steps):
        chosen = torch.randint(len(maps), (batch_size,), generator=generator).tolist()
        answers = [labels[index].to(device) for index in chosen]
        pixels = sum(int((answer != IGNORED).sum()) for answer in answers)
        if pixels == 0:
            continue  # the mean over no pixel is NaN
        optimizer.zero_grad()
        drawn = ((maps[index].to(device), answer) for index, answer in zip(chosen, answers, strict=True))
        for x, answer in batches(drawn, _FITTED):
            with torch.enable_grad():  # the caller may have switched gradients off
                logits = upsampled(x, (answer.shape[1], answer.shape[2]))
                loss = F.cross_entropy(logits, answer.long(), ignore_index=IGNORED, reduction="sum") / pixels
            loss.backward()
        optimizer.step()
        schedule.step()

    for found, answer in encoded(features, test, classes, batch_size, "test", own=True):
        for x, truth in zip(found, answer, strict=True):
            with torch.no_grad():
                predicted = upsampled(x[None], (truth.shape[0], truth.shape[1])).argmax(1)[0]
            yield overlap_of(predicted, truth, classes, classes).cpu()


def _gathered(
    features: Features, fit: Labelled | StoredFeatures, classes: int, batch_size: int, label_stride: int
) -> tuple[Held, Held, torch.device]:
    """Maps (C, h, w) and coarse labels of all images of all processes, and the device of this process's maps."""
    maps, answers, device = Held(), Held(), torch.device("cpu")
    found = encoded(features, fit, classes, batch_size, "fit")
    single = (
        (one, _coarse(answer, label_stride)) for part, labels in found for one, answer in zip(part, labels, strict=True)
    )
    turns = in_turn(single, _sent, batch_size)
    every = ((pair, pair) for pair in single) if isinstance(fit, StoredFeatures) else turns
    labelled = False
    for told, own in every:
        one, answer = told if own is None else own
        device = device if own is None else one.device
        labelled = labelled or bool((answer != IGNORED).any())
        maps.append(one)
        answers.append(answer)
    if len(maps) == 0:
        raise ValueError("fit: expected (image, labels) pairs, got none")
    if not labelled:
        raise ValueError(f"fit: expected labels in 0..{classes - 1}, got none in {len(maps)} images")
    return maps, answers, device


def _sent(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the other processes, where there are any, get to know of an image: its map and labels."""
    return pair if processes() == 1 else (pair[0].cpu(), pair[1].cpu())


def _coarse(labels: Tensor, stride: int) -> Tensor:
    """Every so manieth label of (H, W) along each side, in 16 bits."""
    size = (max(1, labels.shape[0] // stride), max(1, labels.shape[1] // stride))
    return nearest(labels, size).to(torch.int16)


def _moments(maps: Held, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1), image by image: a difference of all maps is large."""
    zero = torch.zeros(len(maps[0]), dtype=torch.float64, device=device)
    count, mean, square = 0, zero.clone(), zero.clone()
    for image in maps:
        count += image[0].numel()
        mean += image.to(device).sum((1, 2)).double()
    mean /= count
    for image in maps:
        square += (image.to(device) - mean.float()[:, None, None]).square().sum((1, 2)).double()
    std = (square / max(count - 1, 1)).sqrt().clamp(min=1e-6)
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)
