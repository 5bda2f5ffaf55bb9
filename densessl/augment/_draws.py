"""Draws that depend on a seed alone and leave the generators as they were.

Steps of the user's own may draw from NumPy's global generator, so NumPy's old interface must be seeded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch


@contextmanager
def drawn_from(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Inside, everything is drawn from ``seed``; afterwards the generators are as they were before.

    Args:
        seed: Seed of the draws; None leaves every generator alone, inside the block as well.
        device: Device that the draws are made on; None is the CPU.
    """
    with generators_kept(seed is not None, device):
        seed_generators(seed, device)
        yield


@contextmanager
def generators_kept(keep: bool = True, device: torch.device | None = None) -> Iterator[None]:
    """Afterwards the generators are as they were before.

    Args:
        keep: Whether the generators are restored; False leaves them alone.
        device: Device that the draws are made on; None is the CPU.
    """
    if not keep:
        yield
        return
    states = generator_states()
    # Only where there is a GPU to draw on: fork_rng takes as long as a small crop.
    with torch.random.fork_rng([device]) if _is_cuda(device) else nullcontext():
        try:
            yield
        finally:
            set_generators(states)


def seed_generators(seed: int | None, device: torch.device | None = None) -> None:
    """Seeds the generators of ``random``, of NumPy and of torch on the CPU, and that of ``device`` if it is a GPU.

    ``torch.manual_seed`` is not used, because it seeds the generators of all CUDA devices too.

    Args:
        seed: Seed to set; None leaves everything alone.
        device: Device that the draws are made on; None is the CPU.
    """
    if seed is None:
        return
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if _is_cuda(device):
        torch.cuda.default_generators[_index_of(device)].manual_seed(seed)


def _is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _index_of(device: torch.device | None) -> int:
    return torch.cuda.current_device() if device is None or device.index is None else device.index


def generator_states() -> tuple[Any, Any, torch.Tensor]:
    """The states of the generators of ``random``, NumPy and torch on the CPU."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def set_generators(states: tuple[Any, Any, torch.Tensor]) -> None:
    """Gives the generators the states that ``generator_states`` returned."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
