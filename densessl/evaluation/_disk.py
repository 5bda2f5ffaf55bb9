"""Rows of numbers in a file, of which no more is in memory than was asked for."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_TYPES = {torch.float32: np.float32, torch.int16: np.int16}


class Rows:
    """Tensors of one shape, one after another in a file.

    Reading copies: pages of a file that stays mapped would count as this process's memory until the system wants them
    back. Several processes may write different rows.

    Args:
        path: Path of the file, which is made where there is none.
        shape: Shape of one row.
        dtype: Type of the values, float32 or int16.
        length: Number of rows of a file that is there; a file is as long as what was written to it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, length: int = 0) -> None:
        self.path, self.row, self.dtype, self.length = path, tuple(shape), dtype, length
        self._type = np.dtype(_TYPES[dtype])
        self._size = math.prod(self.row)

    def __len__(self) -> int:
        return self.length

    def write(self, start: int, rows: Tensor) -> None:
        """Writes rows from the one numbered ``start`` on."""
        values = np.ascontiguousarray(rows.detach().to("cpu", self.dtype).numpy())
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            data, at = values.reshape(-1).view(np.uint8).data, start * self._size * self._type.itemsize
            while data:  # the system may write less than it was given
                written = os.pwrite(file, data, at)
                data, at = data[written:], at + written
        finally:
            os.close(file)
        self.length = max(self.length, start + len(rows))

    def append(self, rows: Tensor) -> None:
        """Writes rows behind the last."""
        if len(rows):
            self.write(self.length, rows)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop - 1``, or to the last."""
        count = max(0, min(stop, self.length) - start)
        offset = start * self._size * self._type.itemsize
        values = np.fromfile(self.path, self._type, count * self._size, offset=offset)
        return torch.from_numpy(values).view(count, *self.row)

    def take(self, index: Tensor) -> Tensor:
        """Rows by their numbers, int64 of any shape, which stands before the shape of a row."""
        mapped = np.memmap(self.path, self._type, "r", shape=(self.length, *self.row))
        return torch.from_numpy(np.asarray(mapped[index.cpu().numpy()]))


class Growing:
    """Rows of which nobody knows beforehand how many they will be: in memory up to a size, then in a file.

    Args:
        path: Path of the file, which is made when it is needed.
        most: Greatest number of bytes in memory; rows on another device than the CPU stay there.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._left = path, most
        self._parts: list[Tensor] = []
        self._file: Rows | None = None

    def append(self, rows: Tensor) -> None:
        """Takes rows, float32 (N, C), behind the last."""
        self._left -= rows.nbytes
        if self._file is None and self._left < 0 and rows.device.type == "cpu":
            self._file = Rows(self._path, tuple(rows.shape[1:]), torch.float32)
            for part in self._parts:
                self._file.append(part)
            self._parts = []
        if self._file is None:
            self._parts.append(rows)
        else:
            self._file.append(rows)

    def finished(self) -> Tensor | Rows:
        """All rows; after this nothing can be added."""
        return together(self._parts) if self._file is None else self._file


def together(parts: list[Tensor]) -> Tensor:
    """All rows in one tensor; the list is emptied, each part when it was copied, so that they are never held twice."""
    rows = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    start = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        rows[start : start + len(part)] = part
        start += len(part)
    return rows
