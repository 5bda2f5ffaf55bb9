"""Images and their label images, as the protocols take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from densessl.evaluation.data._files import need_files, read_ids, read_image

IGNORED = 255
_HIGHEST = 256


class LabelledImages(Dataset):
    """Images with a class number for each pixel.

    Args:
        images: Paths of the images.
        labels: Paths of their label images, or of files ``*.mat`` of SBD.
        classes: Number of classes.
        class_of: Class of each number in the label images, 255 for those that are ignored; other numbers are refused.
        layout: What the folder holds, in words, for errors.

    Raises:
        ValueError: If a file is missing, or there is none.
    """

    def __init__(
        self, images: Sequence[Path], labels: Sequence[Path], classes: int, class_of: Mapping[int, int], layout: str
    ) -> None:
        need_files(images, layout)
        need_files(labels, layout)
        self.images, self.labels, self.classes = list(images), list(labels), classes
        self._class_of = torch.full((_HIGHEST,), -1, dtype=torch.int64)
        self._class_of[list(class_of)] = torch.tensor(list(class_of.values()))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self.images):
            raise IndexError(f"index: expected 0..{len(self.images) - 1}, got {index}")
        path, name = self.images[index], self.labels[index]
        ids = read_ids(name)
        image = read_image(path)
        if image.shape[1:] != ids.shape:  # perhaps the labels were drawn on the pixels as they are stored
            image = read_image(path, turn=False)
        if image.shape[1:] != ids.shape:
            raise ValueError(f"folder: {name} is {_size(ids)} pixels, its image {path} {_size(image)}")
        labels = self._class_of[ids]
        if bool((labels < 0).any()):
            wrong = sorted(set(ids[labels < 0].tolist()))
            raise ValueError(f"folder: {name} holds the number {wrong[0]}, which is no class")
        return image, labels


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"


class _Resized(Dataset):
    def __init__(self, labelled: Sequence[tuple[Tensor, Tensor]], size: tuple[int, int]) -> None:
        self.labelled, self.size = labelled, size

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = self.labelled[index]
        image = resize(image, list(self.size), antialias=True)
        # Doubles hold every class number, and interpolate takes no integers.
        near = F.interpolate(labels[None, None].double(), self.size, mode="nearest-exact")
        return image, near[0, 0].long()


def resized(labelled: Sequence[tuple[Tensor, Tensor]], size: tuple[int, int]) -> Sequence[tuple[Tensor, Tensor]]:
    """The same pairs at one size, each resized when it is read; the sides are scaled each by its own factor.

    Args:
        labelled: Labelled images, (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs.
        size: ``(H, W)`` in pixels. Images are resized bilinearly with antialiasing, labels take the nearest pixel.

    Raises:
        ValueError: If a side is smaller than 1.
    """
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected (H, W) of at least 1, got {tuple(size)}")
    return _Resized(labelled, (int(size[0]), int(size[1])))  # type: ignore[return-value]  # torch's Dataset is none
