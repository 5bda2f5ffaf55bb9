"""Batches of tar shards, and the position in them.

A run that goes on with the same number of processes and workers gets the very batches that it would have got. With
other numbers it resumes AT SHARD BOUNDARIES: shards that were read to their end are passed over, shards that were begun
are read again from their start. So up to a shard per worker may be seen twice in that epoch, and as many images at its
end not at all. (A folder continues exactly in both cases.)
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from examples.pretrain.common.data.loader import kill_readers, outlive_signals
from examples.pretrain.common.data.shards import Position, ShardStream
from examples.pretrain.common.data.views import Batch, DrawViews, collate

log = logging.getLogger(__name__)


class ShardLoader:
    """Batches of a ShardStream; its position is part of a checkpoint.

    An epoch has ``images // (batch_size * world_size)`` batches for every process. A process whose shards hold fewer
    images starts them again, and says so; what others have over is left out. With shards of equal size, in a number
    divisible by that of the processes, every image comes once.

    Args:
        shards: Paths and URLs of the shards.
        draw: Draws the two views of a photo.
        images: Number of images in all shards together.
        channels: Number of channels of the images.
        batch_size: Number of images in a batch of one process.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        workers: Number of processes that read for this one; with 0 it reads itself.
        batches: Batches after which an epoch ends early; None: all whole ones.
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
        batches: int | None = None,
    ) -> None:
        self.epoch, self.batch, self.batches = 0, 0, batches
        self.batch_size, self.length = batch_size, images // (batch_size * world_size)
        self.stream = ShardStream(shards, draw, channels=channels, rank=rank, world_size=world_size, workers=workers)
        self.position = self._start()
        self._loader = DataLoader(
            self.stream,
            batch_size,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_signals,
        )
        atexit.register(kill_readers)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        batches = self.batches or len(self)
        if self.batch >= batches:
            self.epoch, self.batch, self.position = self.epoch + 1, 0, self._start()
        for batch in self._whole():
            self.batch += 1
            yield batch
            if self.batch >= batches:
                return

    def _start(self) -> Position:
        return Position(torch.zeros(len(self.stream.shards), dtype=torch.bool), self.stream.shares)

    def _whole(self) -> Iterator[Batch]:
        """Whole batches without end; what single workers have over is put together.

        The position names the first worker's batch of which rows are left. From there the workers give the same batches
        in the same order as before, since they take turns.
        """
        over, waiting, at = None, [], self.position
        while True:
            self.stream.start_at(self.epoch, at)
            from_start, empty, given = at.is_start(), True, at.given
            for batch, place in self._loader:
                empty = False
                waiting.append((at, place, len(batch.unreadable)))
                batch, given = _each(lambda x, given=given: x[0][given:], batch), 0
                over = batch if over is None else _each(torch.cat, over, batch)
                left = len(over.unreadable) - self.batch_size
                if left >= 0:
                    self._advance(waiting, left)
                    whole = _each(lambda x: x[0][: self.batch_size], over)
                    over = _each(lambda x: x[0][self.batch_size :], over) if left else None
                    waiting = waiting[-1:] if left else []
                    yield whole
            if from_start and empty:
                raise ValueError("data.folder: expected photos in the tar shards, found none that can be read")
            log.warning(
                "process %d has read all its shards after %d of %d batches and starts them again: data.images is too "
                "large, shards differ in size, or the epoch was continued",
                self.stream.rank, self.batch, len(self),
            )  # fmt: skip
            at = self._start()

    def _advance(self, waiting: list[tuple[Position, tuple[int, int, int], int]], left: int) -> None:
        """Past the batches that are given whole; ``left`` rows of the last of them may remain."""
        for number, (at, (share, ended, read), rows) in enumerate(waiting, 1):
            self.position = at  # of the round through all shards that the batch belongs to
            if number == len(waiting) and left:
                at.first, at.given = share, rows - left
            else:
                at.places[share] = torch.tensor([ended, read])
                at.first, at.given = (share + 1) % self.stream.shares, 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch, its next batch, the positions of all processes and the shards that they have finished."""
        at = self.position
        finished = at.passed_over.clone()
        for number, (ended, _) in enumerate(at.places.tolist()):
            finished[self.stream.share(number, self.epoch, at.passed_over)[:ended]] = True
        own = {"passed_over": at.passed_over.tolist(), "places": at.places.tolist(), "first": at.first}
        own |= {"given": at.given, "finished": finished.tolist()}
        positions = [own]
        if torch.distributed.is_initialized():  # Lightning asks all processes, and keeps the answer of the first
            positions = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(positions, own)
        together = [any(each) for each in zip(*(at.pop("finished") for at in positions), strict=True)]
        return {"epoch": self.epoch, "batch": self.batch, "finished": together, "positions": positions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues there; with other numbers of processes or workers, with the shards that are not finished.

        Raises:
            ValueError: If the checkpoint was made with another number of shards, or with a folder.
        """
        finished = state.get("finished", [])
        if len(finished) != len(self.stream.shards):
            raise ValueError(
                f"data.folder: expected the {len(finished)} shards of the checkpoint, got {len(self.stream.shards)}"
            )
        self.epoch, self.batch, positions = state["epoch"], state["batch"], state.get("positions", [])
        self.position = Position(torch.tensor(finished), self.stream.shares)
        alike = len(positions) == self.stream.world_size
        if alike and len(positions[self.stream.rank]["places"]) == self.stream.shares:
            at = positions[self.stream.rank]
            self.position.passed_over = torch.tensor(at["passed_over"])
            self.position.places = torch.tensor(at["places"])
            self.position.first, self.position.given = at["first"], at["given"]


def _collate(samples: list[tuple[Batch, tuple[int, int, int]]]) -> tuple[Batch, tuple[int, int, int]]:
    """A worker's batch, and the place after its last photo."""
    return collate([batch for batch, _ in samples]), samples[-1][1]


def _each(change: Callable[[tuple[Tensor, ...]], Tensor], *parts: Any) -> Any:
    """Changes every tensor of nested NamedTuples, and of lists of them."""
    if isinstance(parts[0], Tensor):
        return change(parts)
    if type(parts[0]) in (list, tuple):
        return [_each(change, *fields) for fields in zip(*parts, strict=True)]
    return type(parts[0])(*(_each(change, *fields) for fields in zip(*parts, strict=True)))
