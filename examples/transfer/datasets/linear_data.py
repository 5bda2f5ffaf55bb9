"""Batches for the linear probe: a folder of photos for each class, in ``train/`` and ``val/``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from examples.pretrain.common.data.decode import read_photo
from examples.pretrain.common.data.depths import as_bytes
from examples.pretrain.common.data.finding import find_photos
from examples.transfer.common.batches import check_batch_size, evaluation_loader, training_loader


class ImageFolders(pl.LightningDataModule):
    """Random crops of the training photos, the central crop of the validation photos.

    Args:
        folder: Folder that holds ``train/CLASS/*`` and ``val/CLASS/*``.
        size: Side of the crops in pixels; validation photos are scaled to 8/7 of it before.
        scale: Least and greatest share of a photo's area that a training crop covers.
        batch_size: Number of images of a step over all processes, before gradient accumulation.
        workers: Number of reading processes per GPU.
    """

    def __init__(
        self,
        folder: str,
        size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        batch_size: int = 256,
        workers: int = 8,
    ) -> None:
        super().__init__()
        self.folder, self.batch_size, self.workers = folder, batch_size, workers
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        self.for_training = v2.Compose([v2.RandomResizedCrop(size, scale), v2.RandomHorizontalFlip(), *finish])
        self.for_evaluation = v2.Compose([v2.Resize(size * 8 // 7), v2.CenterCrop(size), *finish])
        self.classes: list[str] = []

    def setup(self, stage: str) -> None:
        """Opens both folders, and checks them before a step is made."""
        self.train = open_folder(Path(self.folder, "train"), self.for_training)
        self.val = open_folder(Path(self.folder, "val"), self.for_evaluation)
        self.classes = self.train.classes
        different = sorted(set(self.train.classes) ^ set(self.val.classes))
        if different:
            raise ValueError(
                f"data.folder: expected the same classes in {self.folder}/train and {self.folder}/val, "
                f"got {len(different)} in one alone, the first {different[0]}"
            )
        what = f"images of {self.folder}/train"
        check_batch_size(self.batch_size, len(self.train), self.trainer.world_size, what)

    def train_dataloader(self) -> DataLoader:
        """Whole batches of random crops."""
        return training_loader(self.train, self.batch_size // self.trainer.world_size, self.workers)

    def val_dataloader(self) -> DataLoader:
        """Every validation photo."""
        return evaluation_loader(self.val, self.batch_size // self.trainer.world_size, self.workers)


class _Classes(ImageFolder):
    """An ImageFolder whose photos are found as in all recipes: ``.ipynb_checkpoints`` is no class, and no photo."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The names of the sub-folders, sorted, and their numbers."""
        names = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        return names, {name: number for number, name in enumerate(names)}

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list[tuple[str, int]]:
        """Each photo with the number of its class."""
        return [
            (str(path), number)
            for name, number in class_to_idx.items()
            for path in find_photos(Path(directory, name), f"class {name}")
        ]


def open_folder(folder: Path, transform: Callable[..., Any]) -> ImageFolder:
    """The photos of a folder with one sub-folder for each class.

    Raises:
        ValueError: If there is no such folder, no class, or a class without photos.
    """
    try:
        return _Classes(folder, transform, loader=load_photo)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.folder: expected a folder of photos for each class in {folder}: {error}") from error


def load_photo(path: str) -> tv_tensors.Image:
    """One photo in 8 bits, ``(3, H, W)``.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        return tv_tensors.Image(as_bytes(read_photo(path, 3)))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"data.folder: {error}") from error
