"""Where images come from: a folder of photos, or tar shards. Each makes the loader of one process."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from examples.pretrain.common.data.decode import find_photos
from examples.pretrain.common.data.files import Photos
from examples.pretrain.common.data.fingerprint import fingerprint
from examples.pretrain.common.data.loader import ResumableLoader
from examples.pretrain.common.data.views import DrawViews


class FolderSource:
    """Photos of a folder, sub-folders included.

    Args:
        folder: Path of the folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._found: list[Path] | None = None

    def count(self, processes: int, workers: int) -> int:
        """Number of images, of which every process needs one.

        Raises:
            ValueError: If there are fewer, or the folder is missing.
        """
        found = len(self._paths())
        if found < processes:
            raise ValueError(
                f"data.folder: expected an image for each of {processes} processes, found {found} in {self.folder}"
            )
        return found

    def fingerprint(self) -> str:
        """What tells these images from others, wherever the folder lies: their names, and the bytes of a few."""
        return fingerprint(self.folder, self._paths())

    def loader(
        self,
        draw: DrawViews,
        channels: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        batches: int | None = None,
    ) -> ResumableLoader:
        """The loader of one process.

        Args:
            draw: Draws two views of an image.
            channels: Number of channels of the images.
            batch_size: Number of images of a batch of this process.
            rank: Number of this process.
            world_size: Number of all processes.
            workers: Number of reading processes.
            batches: Number of batches of an epoch; None: as many as the images fill.
        """
        return ResumableLoader(
            Photos(self._paths(), draw, channels=channels),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=draw.seed,
            workers=workers,
            batches=batches,
        )

    def _paths(self) -> list[Path]:
        if self._found is None:
            self._found = find_photos(self.folder)  # once, because a large set takes minutes to list
        return self._found


class ShardSource:
    """Photos in tar shards; see shards.py and shard_loader.py.

    Args:
        pattern: ``shards/{000..099}.tar``, a URL, or ``pipe:`` and a command that writes one.
        images: Number of images in all shards.
    """

    def __init__(self, pattern: str, images: int | None) -> None:
        self.folder, self.images = pattern, images

    def count(self, processes: int, workers: int) -> int:
        """Number of images.

        Raises:
            ValueError: If it is not known, a shard is missing, or there are too few shards for all that read.
        """
        from examples.pretrain.common.data.shard_lists import find_shards

        find_shards(self.folder, self.images, processes, workers)
        return self.images

    def fingerprint(self) -> str:
        """What tells these shards from others: the last part of their pattern."""
        return PurePosixPath(self.folder).name

    def loader(
        self,
        draw: DrawViews,
        channels: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        batches: int | None = None,
    ) -> Any:
        """The loader of one process, a ShardLoader. The arguments are those of FolderSource's."""
        from examples.pretrain.common.data.shard_lists import find_shards
        from examples.pretrain.common.data.shard_loader import ShardLoader

        return ShardLoader(
            find_shards(self.folder, self.images, world_size, workers),
            draw,
            images=self.images,
            channels=channels,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            workers=workers,
            batches=batches,
        )


def source_of(folder: str, images: int | None) -> FolderSource | ShardSource:
    """The source that ``data.folder`` means."""
    from examples.pretrain.common.data.shard_lists import is_shards

    return ShardSource(folder, images) if is_shards(folder) else FolderSource(folder)
