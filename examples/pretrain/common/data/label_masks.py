"""Finds label masks among photos: the folder of the masks, or of both, is easily named in place of the photos'."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from examples.pretrain.common.data.decode import shown
from examples.pretrain.common.data.sources import evenly

COLOURS = 32  # at most so many: masks have a colour for each class, photos thousands
FILES = 40  # that are looked at
FIRST = 10  # after which the others are left unread where none of them looks like a mask
# Of the files. A folder with images/ and masks/ in it has half; of our photo sets no file looks like a mask.
SHARE = 0.2
FORMATS = ("PNG", "GIF", "BMP", "TIFF", "WEBP")  # of masks: JPEG mixes the numbers of neighbouring pixels


def mask_warning(paths: Sequence[Path], name: str) -> str | None:
    """A warning if at least a fifth of the files look like label masks; None otherwise.

    Args:
        paths: The files, of which at most 40 are read; of photos at most 10.
        name: The argument that named them, for the message.
    """
    # Spread over the folder, but not evenly: masks may lie beside their photos, as every second file.
    draw, files = random.Random(0), min(FILES, len(paths))
    chosen = [draw.randrange(i * len(paths) // files, (i + 1) * len(paths) // files) for i in range(files)]
    turns = [chosen[i] for i in evenly(files, FIRST)]
    seen = {index: few_colours(paths[index]) for index in turns}
    if not any(seen.values()):
        return None
    seen |= {index: few_colours(paths[index]) for index in chosen if index not in seen}
    found = {index: what for index, what in sorted(seen.items()) if what is not None}
    if len(found) < max(SHARE * len(seen), min(2, len(seen))):
        return None
    first, what = next(iter(found.items()))
    photos = [os.path.abspath(paths[index].parent) for index in seen if index not in found]
    apart = Path(os.path.commonpath(photos)) if photos else None
    if apart is not None and any(Path(os.path.abspath(paths[index])).is_relative_to(apart) for index in found):
        apart = None
    such = "" if apart is None else f", such as {shown(apart)}"
    return (
        f"{name}: {len(found)} of {len(seen)} sampled files have at most {COLOURS} colours and look like label masks, "
        f"not like photos: {shown(paths[first])} has {what}. Give a folder that holds photos alone{such}."
    )


def few_colours(path: Path) -> str | None:
    """How many colours a file has, in words, where they are as few as a mask's; None for photos and damaged files."""
    try:
        with Image.open(path) as file:
            colours = file.getcolors(COLOURS) if file.format in FORMATS else None
            mode = file.mode
    except Exception:  # Pillow raises whatever its decoders do; the run names files that cannot be read
        return None
    if colours is None:
        return None
    values = sorted(value for _, value in colours)
    kind = (
        f"grey values {values[0]} to {values[-1]}" if mode in ("1", "L") else "with a palette" if mode == "P" else mode
    )
    return f"{len(colours)} ({kind})"
