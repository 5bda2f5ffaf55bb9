"""What several processes tell one another; one process alone needs no torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import distributed

__all__ = ["alone", "from_all", "from_first", "place", "total"]

_T = TypeVar("_T")
_ALONE = ContextVar("_ALONE", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Probes that are called within it work in this process alone, though ``torch.distributed`` has others.

    For a training in several processes of which the first scores the backbone now and then: without it the probe would
    share the work, and wait for processes that never call it.
    """
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


def place() -> tuple[int, int]:
    """Number of this process and how many there are that share the work."""
    if distributed.is_available() and distributed.is_initialized() and not _ALONE.get():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def from_first(value: _T) -> _T:
    """The first process's value, in all processes."""
    if place()[1] == 1:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def from_all(value: _T) -> list[_T]:
    """The values of all processes in their order; also a point that no process passes before the others reach it."""
    world = place()[1]
    if world == 1:
        return [value]
    held: list[Any] = [None] * world
    distributed.all_gather_object(held, value)
    return held


def total(counts: torch.Tensor) -> torch.Tensor:
    """Sum of the processes' counts, on the CPU."""
    return torch.stack(from_all(counts.cpu())).sum(0)
