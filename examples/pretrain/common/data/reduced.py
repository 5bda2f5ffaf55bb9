"""Large JPEGs, decoded at the scale that the drawn crops need.

A camera's photo has 12 million pixels, a view has 50 thousand. A JPEG can be decoded at a half, a quarter or an eighth
of its size in a fraction of the time. What is drawn, and where the views say they are from, is the file's all the same:
only the resampling starts from fewer pixels, of which each view still gets at least one for each of its own.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from densessl import View
from examples.pretrain.common.data.tiff import MODES

STEPS = (8, 4, 2)
ORIENTATION = 0x0112  # of EXIF
# Orientations that turn the stored rows or columns around, so that the first one shown is the last one stored.
MIRRORED_ROWS, MIRRORED_COLUMNS = (3, 4, 7, 8), (2, 3, 6, 7)


class FilePixels(tv_tensors.Image):
    """Stands for an image of which no pixel is in memory: it has the file's size, and can only be cropped.

    Attributes:
        photo: The file; None where only the places of crops are asked for.
    """

    photo: LargeJpeg | None

    @classmethod
    def of(cls, size: tuple[int, int], channels: int, photo: LargeJpeg | None = None) -> FilePixels:
        """The image of a file, or one of its size without a file."""
        image = torch.zeros(channels, 1, 1, dtype=torch.uint8).expand(channels, *size).as_subclass(cls)
        image.photo = photo
        return image


@F.register_kernel(F.resized_crop, FilePixels)
def _resized_crop(
    image: FilePixels, top: int, left: int, height: int, width: int, size: Sequence[int], *_: Any, **__: Any
) -> tv_tensors.Image:
    if image.photo is None:
        return tv_tensors.Image(torch.zeros(image.shape[0], 1, 1, dtype=torch.uint8).expand(-1, *size))
    return tv_tensors.Image(image.photo.crop((top, left, height, width), (size[0], size[1])))


class LargeJpeg:
    """A JPEG whose crops are taken from as few pixels as they need.

    Args:
        data: The file's bytes, uint8.
        channels: 1 or 3.
    """

    def __init__(self, data: Tensor, channels: int) -> None:
        self.data, self.channels = data, channels
        with self._opened() as file:
            self.orientation = file.getexif().get(ORIENTATION, 1)
            self.stored = (file.height, file.width)
        self.pixels: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, turned as EXIF says."""
        return self.stored[::-1] if self.orientation in (5, 6, 7, 8) else self.stored

    def decode(self, step: int) -> None:
        """Decodes one pixel of so many along each side: 1, 2, 4 or 8."""
        with self._opened() as file:
            if step > 1:
                file.draft("L" if self.channels == 1 else None, (file.width // step, file.height // step))
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            self.pixels = file.convert("L" if self.channels == 1 else "RGB")
        self.step = step

    def crop(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
        """A part of the image, resized with antialiasing.

        Args:
            box: Top, left, height and width in pixels of the file.
            size: Height and width of the part afterwards.

        Returns:
            uint8 ``(C, height, width)``.
        """
        step = step_for([(box[2] / size[0], box[3] / size[1])])
        if self.pixels is None or self.step > step:
            self.decode(step)
        # The last row of an eighth stands for up to eight rows of the file, of which some are not there.
        beyond = [-side % self.step for side in self.size]
        top = box[0] + (beyond[0] if self.orientation in MIRRORED_ROWS else 0)
        left = box[1] + (beyond[1] if self.orientation in MIRRORED_COLUMNS else 0)
        edges = (left, top, left + box[3], top + box[2])
        place = tuple(edge / self.step for edge in edges)
        part = np.array(self.pixels.resize(size[::-1], Image.Resampling.BILINEAR, box=place))
        return torch.from_numpy(np.atleast_3d(part)).permute(2, 0, 1)

    def _opened(self) -> Image.Image:
        return Image.open(io.BytesIO(self.data.numpy()), formats=("JPEG",))


def step_for(shrinking: Sequence[tuple[float, float]]) -> int:
    """The step that leaves each crop at least the pixels of its view.

    Args:
        shrinking: For each crop, pixels of the file to a pixel of the view, along height and width.
    """
    least = min(min(pair) for pair in shrinking)
    return next((step for step in STEPS if step <= least), 1)


def shrinking(view: View, size: tuple[int, int]) -> tuple[float, float]:
    """Pixels of a file to a pixel of a view, along height and width.

    Args:
        view: A crop.
        size: Height and width of the file.
    """
    (wide, _, _), (_, high, _), _ = view.coords.tolist()
    return high * size[0] / view.image.shape[1], wide * size[1] / view.image.shape[2]


def large_jpeg(data: Tensor, channels: int, side: int) -> LargeJpeg | None:
    """The file as a large JPEG; None where it is none, or its shorter side has fewer pixels than asked for."""
    if channels not in MODES or data[:2].tolist() != [0xFF, 0xD8]:
        return None
    try:
        photo = LargeJpeg(data, channels)
    except Exception:  # whoever decodes it whole says what is wrong with it
        return None
    return photo if min(photo.size) >= side else None
