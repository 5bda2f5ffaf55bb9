"""The loader of photos that can be continued: order and position are a function of the seed and of what is saved."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from examples.pretrain.common.data.seeds import seed_of
from examples.pretrain.common.data.views import collate


def outlive_signals(worker: int) -> None:
    """A preemption and Ctrl-C signal the whole group: were the readers to die, no checkpoint could be written."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def kill_readers() -> None:
    """At exit: multiprocessing would send its children a SIGTERM, which they ignore, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error because a reader is gone
    for process in multiprocessing.active_children():
        process.kill()


class ResumableLoader:
    """A DataLoader whose position is part of a checkpoint; Lightning saves and restores it.

    Each epoch is a permutation drawn from (seed, epoch); each process takes its share of every batch, so that the
    batches of one process are those of several put together.

    Args:
        dataset: The data set, addressed by (epoch, index).
        batch_size: Number of samples in a batch of one process.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        seed: Seed of the permutations.
        workers: Number of processes that read for this one; with 0 it reads itself.
        batches: Batches after which an epoch ends early, and the next permutation begins; None: all whole ones.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        workers: int,
        batches: int | None = None,
    ) -> None:
        self.epoch, self.batch, self.batches = 0, 0, batches
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._loader = DataLoader(
            dataset,
            batch_sampler=_Keys(self),
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_signals,
        )
        atexit.register(kill_readers)

    def __len__(self) -> int:
        return len(self.dataset) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Any]:
        if self.batch >= (self.batches or len(self)):
            self.epoch, self.batch = self.epoch + 1, 0
        for batch in self._loader:
            self.batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the next batch starts."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues there."""
        self.epoch, self.batch = state["epoch"], state["batch"]


class _Keys:
    """The (epoch, index) keys of this process's batches, from the loader's position to the end of the epoch."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        at = self.loader
        epoch = at.epoch
        order = torch.randperm(len(at.dataset), generator=torch.Generator().manual_seed(seed_of(at.seed, epoch)))
        whole = at.batch_size * at.world_size
        for batch in range(at.batch, at.batches or len(at)):
            start = batch * whole + at.rank * at.batch_size
            yield [(epoch, int(index)) for index in order[start : start + at.batch_size]]
