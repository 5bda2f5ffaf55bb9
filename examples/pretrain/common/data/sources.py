"""Where images come from: a folder of photos, or tar shards. Each makes the loader of one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from examples.pretrain.common.data.files import Photos
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.fingerprint import fingerprint
from examples.pretrain.common.data.loader import ResumableLoader
from examples.pretrain.common.data.names import Names
from examples.pretrain.common.data.views import DrawViews

HELD_OUT = 64  # images, where nothing else is asked for


class FolderSource:
    """Photos of a folder, sub-folders included, or of a text file with a path a line.

    Args:
        folder: Path of the folder or of the text file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._found: Names | None = None
        self._wanted: int | None = 0  # images to hold out
        self._held_out: list[Path] = []

    def hold_out(self, images: int | None) -> None:
        """Keeps images out of the training; to be called before any is read.

        Args:
            images: So many, evenly spaced in the sorted list of all files: which ones depends on that list alone. None:
                64, at most a tenth, and none of fewer than 100.
        """
        self._wanted = images

    def held_out(self) -> list[Path]:
        """The images that are kept out of the training.

        Raises:
            ValueError: If more than half of the images are to be held out, or the folder is missing.
        """
        self._paths()
        return self._held_out

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
        return fingerprint(self._paths())

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

    def paths(self) -> Sequence[Path]:
        """The images that are trained on."""
        return self._paths()

    def _paths(self) -> Names:
        if self._found is None:
            found = find_photos(self.folder)  # once, because a large set takes minutes to list
            wanted = self._wanted
            if wanted is None:
                wanted = min(HELD_OUT, len(found) // 10) if len(found) >= 100 else 0
            if wanted > len(found) // 2:
                raise ValueError(
                    f"probe.images: expected at most half of the {len(found)} images in {self.folder}, got {wanted}"
                )
            apart = evenly(len(found), wanted)
            self._held_out = [found[i] for i in apart]
            self._found = found.without(apart)
        return self._found


def evenly(count: int, wanted: int) -> list[int]:
    """So many of 0..count-1, evenly spaced, away from both ends: a function of the two numbers alone."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


class ShardSource:
    """Photos in tar shards; see shards.py and shard_loader.py.

    Args:
        pattern: ``shards/{000..099}.tar``, a URL, or ``pipe:`` and a command that writes one.
        images: Number of images in all shards.
    """

    def __init__(self, pattern: str, images: int | None) -> None:
        self.folder, self.images = pattern, images

    def hold_out(self, images: int | None) -> None:
        """Holds nothing out: which images are in the shards is not known before they are read.

        Raises:
            ValueError: If a number of images is asked for.
        """
        if images:
            raise ValueError(f"probe.images: expected 0 with tar shards, got {images}; --probe.photos names a folder")

    def held_out(self) -> list[Path]:
        """None."""
        return []

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
