"""Feature maps that were computed before, as the probes read them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from densessl.evaluation._disk import Rows
from densessl.evaluation._processes import from_all, place


class StoredFeatures:
    """Feature maps and labels of a labelled set, in files; it takes the place of the set in the probes.

    Made by ``store_features``. As a context manager it removes its files at the end, unless they are to be kept.

    Attributes:
        folder: Folder that holds the files.
        size: ``(C, h, w)`` of a map.
        held_bytes: Greatest number of bytes that what a probe makes of the maps may take in memory; beyond that it is
            held in a file.
        shared: Whether several processes made the store together and share the work on it.
        seen: Called with the number of images whenever some were read, for a progress bar.
    """

    def __init__(
        self, folder: Path, maps: Rows, labels: Rows, device: torch.device, held_bytes: int, shared: bool, keep: bool
    ) -> None:
        self.folder, self.held_bytes, self.shared = folder, held_bytes, shared
        self.size: tuple[int, ...] = maps.row
        self._maps, self._labels, self._device, self._keep = maps, labels, device, keep
        self._scratch = 0
        self.seen: Callable[[int], object] = lambda images: None

    def __len__(self) -> int:
        return len(self._maps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Refuses: the images are gone.

        Raises:
            ValueError: In every case, for protocols that crop and encode images themselves.
        """
        raise ValueError("labelled: expected (image, labels) pairs, got a store: this protocol encodes its own crops")

    def batches(self, batch_size: int, *, own: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Maps ``(B, C, h, w)`` and labels ``(B, H, W)`` on the device of the features, in order.

        Args:
            batch_size: Number of images in a batch.
            own: Whether each of several processes that share the work gets its own batches only, every so manieth.
        """
        rank, world = place() if own and self.shared else (0, 1)
        for start in range(rank * batch_size, len(self), world * batch_size):
            stop = min(start + batch_size, len(self))
            self.seen(stop - start)
            yield (
                self._maps.block(start, stop).to(self._device),
                self._labels.block(start, stop).to(self._device, torch.int64),
            )

    def scratch(self, row: tuple[int, ...]) -> Rows:
        """Rows of float32 in a file of the store; the same file for the same call in all processes."""
        self._scratch += 1
        path = self.folder / f"scratch{self._scratch}"
        if place()[0] == 0 or not self.shared:
            path.unlink(missing_ok=True)
        return Rows(path, row, torch.float32)

    def close(self) -> None:
        """Removes the files, unless they are to be kept; all processes that made the store call it together."""
        if self.shared:
            from_all(None)  # the others may still be reading
        if place()[0] == 0 or not self.shared:
            for file in self.folder.glob("scratch*"):
                file.unlink()
            if not self._keep:
                shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> StoredFeatures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # the other processes may never come here
            self.shared = False
        self.close()
