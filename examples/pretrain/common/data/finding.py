"""Finds image files: below a folder, or named in a text file."""

from __future__ import annotations

import logging
import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from examples.pretrain.common.data.decode import SUFFIXES, shown
from examples.pretrain.common.data.file_index import read_index, write_index
from examples.pretrain.common.data.names import Names

log = logging.getLogger(__name__)

NOT_READ = {".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}  # photos
LISTED = 64  # names of a text file that are looked for before a run begins


def find_photos(folder: str | Path, name: str = "data.folder") -> Names:
    """All photos below a folder, sorted: an ImageFolder layout, a flat or a nested folder alike.

    Linked folders are followed, and a folder that can be reached in several ways is read once. Files and folders
    whose names begin with a dot are left out: ``.ipynb_checkpoints`` holds copies, and macOS leaves ``._photo.jpg``
    beside ``photo.jpg`` on foreign disks.

    Of a folder of very many files the list is kept, see ``file_index``.

    Args:
        folder: Path of the folder; or of a text file, ``*.txt``, with a path a line, from the text file's own folder or
            absolute. Its order is kept, and empty lines are passed over.
        name: Name of the argument, for errors.

    Raises:
        ValueError: If the folder is missing or holds no photo, or the text file names none, or one that is not there.
    """
    folder = Path(folder)
    if folder.suffix == ".txt" and folder.is_file():
        return _listed(folder, name)
    if not folder.is_dir():
        what = "a file, and no *.txt with a path a line" if folder.exists() else "missing"
        if what == "missing" and any(sign in str(folder) for sign in "*?"):
            what = "missing, or a pattern: give the folder itself, or a *.txt with a path a line"
        raise ValueError(f"{name}: expected a folder, got {shown(folder)}, which is {what}")
    known = read_index(folder)
    if known is not None:
        return Names(folder, known)
    files, folders = _Count(), {}
    found = Names.of(folder, _below(folder, "", files, {os.path.realpath(folder)}, folders))
    if files.others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(files.others.items()))
        log.warning("%s: photos in formats that cannot be read are left out (%s); convert them to JPEG", name, kinds)
    if not len(found):
        raise ValueError(
            f"{name}: expected images ({', '.join(sorted(SUFFIXES))}) below {shown(folder)}, "
            f"found none among its {files.number} files"
        )
    write_index(folder, found.text, folders)
    return found


class _Count:
    """Of the files met: their number, and the number of photos in formats that are not read, by suffix."""

    def __init__(self) -> None:
        self.number = 0
        self.others: Counter[str] = Counter()


def _below(root: Path, path: str, files: _Count, seen: set[str], folders: dict[str, int]) -> Iterator[str]:
    """Names of photos below a folder, in order, from the root.

    Args:
        root: Where the names begin.
        path: The folder, from the root; "" is the root itself.
        files: Counts all files.
        seen: Real paths of the folders met, to which those below are added.
        folders: Gets every folder with the time of its last change, from before it was read.
    """
    here = os.path.join(root, path)
    try:
        folders[path] = os.stat(here).st_mtime_ns
        with os.scandir(here) as entries:
            found = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        log.warning("a folder is left out, because it cannot be read: %s", shown(str(error)))
        return
    files.number += sum(not is_folder for _, is_folder in found)
    # A folder's children are looked at before what is below them: which of two ways to a folder is taken depends on it.
    new = {n for n, is_folder in found if is_folder and n[0] != "." and _is_new(os.path.join(here, n), seen)}
    for name, is_folder in found:
        if name in new:
            yield from _below(root, os.path.join(path, name), files, seen, folders)
        elif not is_folder and name[0] != ".":
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                yield os.path.join(path, name)
            elif suffix in NOT_READ:
                files.others[suffix] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link around a circle
        return False


def _is_new(folder: str, seen: set[str]) -> bool:
    """Whether a folder has not been seen yet; it has been from now on."""
    before = len(seen)
    seen.add(os.path.realpath(folder))
    return len(seen) > before


def _listed(file: Path, name: str) -> Names:
    lines = [line for line in os.fsdecode(file.read_bytes().removeprefix(BOM_UTF8)).splitlines() if line.strip()]
    found = Names.of(file.parent, lines)
    if not len(found):
        raise ValueError(f"{name}: expected a path a line in {shown(file)}, got none")
    for place in range(0, len(found), max(1, len(found) // LISTED)):
        if not found[place].is_file():
            raise ValueError(f"{name}: {shown(file)} names {shown(found[place])}, where there is no file")
    return found
