"""Labelled images of any sizes, one at a time or in batches, and their feature maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from densessl.evaluation._refuse import check_finite, known_labels
from densessl.evaluation._together import dealt, processes, rank, same_in_all

Features = Callable[[Tensor], Tensor]
Labelled = Iterable[tuple[Tensor, Tensor]]
IGNORED = -1

__all__ = [
    "IGNORED",
    "Features",
    "Labelled",
    "batches",
    "encode",
    "iter_of",
    "nearest",
    "own_share",
    "pairs",
    "resized",
]


class _Dealt:
    """This process's share of the single images of batches, all of which it reads."""

    def __init__(self, labelled: Labelled) -> None:
        self._labelled = labelled

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        singles = chain.from_iterable(zip(*batch, strict=True) for batch in iter_of(self._labelled))
        return islice(singles, rank(), None, processes())


def own_share(labelled: Labelled, name: str) -> Labelled:
    """This process's images: all that it passed, or its share of them if all processes passed the same.

    Raises:
        ValueError: if the images can be read through only once.
    """
    if isinstance(labelled, Iterator):
        raise ValueError(f"{name}: expected a sequence or an iterable to be read more than once, got an iterator")
    if processes() == 1:
        return labelled
    first = next(iter_of(labelled), None)
    if first is None or first[0].ndim == 3:
        return dealt(labelled)
    return _Dealt(labelled) if same_in_all(first) else labelled


def iter_of(items: Iterable[Any]) -> Iterator[Any]:
    """Iterates by index where there is a length, since a data set may have no iteration of its own."""
    if hasattr(items, "__getitem__") and hasattr(items, "__len__"):
        sequence = cast(Sequence[Any], items)
        return (sequence[index] for index in range(len(sequence)))
    return iter(items)


def pairs(labelled: Labelled, classes: int, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 (3, H, W) and labels int64 (H, W), IGNORED where there is none; batches are taken apart.

    Raises:
        ValueError: on other shapes and dtypes, or on a label that is neither a class nor -1 or 255.
    """
    for index, (images, labels) in enumerate(iter_of(labelled)):
        whole = images.ndim == 4
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape:
            raise ValueError(
                f"{name}[{index}]: expected an image uint8 (3, H, W) or a batch (B, 3, H, W), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        size = (*images.shape[:-3], *images.shape[-2:])
        if labels.dtype != torch.int64 or tuple(labels.shape) != size:
            raise ValueError(
                f"{name}[{index}]: expected labels int64 of size {size}, got {labels.dtype} {tuple(labels.shape)}"
            )
        labels = labels.masked_fill(~known_labels(labels, classes, name), IGNORED)
        yield from zip(images, labels, strict=True) if whole else [(images, labels)]


def batches(images: Iterable[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """In order, as many at once as have one size and at most ``count``."""
    held: list[tuple[Tensor, Tensor]] = []
    for pair in images:
        if held and (len(held) == count or held[0][0].shape != pair[0].shape):
            yield torch.stack([image for image, _ in held]), torch.stack([labels for _, labels in held])
            held = []
        held.append(pair)
    if held:
        yield torch.stack([image for image, _ in held]), torch.stack([labels for _, labels in held])


@torch.no_grad()
def encode(features: Features, images: Tensor) -> Tensor:
    """Feature maps (B, C, h, w), float32.

    Raises:
        ValueError: if they are no maps, not one for each image, or not finite.
    """
    maps = features(images)
    if maps.ndim != 4 or not maps.is_floating_point() or len(maps) != len(images):
        raise ValueError(
            f"features: expected it to return maps (B, C, h, w) with B = {len(images)}, "
            f"got {maps.dtype} {tuple(maps.shape)}"
        )
    check_finite(maps, "features")
    return maps.detach().float()


def resized(
    image: Tensor, labels: Tensor, size: tuple[int, int], how: Literal["bilinear", "bicubic"] = "bilinear"
) -> tuple[Tensor, Tensor]:
    """An image resized as Pillow resizes it, and labels that take the nearest pixel's."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image, labels
    image = V.resize(image, list(size), InterpolationMode(how), antialias=True)
    return image, nearest(labels, size)


def nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (H, W) at another size, each the label at the centre of its place."""
    return F.interpolate(labels[None, None].double(), tuple(size), mode="nearest-exact")[0, 0].to(labels.dtype)
