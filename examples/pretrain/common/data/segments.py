"""Masks of an image: segments without labels to group its pixels by, and where it has data.

Each is a function of the image alone, ``(C, H, W)``, and returns a map ``(H, W)`` of segment ids from 1 on: 0 is left
for where there is nothing, as in the mask of a ``MaskedView``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.pretrain.common.data.views import MaskOf


class Grid:
    """Rectangles of equal size.

    Args:
        side: Number of rectangles along each side, 1 to 15.

    Raises:
        ValueError: If the number is another.
    """

    def __init__(self, side: int) -> None:
        if not 1 <= side <= 15:  # 225 ids, of the 255 of a byte
            raise ValueError(f"data.grid: expected 1 to 15 rectangles along each side, got {side}")
        self.side = side

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 ``(H, W)``, ids row by row."""
        row, column = (torch.arange(length) * self.side // length for length in image.shape[-2:])
        return (1 + self.side * row[:, None] + column).byte()


class Felzenszwalb:
    """Segments of similar colour (Felzenszwalb and Huttenlocher 2004), as scikit-image finds them.

    Args:
        scale: Scale of the segments, at least 1: larger values give larger segments. It is also the least number of
            pixels of a segment.

    Raises:
        ValueError: If the scale is less than 1.
        ImportError: If scikit-image is not installed.
    """

    def __init__(self, scale: int = 1000) -> None:
        if scale < 1:
            raise ValueError(f"data.segment_scale: expected at least 1, got {scale}")
        self.scale = scale
        _felzenszwalb()  # before the training starts

    def __call__(self, image: Tensor) -> Tensor:
        """int64 ``(H, W)``."""
        pixels = image.permute(1, 2, 0).numpy()
        found = _felzenszwalb()(pixels, scale=self.scale, min_size=self.scale, channel_axis=-1)
        ids = 1 + torch.from_numpy(found)
        return ids + (ids >= 255)  # 255 is what does not count


def _felzenszwalb() -> Any:
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise ImportError(
            "data.segments: scikit-image finds Felzenszwalb's segments; install the extra: pip install "
            "'densessl[segments]'"
        ) from error
    return felzenszwalb


class NoData:
    """A mask of where an image has data: what segments it has there, 1 without segments, and 0 elsewhere.

    Args:
        value: Value of all channels of a pixel without data, as decoded: 0 to 255, and 0 to 1 from 16 bits.
        segments: Makes another mask, which is restricted to the data; None: there is none.

    Raises:
        ValueError: If the value is no finite number.
    """

    def __init__(self, value: float, segments: MaskOf | None = None) -> None:
        if not abs(value) < float("inf"):
            raise ValueError(f"data.nodata: expected a finite number, got {value}")
        self.value, self.segments = value, segments

    def __call__(self, image: Tensor) -> Tensor:
        """``(H, W)``."""
        most, whole = (255, True) if image.dtype == torch.uint8 else (1, False)
        if self.value > most or (whole and (self.value < 0 or self.value % 1)):
            kind = "a whole number in 0..255, as these pixels" if whole else "at most 1: 16 bits are divided by 65,535"
            raise ValueError(f"data.nodata: expected {kind}, got {self.value}")
        has_data = (image != self.value).any(0)
        return has_data.byte() if self.segments is None else self.segments(image) * has_data
