"""How the transfer recipes batch: one check of the batch size, and one loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def check_batch_size(batch_size: int, images: int, processes: int, what: str) -> None:
    """Checks that the images fill at least one batch, and that the batch divides among the processes.

    Args:
        batch_size: Number of images a step over all processes.
        images: Number of training images.
        processes: Number of processes.
        what: What the images are, for the error: ``"images of FOLDER"``.

    Raises:
        ValueError: If they do not.
    """
    if batch_size < 1 or batch_size % processes or batch_size > images:
        raise ValueError(
            f"data.batch_size: expected a multiple of the {processes} processes, at most the {images} {what}, "
            f"got {batch_size}"
        )


def training_loader(
    images: Dataset, batch_size: int, workers: int, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader:
    """Whole batches, shuffled.

    Args:
        images: The training images.
        batch_size: Number of images a step in this process.
        workers: Number of reading processes.
        collate: Makes a batch of a list of samples; stacks them where it is None.
    """
    return _loader(images, batch_size, workers, collate, shuffle=True, drop_last=True)


def evaluation_loader(
    images: Dataset, batch_size: int, workers: int, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader:
    """Every image once, in order. The arguments are those of training_loader."""
    return _loader(images, batch_size, workers, collate, shuffle=False, drop_last=False)


def _loader(images: Dataset, batch_size: int, workers: int, collate: Any, **order: bool) -> DataLoader:
    return DataLoader(
        images,
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **order,
    )
