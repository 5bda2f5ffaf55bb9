"""Compares the size that an annotation says with that of its photo, and finds out which way up it means."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torchvision import tv_tensors

from examples.pretrain.common.data.decode import read_photo, shown
from examples.pretrain.common.data.depths import as_bytes

ORIENTATION = 274  # the number of the EXIF entry


def is_turned(path: Path, said: tuple[int, int] | None) -> bool:
    """Whether annotations of a photo were made on it as its EXIF entry turns it, as viewers show it.

    Reads the head of the file alone. Where both ways have one size, the photo is taken as it is shown.

    Args:
        path: Path of the photo.
        said: Height and width in the annotations; None where they do not say.

    Raises:
        ValueError: If the size is neither that of the photo as it is stored nor that of the photo as it is shown.
    """
    height, width, orientation = _head(path)
    shown_as = (width, height) if orientation >= 5 else (height, width)
    if said is None or said == shown_as:
        return True
    if said == (height, width):
        return False
    turned = "" if orientation < 5 else f" ({shown_as[1]}x{shown_as[0]} as EXIF turns it)"
    raise ValueError(f"expected its size, {width}x{height} pixels{turned} in {shown(path)}, got {said[1]}x{said[0]}")


def shown_size(path: Path) -> tuple[int, int]:
    """Height and width of a photo as EXIF turns it."""
    height, width, orientation = _head(path)
    return (width, height) if orientation >= 5 else (height, width)


def _head(path: Path) -> tuple[int, int, int]:
    """Height and width as they are stored, and the EXIF orientation."""
    try:
        with Image.open(path) as file:
            height, width, orientation = file.height, file.width, file.getexif().get(ORIENTATION, 1)
            turned = file.format == "TIFF" and orientation >= 5  # Pillow tells a TIFF's size as it is shown
            return (width, height, orientation) if turned else (height, width, orientation)
    except Exception as error:  # Pillow raises whatever its decoders do
        raise ValueError(f"{shown(path)} cannot be read: {error}") from error


def load(path: Path, turn: bool) -> tv_tensors.Image:
    """A photo in 8 bits, ``(3, H, W)``.

    Raises:
        ValueError: If the file cannot be read.
    """
    try:
        return tv_tensors.Image(as_bytes(read_photo(path, 3, turn=turn)))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"data.folder: {error}") from error
