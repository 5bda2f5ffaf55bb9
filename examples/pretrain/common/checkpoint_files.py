"""Files that are either whole or not there: they are written beside their place and renamed at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

PART = ".part"


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Gives a path beside the final one to write to. At the end that file takes the final name in one step.

    A reader sees the earlier file or the new one, never a part; so does one that comes after a power failure. The mode
    is that of any new file: 0666 less the umask.

    Args:
        path: The final path. Its folder is made if it is missing.

    Yields:
        A path in the same folder, and so on the same file system, where a rename replaces a file in one step.

    Raises:
        RuntimeError: If the file cannot be written. The one that was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    try:
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        kept = "; the file that was there before is kept" if path.exists() else ""
        raise RuntimeError(f"{path} cannot be written: {_reason(error)}{kept}") from error


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _reason(error: BaseException) -> str:
    """The operating system's own words, where torch.save has put others around them."""
    known = error
    while known is not None and not isinstance(known, OSError):
        known = known.__cause__ or known.__context__
    return str((known and known.strerror) or error)


def remove_parts(folder: Path) -> None:
    """Removes what a killed run was writing; two runs in one folder are refused elsewhere."""
    for part in folder.glob(f"*{PART}"):
        part.unlink(missing_ok=True)


class WholeFiles(TorchCheckpointIO):
    """Lightning's way to write checkpoints, by ``written_beside``.

    Lightning's own writes into the temporary folder and moves. Where the run folder is on another file system, a move
    copies over the good file, and a run that is killed meanwhile leaves none.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with written_beside(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)
