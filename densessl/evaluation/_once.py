"""Labelled images and photos that are read once, each checked when it comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densessl.evaluation._common import check_labelled

Pair = tuple[Tensor, Tensor]


class ReadOnce(Sequence[Pair]):
    """A sequence of (image, labels) pairs whose items are checked as they are read.

    Args:
        labelled: the pairs, such as a data set that decodes an image each time it is asked for one.
        name: the argument's name, for the error.
    """

    def __init__(self, labelled: Sequence[Pair], name: str) -> None:
        self.labelled, self.name = labelled, name
        self._size: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        image, labels = self.labelled[index]
        size = self._size = self._size or tuple(image.shape[-2:])
        if image.dtype != torch.uint8 or image.ndim != 3 or tuple(image.shape[-2:]) != size:
            raise ValueError(
                f"{self.name}[{index}]: expected an image uint8 (3, H, W) with (H, W) = {size} as the first, "
                f"got {image.dtype} {tuple(image.shape)}"
            )
        if labels.dtype != torch.int64 or tuple(labels.shape) != size:
            raise ValueError(
                f"{self.name}[{index}]: expected labels int64 (H, W) = {size}, got {labels.dtype} {tuple(labels.shape)}"
            )
        return image, labels


def read_once(labelled: Any, name: str) -> Any:
    """Labelled images, checked at once where they are at hand and as they are read where they are not.

    Args:
        labelled: pairs, in a list or in anything else that gives them by number.
        name: the argument's name, for the error.

    Raises:
        ValueError: if there is none, or on another shape or dtype in a list.
    """
    sized = hasattr(labelled, "__len__") and hasattr(labelled, "__getitem__")
    if isinstance(labelled, list | tuple) or not sized or len(labelled) == 0:
        check_labelled(labelled, name)
        return labelled
    return ReadOnce(labelled, name)
