"""What a backbone is worth on one's own images: the probes of ``densessl.evaluation``, leaving no trace in a run.

A probe must not change what it looks at. ``frozen`` gives every module back in the mode that it was in, batch norm's
statistics are read and not written, and ``scores`` leaves torch's generators as it found them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from densessl.evaluation import alone, correspondence_accuracy, linear_segmentation, nearest_neighbor_segmentation
from examples.pretrain.common.backbones import FrozenStatistics
from examples.pretrain.common.samples import Labels

Features = Callable[[Tensor], Tensor]
# Names of the scores, as the logs and reports have them, with what they say.
SCORES = {
    "pck": "same point found again in a warped photo (PCK within one cell)",
    "pck_colour": "the same, with the copy's colours changed",
    "neighbors": "labels of the nearest cells (mIoU)",
    "linear": "linear segmentation (mIoU)",
}
IN_WORDS = {
    "pck": "correspondence",
    "pck_colour": "correspondence in changed colours",
    "neighbors": "nearest neighbours",
    "linear": "the linear probe",
}
NOISE = 0.005  # of a score of IMAGES or more, see noise_of: the spread over seeds in docs/adapt.md is mostly below it
IMAGES = 64  # that a probe keeps where nothing else is asked for
LINEAR_STEPS = 100  # of the linear probe: half of the library's default, because it is fitted at every reading
BATCH = 16


class Form(NamedTuple):
    """How images go into the network.

    Attributes:
        channels: Number of channels.
        size: Side of the square images in pixels.
        mean: Mean of each channel, for images in 0..1.
        std: Standard deviation of each channel.
    """

    channels: int
    size: int
    mean: Sequence[float]
    std: Sequence[float]


@contextmanager
def frozen(backbone: nn.Module, form: Form) -> Iterator[Features]:
    """The backbone as a function from images, uint8 ``(B, C, H, W)``, to float32 maps, while the block lasts.

    Of a pyramid the finest level is taken. Afterwards every module is in the mode that it was in.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    weight = next(backbone.parameters())
    mean, std = (torch.tensor(values, device=weight.device).view(-1, 1, 1) for values in (form.mean, form.std))

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        x = (images.to(weight.device).float() / 255 - mean) / std
        maps = backbone(x.to(weight.dtype).contiguous(memory_format=torch.channels_last))
        return (next(iter(maps.values())) if isinstance(maps, Mapping) else maps).float()

    backbone.eval()
    try:
        yield features
    finally:
        for module, training in modes:
            module.training = training


def has_seen_nothing(module: nn.Module) -> bool:
    """Whether a module is a batch norm with the mean 0 and the variance 1 that it is born with."""
    # Not num_batches_tracked: some of torchvision's weights have statistics and a count of 0.
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_mean is None:
        return False
    return bool((module.running_mean == 0).all() and (module.running_var == 1).all())


def settled(backbone: nn.Module, photos: Sequence[Tensor], form: Form) -> nn.Module:
    """The backbone itself, or a copy with batch norm's statistics filled where it has seen nothing yet.

    With the mean 0 and the variance 1 that batch norm is born with, a network at random is not the one that its first
    step trains, and cannot be compared with what comes of it. Where a training keeps the statistics, so does this.
    """
    if not photos or isinstance(backbone, FrozenStatistics) or not any(map(has_seen_nothing, backbone.modules())):
        return backbone
    copied = copy.deepcopy(backbone)
    with frozen(copied, form) as features:
        for module in copied.modules():
            if has_seen_nothing(module):
                module.momentum = None  # the mean over all batches
                module.train()
        for start in range(0, len(photos), BATCH):
            features(torch.stack(list(photos[start : start + BATCH])))
    return copied


def recoloured(images: Tensor) -> Tensor:
    """Brightness, contrast and, of colour images, saturation and hue changed, a function of the place in the batch.

    Args:
        images: A batch of images, uint8 ``(B, C, H, W)``.

    Returns:
        The same form.
    """
    generator = torch.Generator().manual_seed(7)
    factors = (0.6 + 0.8 * torch.rand(len(images), 3, generator=generator)).tolist()
    hues = (0.2 * torch.rand(len(images), generator=generator) - 0.1).tolist()
    if images.shape[1] != 3:  # a factor and an offset of all channels, as brightness and contrast are
        changed = [
            (image.float() - 128) * contrast + 128 * brightness
            for image, (brightness, contrast, _) in zip(images, factors, strict=True)
        ]
        return torch.stack(changed).round().clamp(0, 255).to(torch.uint8)
    changed = []
    for image, (brightness, contrast, saturation), hue in zip(images, factors, hues, strict=True):
        image = F.adjust_contrast(F.adjust_brightness(image, brightness), contrast)
        changed.append(F.adjust_hue(F.adjust_saturation(image, saturation), hue))
    return torch.stack(changed)


def scores(features: Features, photos: Sequence[Tensor], labels: Labels | None = None) -> dict[str, float]:
    """All scores of frozen features, by name; those of SCORES that the images allow.

    Args:
        features: Images, uint8 ``(B, C, H, W)``, to maps.
        photos: Photos that were not trained on, uint8 ``(C, H, W)`` each; none leaves correspondence out.
        labels: Labelled images; None leaves the probes with labels out.

    Raises:
        ValueError: If a feature is not finite.
    """
    found: dict[str, float] = {}
    # The linear layer is born from torch's generators, which are the run's.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    # The first of several processes scores alone: the others go on with the training, and would never answer.
    with alone(), torch.random.fork_rng(devices=devices):
        if photos:
            pck = {"distances": (1.0,), "batch_size": BATCH}
            found["pck"] = correspondence_accuracy(features, photos, **pck)[1.0]
            found["pck_colour"] = correspondence_accuracy(features, photos, photometric=recoloured, **pck)[1.0]
        if labels is not None:
            fit, test, classes = labels[:3]
            found["neighbors"] = nearest_neighbor_segmentation(features, fit, test, classes, cells=10_000)
            found["linear"] = linear_segmentation(features, fit, test, classes, steps=LINEAR_STEPS)
    return found


def noise_of(photos: int, labelled: int) -> dict[str, float]:
    """Up to how large a change of each score counts as none: 0.005 from 64 images on, and more for fewer.

    A score is a mean over images, whose error grows as 1 / sqrt(images). It does not fall below 0.005, because the
    spread over seeds remains, however many images there are.

    Args:
        photos: Number of photos that correspondence is scored on.
        labelled: Number of labelled images that the other scores are tested on.
    """
    by_photos, by_labels = (round(NOISE * max(1, IMAGES / max(1, n)) ** 0.5, 3) for n in (photos, labelled))
    return {name: by_photos if name.startswith("pck") else by_labels for name in SCORES}


def changes(
    first: Mapping[str, float], last: Mapping[str, float], noise: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """The scores that rose and those that fell between two readings, with by how much; changes up to noise are none.

    Args:
        first: The earlier reading.
        last: The later one.
        noise: As from ``noise_of``.
    """
    by = {name: round(last[name] - first[name], 3) for name in SCORES if name in first and name in last}
    rose = {name: change for name, change in by.items() if change > noise[name]}
    return rose, {name: -change for name, change in by.items() if -change > noise[name]}


def told(changed: Mapping[str, float], verb: str) -> str:
    """Changes in words: ``"correspondence rose by 0.044, the linear probe rose by 0.010"``."""
    return ", ".join(f"{IN_WORDS[name]} {verb} by {change:.3f}" for name, change in changed.items())
