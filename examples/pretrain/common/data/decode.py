"""Finds image files and decodes them: the one reader of all programs here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff"}


def find_photos(folder: str | Path) -> list[Path]:
    """All photos below a folder, sorted: an ImageFolder layout, a flat or a nested folder alike.

    Raises:
        ValueError: if the folder is missing or holds no photo.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data.folder: expected a folder, got {folder}, which is not one")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
    if not paths:
        raise ValueError(f"data.folder: expected images ({', '.join(sorted(SUFFIXES))}) below {folder}, found none")
    return paths


def read_photo(path: Path, channels: int) -> Tensor:
    """Decodes one image: uint8 ``(channels, H, W)``, or float32 in 0..1 from 16 bits.

    Raises:
        ValueError: on another number of channels.
        ImportError: on a TIFF without the package that reads it.
    """
    return decode_photo(read_file(str(path)), str(path), channels)


def decode_photo(data: Tensor, name: str, channels: int) -> Tensor:
    """As read_photo, from a file's bytes (uint8) and its name."""
    if name.lower().endswith((".tif", ".tiff")):
        image = _decode_tiff(data, name)
    else:
        mode = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}.get(channels, ImageReadMode.UNCHANGED)
        image = decode_image(data, mode=mode, apply_exif_orientation=True)
    if image.dtype == torch.uint16:
        image = image.float() / 65535
    if image.shape[0] == 1 and channels == 3:
        image = image.expand(3, -1, -1)
    if image.shape[0] != channels:
        raise ValueError(f"data.channels: expected {channels} channels, got {image.shape[0]} in {name}")
    return image


def _decode_tiff(data: Tensor, name: str) -> Tensor:
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(
            f"{name}: torchvision.io does not read TIFF; install the extra that does: pip install 'densessl[tiff]'"
        ) from error
    try:
        pixels = np.atleast_3d(tifffile.imread(io.BytesIO(data.numpy())))
    except Exception as error:  # tifffile has many
        raise RuntimeError(f"{name}: not a readable TIFF: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
