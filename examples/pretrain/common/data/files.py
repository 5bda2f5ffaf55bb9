"""Views of the photos of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from examples.pretrain.common.data.decode import file_bytes, reason
from examples.pretrain.common.data.views import Batch, DrawViews


class Photos(Dataset):
    """Views of photos, addressed by (epoch, index).

    Args:
        paths: Paths of the photos.
        draw: Draws two views of an image.
        channels: Number of channels of the images.
    """

    def __init__(self, paths: Sequence[Path], draw: DrawViews, *, channels: int) -> None:
        self.paths, self.draw, self.channels = paths, draw, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        image, unreadable = self._read(epoch, index)
        return self.draw(image, str(self.paths[index]), epoch, index, unreadable=unreadable)

    def _read(self, epoch: int, index: int) -> tuple[Tensor, int]:
        """The photo, or the next readable one in its place; and how many were not."""
        for unreadable in range(len(self.paths)):
            path = self.paths[(index + unreadable) % len(self.paths)]
            try:
                return self.draw.decoded(file_bytes(path), str(path), self.channels, epoch, index), unreadable
            except ImportError:
                raise  # a missing package is no unreadable photo
            except (RuntimeError, OSError) as error:
                self.draw.name_once(str(path), f"unreadable, another takes its place: {reason(error, path)}")
        raise ValueError(f"data.folder: expected photos, got {len(self.paths)} files of which none can be read")
