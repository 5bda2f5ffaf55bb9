"""Tensors of any shapes, in memory up to a size and in a temporary file beyond."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import IO

import torch
from torch import Tensor

HELD = 1 << 28  # bytes in memory unless told otherwise


class Held:
    """A list of tensors that grows without taking more memory than allowed.

    Reading a tensor of the file copies it from there, back onto its device. The file has no name, so that it vanishes
    with the process or with the list.

    Args:
        most: Greatest number of bytes that stay in memory.
    """

    def __init__(self, most: int = HELD) -> None:
        self.left = most
        self._file: IO[bytes] | None = None
        self._end = 0
        self._items: list[Tensor | tuple[int, torch.Size, torch.dtype, torch.device]] = []

    def __len__(self) -> int:
        return len(self._items)

    def append(self, tensor: Tensor) -> None:
        """Takes a tensor as the last one."""
        if tensor.nbytes <= self.left:
            self.left -= tensor.nbytes
            self._items.append(tensor)
            return
        self.left = 0  # the order in memory and in the file is that of the list
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="densessl-held-")  # noqa: SIM115  it lives as long as the list
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(self._end)
        self._file.write(values.data)
        self._file.flush()
        self._items.append((self._end, tensor.shape, tensor.dtype, tensor.device))
        self._end += len(values)

    def __getitem__(self, index: int) -> Tensor:
        item = self._items[index]
        if isinstance(item, Tensor):
            return item
        start, shape, dtype, device = item
        if self._file is None:
            raise RuntimeError("a tensor of the file without the file")
        values = bytearray(shape.numel() * dtype.itemsize)
        read = 0
        while read < len(values):  # the system may read less than it was asked for
            read += os.preadv(self._file.fileno(), [memoryview(values)[read:]], start + read)
        return torch.frombuffer(values, dtype=dtype).view(shape).to(device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))
