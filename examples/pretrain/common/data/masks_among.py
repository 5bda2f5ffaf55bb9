"""Notices label masks among the files of a folder of photos, where a data set's whole folder was named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

LOOKED_AT = 40  # files: a second, also of large ones
FEW_COLOURS = 32
LOSSLESS = (".png", ".tif", ".tiff", ".gif", ".bmp")  # JPEG would blur the numbers of the classes


def masks_among(paths: Sequence[Path]) -> str | None:
    """A warning, in words, if some of the files look like masks of class numbers; None if none does.

    Up to 40 files are looked at, evenly spaced. A file looks like a mask if it is lossless and has at most 32 colours.

    Args:
        paths: The files of the photos.
    """
    count = min(len(paths), LOOKED_AT)
    looked_at = [paths[(2 * i + 1) * len(paths) // (2 * count)] for i in range(count)]
    found = [path for path in looked_at if _is_like_a_mask(path)]
    if not found:
        return None
    return (
        f"{len(found)} of {count} files that were looked at have at most {FEW_COLOURS} colours and may be label masks, "
        f"for instance {found[0]}. If so, name the folder of the photos alone."
    )


def _is_like_a_mask(path: Path) -> bool:
    if path.suffix.lower() not in LOSSLESS:
        return False
    try:
        with Image.open(path) as file:
            return file.getcolors(FEW_COLOURS) is not None
    except Exception:  # Pillow raises whatever its decoders do; the training tells of files that cannot be read
        return False
