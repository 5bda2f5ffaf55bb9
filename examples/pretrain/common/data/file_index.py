"""Lists of very many files, kept from one start to the next in the user's folder for caches.

Listing a million files takes minutes on a shared disk. The kept list is used as long as no folder in it has changed: a
file that comes, goes or is renamed changes its folder's time.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import zipfile
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

LEAST = 50_000  # files below which a folder is listed anew each time
SETTLED = 2.0  # seconds after a change, within which another could leave the same time
VERSION = 1


def index_of(folder: Path) -> Path:
    """Where the list of a folder is kept: ``~/.cache/densessl``, or below ``XDG_CACHE_HOME``."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:24]
    return Path(cache, "densessl", f"files-{key}.npz")


def read_index(folder: Path) -> np.ndarray | None:
    """The names, uint8 with a 0 after each; None where none are kept, or a folder has changed since."""
    known = contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with known, np.load(index_of(folder)) as kept:
        folders, root = kept["folders"].tobytes().split(b"\0"), os.fsencode(folder)
        if int(kept["version"]) == VERSION and [_changed(root, path) for path in folders] == kept["changed"].tolist():
            return kept["names"]
    return None


def _changed(root: bytes, path: bytes) -> int:
    return os.stat(os.path.join(root, path)).st_mtime_ns


def write_index(folder: Path, names: np.ndarray, folders: dict[str, int]) -> None:
    """Keeps the names of a folder, if they are many and nothing in it has just been changed.

    Args:
        folder: The folder.
        names: As ``read_index`` gives them.
        folders: All folders in it by their paths, with the times of their last change in ns.
    """
    if np.count_nonzero(names == 0) < LEAST or max(folders.values()) / 1e9 > time.time() - SETTLED:
        return
    path = index_of(folder)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    text = np.frombuffer(b"\0".join(os.fsencode(name) for name in folders), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, version=VERSION, names=names, folders=text, changed=np.array(list(folders.values())))
        part.replace(path)
    except OSError as error:
        log.info("the list of files is not kept for the next start: %s", error)
