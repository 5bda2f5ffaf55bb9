"""The spread of a difference of two arms over the test images: a bootstrap, beside the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Overlaps = Mapping[str, Tensor]  # of each labelled set (images, classes, classes), see linear_overlaps


def overlaps_file(encoder: Path, of_set: str) -> Path:
    """Where the overlaps of an encoder's linear probe on a labelled set are kept."""
    return encoder.with_name(f"{encoder.stem}-{of_set}.overlaps.safetensors")


def save_overlaps(overlaps: Tensor, encoder: Path, of_set: str) -> None:
    """Keeps the overlaps beside the encoder."""
    save_file({"overlaps": overlaps.to(torch.int32)}, overlaps_file(encoder, of_set))


def load_overlaps(encoder: Path, sets: Sequence[str]) -> Overlaps | None:
    """The overlaps on all these sets; None if one is not there."""
    files = {name: overlaps_file(encoder, name) for name in sets}
    if not all(file.is_file() for file in files.values()):
        return None
    return {name: load_file(file)["overlaps"] for name, file in files.items()}


def mean_iou(overlaps: Tensor) -> Tensor:
    """Mean intersection over union of sums of overlaps ``(..., classes, classes)``; absent classes do not count."""
    both = overlaps.diagonal(dim1=-2, dim2=-1).double()
    return (both / (overlaps.sum(-1) + overlaps.sum(-2) - both)).nanmean(-1)


def bootstrap(first: Sequence[Overlaps], second: Sequence[Overlaps], draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the difference of two arms' mIoU, mean over sets and seeds, over draws of the test images.

    Both arms and all seeds see the same draw of images, since their scores rise and fall together with the images.

    Args:
        first: Overlaps of one arm, for each seed.
        second: Those of the other arm, for the same seeds.
        draws: Number of draws with replacement from each set's images.
    """
    generator = torch.Generator().manual_seed(0)
    gains = torch.zeros(draws, dtype=torch.float64)
    for name, example in first[0].items():
        images = len(example)
        drawn = torch.randint(images, (draws, images), generator=generator)
        weights = torch.zeros(draws, images, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(1).double().expand(draws, images)
        )
        for sign, arm in ((1, first), (-1, second)):
            for seed in arm:
                sums = (weights @ seed[name].double().flatten(1)).unflatten(1, example.shape[1:])
                gains += sign * mean_iou(sums) / (len(arm) * len(first[0]))
    low, high = gains.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
