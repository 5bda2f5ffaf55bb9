"""Photos in tar shards, for sets larger than a disk: a stream in place of a folder, with the same draws.

A run that is continued resumes AT SHARD BOUNDARIES: shards that were read to their end are passed over, shards that
were begun are read again from their start. So up to a shard per worker may be seen twice in that epoch, and as many
images at its end not at all. (A folder continues exactly.)
"""

from __future__ import annotations

import atexit
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.pretrain.common.data.decode import SUFFIXES, decode_photo
from examples.pretrain.common.data.loader import kill_readers, outlive_sigterm
from examples.pretrain.common.data.seeds import seed_of
from examples.pretrain.common.data.shard_lists import webdataset
from examples.pretrain.common.data.views import Batch, DrawViews, collate

log = logging.getLogger(__name__)
BUFFER = 256  # files of one shard in memory, to mix their order


class ShardStream(IterableDataset):
    """Views of the photos of this process's and worker's shards, each with the shards that end before the next.

    A photo's draws follow from (seed, epoch, number of its shard, its number in the shard, view), whoever reads it.

    Args:
        shards: paths and URLs.
        draw: of the views.
        channels: of the images.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, shards: list[str], draw: DrawViews, *, channels: int, rank: int, world_size: int) -> None:
        self.shards, self.draw, self.channels = shards, draw, channels
        self.rank, self.world_size = rank, world_size
        # Shared with the workers, which live for the whole run.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.passed_over = torch.zeros(len(shards), dtype=torch.bool).share_memory_()

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        epoch, held, unreadable, ended = int(self.epoch), None, 0, []
        for shard in self._mine(epoch):
            for number, name, data in self._files(epoch, shard):
                image = self._decode(name, data)
                if image is None:
                    unreadable += 1
                    continue
                if held is not None:
                    yield held._replace(unreadable=torch.tensor(unreadable)), ended
                    unreadable, ended = 0, []
                held = self.draw(image, name, epoch, shard, number)
            ended.append(shard)
        if held is not None:
            yield held._replace(unreadable=torch.tensor(unreadable)), ended

    def _mine(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.draw.seed, epoch))
        order = torch.randperm(len(self.shards), generator=generator)
        of_process = order[~self.passed_over[order]][self.rank :: self.world_size].tolist()
        worker = get_worker_info()
        return of_process if worker is None else of_process[worker.id :: worker.num_workers]

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

    def _decode(self, name: str, data: bytes | Exception) -> Tensor | None:
        try:
            if isinstance(data, Exception):
                raise OSError(f"the shard ends early: {data.args[0] if data.args else data!r}")
            if not data:
                raise OSError("an empty file")
            return decode_photo(torch.frombuffer(bytearray(data), dtype=torch.uint8), name, self.channels)
        except ImportError:
            raise  # a missing package is no unreadable photo
        except (RuntimeError, OSError) as error:
            self.draw.name_once(name, f"unreadable, left out: {error}")
            return None


class ShardLoader:
    """Batches of a ShardStream; its position, in whole shards, is part of a checkpoint.

    An epoch has ``images // (batch_size * world_size)`` batches for every process. A process whose shards hold fewer
    images starts them again, and says so; what others have over is left out. With shards of equal size, in a number
    divisible by that of the processes, every image comes once.

    Args:
        shards: paths and URLs.
        draw: of the views.
        images: in all shards.
        channels: of the images.
        batch_size: per process.
        rank: of this process.
        world_size: number of processes.
        workers: processes that read.
    """

    def __init__(
        self,
        shards: list[str],
        draw: DrawViews,
        *,
        images: int,
        channels: int,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
    ) -> None:
        self.epoch, self.batch = 0, 0
        self.batch_size, self.length = batch_size, images // (batch_size * world_size)
        self.stream = ShardStream(shards, draw, channels=channels, rank=rank, world_size=world_size)
        # Not what the workers look at: one that starts late would find shards finished meanwhile, and split the rest.
        self.finished = torch.zeros(len(shards), dtype=torch.bool)
        self._loader = DataLoader(
            self.stream,
            batch_size,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_sigterm,
        )
        atexit.register(kill_readers)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
            self.finished.zero_()
        self.stream.epoch.fill_(self.epoch)
        for batch, ended in self._batches():
            self.finished[ended] = True
            self.batch += 1
            yield batch
            if self.batch >= len(self):
                return

    def _batches(self) -> Iterator[tuple[Batch, list[int]]]:
        """Whole batches without end; what single workers have over is put together."""
        size, over, ended_over = self.batch_size, None, []
        while True:
            from_start, empty = not self.finished.any(), True
            self.stream.passed_over.copy_(self.finished)
            for batch, ended in self._loader:
                empty = False
                if over is not None:
                    batch = _each(torch.cat, over, batch)
                rows = len(batch.unreadable)
                if rows < size:
                    over, ended_over = batch, ended_over + ended
                    continue
                yield _each(lambda x: x[0][:size], batch), ended_over + (ended if rows == size else [])
                over, ended_over = (_each(lambda x: x[0][size:], batch), ended) if rows > size else (None, [])
            if from_start and empty:
                raise ValueError("data.folder: expected photos in the tar shards, found none that can be read")
            log.warning(
                "process %d has read all its shards after %d of %d batches and starts them again: data.images is too "
                "large, shards differ in size, or the epoch was continued",
                self.stream.rank, self.batch, len(self),
            )  # fmt: skip
            self.finished.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The epoch, its next batch, and the shards that all processes together have finished."""
        finished = [self.finished.tolist()]
        if torch.distributed.is_initialized():  # Lightning asks all processes, and keeps the answer of the first
            own, finished = finished[0], [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(finished, own)
        together = [any(each) for each in zip(*finished, strict=True)]
        return {"epoch": self.epoch, "batch": self.batch, "finished": together}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with the shards that are not finished.

        Raises:
            ValueError: if the checkpoint was made with another number of shards, or with a folder.
        """
        finished = state.get("finished", [])
        if len(finished) != len(self.stream.shards):
            raise ValueError(
                f"data.folder: expected the {len(finished)} shards of the checkpoint, got {len(self.stream.shards)}"
            )
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.finished.copy_(torch.tensor(finished))


def _is_photo(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def _collate(samples: list[tuple[Batch, list[int]]]) -> tuple[Batch, list[int]]:
    batches, ended = zip(*samples, strict=True)
    return collate(list(batches)), [shard for some in ended for shard in some]


def _each(change: Callable[[tuple[Tensor, ...]], Tensor], *parts: Any) -> Any:
    """Changes every tensor of nested NamedTuples."""
    if isinstance(parts[0], Tensor):
        return change(parts)
    return type(parts[0])(*(_each(change, *fields) for fields in zip(*parts, strict=True)))
