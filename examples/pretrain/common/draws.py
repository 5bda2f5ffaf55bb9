"""Draws that one process and several make alike."""

from __future__ import annotations

from collections.abc import Callable

from lightly.utils.dist import rank, world_size
from torch import Tensor


def of_this_process(draw: Callable[[int], Tensor], batch: int) -> Tensor:
    """What a draw for the images of all processes, a row each, gives to the ``batch`` images of this one."""
    return draw(world_size() * batch)[rank() * batch :][:batch]
