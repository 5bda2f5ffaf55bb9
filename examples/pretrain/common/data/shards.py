"""Photos in tar shards, for sets larger than a disk: a stream in place of a folder, with the same draws."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import PurePosixPath

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from examples.pretrain.common.data.decode import SUFFIXES, reason
from examples.pretrain.common.data.seeds import seed_of
from examples.pretrain.common.data.shard_lists import webdataset
from examples.pretrain.common.data.views import Batch, DrawViews

log = logging.getLogger(__name__)
BUFFER = 256  # files of one shard in memory, to mix their order


class Position:
    """Where a process goes on in its shards, which are divided into as many shares as it has workers.

    Attributes:
        passed_over: Which shards are not read, because they were read before the shares were made: bool, one entry per
            shard.
        places: How far each share is read, int64 ``(shares, 2)``: the number of its shards that are read to their end,
            and of the files of the next.
        first: The share that the next rows come from.
        given: Rows of its next batch that were given already.
    """

    def __init__(self, passed_over: Tensor, shares: int) -> None:
        self.passed_over, self.places = passed_over, torch.zeros(shares, 2, dtype=torch.int64)
        self.first, self.given = 0, 0

    def is_start(self) -> bool:
        """Whether nothing was read or passed over."""
        return not (self.passed_over.any() or self.places.any())


class ShardStream(IterableDataset):
    """Views of the photos of this process's and worker's shards, each with its share and the place after it.

    A photo's draws follow from (seed, epoch, number of its shard, its number in the shard, view), whoever reads it.

    Args:
        shards: Paths and URLs of the shards.
        draw: Draws the two views of a photo.
        channels: Number of channels of the images.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        workers: Number of processes that read for this one; with 0 it reads itself.
    """

    def __init__(
        self, shards: list[str], draw: DrawViews, *, channels: int, rank: int, world_size: int, workers: int
    ) -> None:
        self.shards, self.draw, self.channels = shards, draw, channels
        self.rank, self.world_size, self.shares = rank, world_size, max(1, workers)
        # Shared with the workers, which live for the whole run.
        self.epoch, self.first = (torch.zeros((), dtype=torch.int64).share_memory_() for _ in range(2))
        self.passed_over = torch.zeros(len(shards), dtype=torch.bool).share_memory_()
        self.places = torch.zeros(self.shares, 2, dtype=torch.int64).share_memory_()

    def start_at(self, epoch: int, position: Position) -> None:
        """The next iteration, in all workers, starts there: the first worker reads the first share."""
        self.epoch.fill_(epoch)
        self.first.fill_(position.first)
        self.passed_over.copy_(position.passed_over)
        self.places.copy_(position.places)

    def share(self, number: int, epoch: int, passed_over: Tensor) -> list[int]:
        """The shards of one share, in their order."""
        generator = torch.Generator().manual_seed(seed_of(self.draw.seed, epoch))
        order = torch.randperm(len(self.shards), generator=generator)
        of_process = order[~passed_over[order]][self.rank :: self.world_size]
        return of_process[number :: self.shares].tolist()

    def __iter__(self) -> Iterator[tuple[Batch, tuple[int, int, int]]]:
        epoch, held, unreadable, worker = int(self.epoch), None, 0, get_worker_info()
        number = (int(self.first) + (0 if worker is None else worker.id)) % self.shares
        shards, (ended, read) = self.share(number, epoch, self.passed_over), self.places[number].tolist()
        for count, shard in enumerate(shards[ended:], ended):
            for place, (file, name, data) in enumerate(self._files(epoch, shard)):
                if count == ended and place < read:
                    continue
                image = self._decode(name, data, epoch, shard, file)
                if image is None:
                    unreadable += 1
                    continue
                if held is not None:
                    yield held._replace(unreadable=torch.tensor(unreadable)), (number, count, place)
                    unreadable = 0
                held = self.draw(image, name, epoch, shard, file)
        if held is not None:
            yield held._replace(unreadable=torch.tensor(unreadable)), (number, len(shards), 0)

    def _files(self, epoch: int, shard: int) -> Iterator[tuple[int, str, bytes | Exception]]:
        """Number, name and bytes of a shard's photos, mixed; at last what ended it early."""
        tar = webdataset().tariterators
        url, errors = self.shards[shard], []
        stream = tar.url_opener([{"url": url}], handler=errors.append)
        files = tar.tar_file_expander(stream, handler=errors.append, select_files=_is_photo, eof_value=None)
        mix = webdataset().filters.shuffle(
            BUFFER, initial=BUFFER, rng=random.Random(seed_of(self.draw.seed, epoch, shard))
        )
        for number, file in mix(enumerate(files)):
            yield number, f"{url}/{file['fname']}", file["data"]
        for error in errors:
            yield -1, url, error

    def _decode(self, name: str, data: bytes | Exception, *numbers: int) -> Tensor | None:
        try:
            if isinstance(data, Exception):
                raise OSError(f"the shard ends early: {data.args[0] if data.args else data!r}")
            if not data:
                raise OSError("an empty file")
            pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return self.draw.decoded(pixels, name, self.channels, *numbers)
        except ImportError:
            raise  # a missing package is no unreadable photo
        except (RuntimeError, OSError) as error:
            self.draw.name_once(name, f"unreadable, left out: {reason(error, name)}")
            return None


def _is_photo(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."
