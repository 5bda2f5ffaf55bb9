"""A long list of files in one array: a million paths as objects take a gigabyte, and every worker would copy them.

A worker shares the memory of the process that started it until it writes to it, and even to read a Python object writes
its count of references. An array is one object.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

Bytes = np.ndarray  # uint8


class Names(Sequence[Path]):
    """Paths of files below a folder, in a fixed order.

    Args:
        root: The folder; paths that are absolute stay so.
        text: The paths below the root as the file system has them, uint8, each with a 0 at its end.
    """

    def __init__(self, root: str | Path, text: Bytes) -> None:
        self.root, self.text = str(root), text
        self.ends = np.flatnonzero(text == 0)

    @classmethod
    def of(cls, root: str | Path, names: Iterable[str]) -> Names:
        """The list of these names."""
        text = bytearray()
        for name in names:
            text += os.fsencode(name) + b"\0"
        return cls(root, np.frombuffer(text, np.uint8))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self.ends[place - 1]) + 1 if place else 0
        return Path(self.root, os.fsdecode(self.text[start : int(self.ends[place])].tobytes()))

    def __iter__(self) -> Iterator[Path]:
        return (self[i] for i in range(len(self)))

    def without(self, places: Sequence[int]) -> Names:
        """The list without the names at these places."""
        kept = np.ones(len(self), bool)
        kept[list(places)] = False
        lengths = np.diff(self.ends, prepend=-1)
        return Names(self.root, self.text[np.repeat(kept, lengths)])
