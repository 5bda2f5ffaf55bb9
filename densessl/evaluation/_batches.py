"""Labelled images of any sizes, one at a time or in batches, and their feature maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from densessl._tensors import check_tensor
from densessl.evaluation._refuse import check_is_pair, check_maps, known_labels
from densessl.evaluation._stored import StoredFeatures
from densessl.evaluation._together import dealt, processes, rank, same_in_all

Features = Callable[[Tensor], Tensor]
Labelled = Iterable[tuple[Tensor, Tensor]]
IGNORED = -1

__all__ = [
    "IGNORED",
    "Features",
    "Labelled",
    "batches",
    "check_pair",
    "encode",
    "encoded",
    "image_count",
    "iter_of",
    "nearest",
    "own_share",
    "own_share_once",
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
        ValueError: If the images can be read through only once.
    """
    if not (hasattr(labelled, "__iter__") or hasattr(labelled, "__getitem__")):
        raise ValueError(f"{name}: expected (image, labels) pairs, got {type(labelled).__name__}")
    if isinstance(labelled, Iterator):
        raise ValueError(f"{name}: expected a sequence or an iterable to be read more than once, got an iterator")
    if processes() == 1:
        return labelled
    first = next(iter_of(labelled), None)
    if first is None:
        return dealt(labelled)
    check_is_pair(first, f"{name}[0]")
    if first[0].ndim == 3:
        return dealt(labelled)
    return _Dealt(labelled) if same_in_all(first) else labelled


def own_share_once(labelled: Labelled, name: str) -> Labelled:
    """As ``own_share``, of images that are read once, by an iterator as well."""
    return dealt(labelled) if isinstance(labelled, Iterator) else own_share(labelled, name)


def iter_of(items: Iterable[Any]) -> Iterator[Any]:
    """Iterates by index where there is a length, since a data set may have no iteration of its own."""
    if hasattr(items, "__getitem__") and hasattr(items, "__len__"):
        sequence = cast(Sequence[Any], items)
        return (sequence[index] for index in range(len(sequence)))
    return iter(items)


def check_readable(labelled: Any, name: str) -> None:
    """Raises ValueError if nothing can be read out of what should be labelled images, or a store."""
    if not isinstance(labelled, (StoredFeatures, Iterable)) and not hasattr(labelled, "__getitem__"):
        raise ValueError(f"{name}: expected (image, labels) pairs, got {type(labelled).__name__}")


def image_count(labelled: Labelled | StoredFeatures) -> int:
    """How many images there are; the first is read to see whether they come in batches, all are read if they do."""
    if isinstance(labelled, StoredFeatures):
        return len(labelled)
    first = next(iter_of(labelled), None)
    if first is None:
        return 0
    check_is_pair(first, "memory[0]")
    check_tensor(first[0], "memory[0]", "an image uint8 (3, H, W)")
    if first[0].ndim == 3 and isinstance(labelled, Sized):
        return len(labelled)
    return sum(len(images) if images.ndim == 4 else 1 for images, _ in iter_of(labelled))


def pairs(labelled: Labelled, classes: int, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 (3, H, W) and labels int64 (H, W), IGNORED where there is none; batches are taken apart.

    Raises:
        ValueError: If an image or its labels have another shape or dtype, or a label is neither a class nor -1 or 255.
    """
    for index, item in enumerate(iter_of(labelled)):
        check_is_pair(item, f"{name}[{index}]")
        images, labels = item
        check_pair(images, labels, f"{name}[{index}]")
        labels = labels.masked_fill(~known_labels(labels, classes, name), IGNORED)
        yield from zip(images, labels, strict=True) if images.ndim == 4 else [(images, labels)]


def check_pair(images: Tensor, labels: Tensor, name: str) -> None:
    """Raises ValueError unless they are an image or a batch of images, uint8, and int64 labels of their size."""
    check_tensor(images, name, "an image uint8 (3, H, W) or a batch (B, 3, H, W)")
    check_tensor(labels, name, "labels int64 (H, W)")
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3 or 0 in images.shape:
        raise ValueError(
            f"{name}: expected an image uint8 (3, H, W) or a batch (B, 3, H, W), "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    size = (*images.shape[:-3], *images.shape[-2:])
    if labels.dtype != torch.int64 or tuple(labels.shape) != size:
        form = "(B, H, W)" if images.ndim == 4 else "(H, W)"
        raise ValueError(f"{name}: expected labels int64 {form} = {size}, got {labels.dtype} {tuple(labels.shape)}")


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
        ValueError: If the features are no maps, not one for each image, or not finite.
    """
    maps = features(images)
    check_maps(maps, len(images))
    return maps.detach().float()


def encoded(
    features: Features,
    labelled: Labelled | StoredFeatures,
    classes: int,
    batch_size: int,
    name: str,
    *,
    own: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Feature maps (B, C, h, w) and labels (B, H, W) on their device, as many at once as have one size.

    Args:
        features: Function from images to maps.
        labelled: Labelled images: pairs of any sizes, or batches of them, each read once; or a store.
        classes: Number of classes; IGNORED stands where a label names none.
        batch_size: Number of images encoded at once.
        name: Name of the argument, for errors.
        own: Whether each of several processes that share a store gets its own batches.

    Raises:
        ValueError: If there is no image, an image or its labels have another shape or dtype, or a label is neither a
            class nor -1 or 255.
    """
    if isinstance(labelled, StoredFeatures):
        for maps, labels in labelled.batches(batch_size, own=own):
            yield maps, labels.masked_fill(~known_labels(labels, classes, name), IGNORED)
        return
    check_readable(labelled, name)
    for images, labels in batches(pairs(labelled, classes, name), batch_size):
        maps = encode(features, images)
        yield maps, labels.to(maps.device)


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
