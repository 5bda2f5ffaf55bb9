"""What several processes tell one another; one process alone needs no torch.distributed."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import distributed

_T = TypeVar("_T")


def place() -> tuple[int, int]:
    """Number of this process and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
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
