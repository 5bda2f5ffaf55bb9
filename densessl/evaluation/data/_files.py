"""Finds and decodes files, and names those that are missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_DEEP = ("I", "F")
_SIXTEEN = ("I;16", "I;16B", "I;16L")  # grey, of 16 bits


def need_folder(path: Path, layout: str) -> Path:
    """The folder itself.

    Raises:
        ValueError: If the folder is missing; the message tells the layout that was expected.
    """
    if not path.is_dir():
        raise ValueError(f"folder: expected {layout}, got no folder {path}")
    return path


def need_files(paths: Sequence[Path], what: str) -> None:
    """Raises ValueError if there is no file at one of the paths, or if there is no path at all."""
    if not paths:
        raise ValueError(f"folder: expected {what}, found none")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"folder: expected {what}, {len(missing)} of {len(paths)} files are missing; the first is {missing[0]}"
        )


def photos_below(folder: Path) -> list[Path]:
    """The images in a folder and in all folders below, sorted; linked folders are followed, hidden ones left out."""
    paths: list[Path] = []
    seen = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        here = []
        for name in sorted(folders):
            place = os.path.realpath(os.path.join(root, name))
            if name[0] != "." and place not in seen:
                here.append(name)
                seen.add(place)
        folders[:] = here  # os.walk descends into what is left in this list
        paths += [Path(root, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    return sorted(paths)


def images_below(path: Path) -> list[Path]:
    """The images directly in a folder, sorted; hidden files are left out."""
    return sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")


def lines_of(path: Path, layout: str) -> list[str]:
    """First word of each line of a list of a split's names.

    Raises:
        ValueError: If there is no such file, or no line in it.
    """
    if not path.is_file():
        raise ValueError(f"folder: expected {layout}, got no file {path}")
    names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise ValueError(f"folder: expected the names of images in {path}, got none")
    return names


def read_image(path: Path, turn: bool = True) -> Tensor:
    """An image as uint8 ``(3, H, W)``; grey values, palettes and transparency become colours, 16 grey bits become 8.

    Args:
        path: Path of the file.
        turn: Whether to turn the image as its EXIF entry says.

    Raises:
        ValueError: If the file cannot be read, is deeper than 16 bits, or is a TIFF of several pages.
    """
    try:
        with Image.open(path) as file:
            if file.mode in _DEEP and (file.mode, file.format) != ("I", "PNG"):
                raise ValueError(f"expected 8 or 16 bits a channel, got mode {file.mode}")
            if file.format == "TIFF" and getattr(file, "n_frames", 1) > 1:
                raise ValueError("expected one image a file, got several pages")
            shown = ImageOps.exif_transpose(file) if turn else file
            if shown.mode in _SIXTEEN or (shown.mode == "I" and file.format == "PNG"):  # older versions of Pillow
                shown = Image.fromarray(np.rint(np.array(shown) / 257).astype(np.uint8))
            return torch.from_numpy(np.array(shown.convert("RGB"))).movedim(2, 0).contiguous()
    except Exception as error:  # Pillow raises whatever its decoders do
        raise ValueError(f"folder: {path} cannot be read: {error}") from error


def read_ids(path: Path) -> Tensor:
    """The numbers in a label image, int64 ``(H, W)``; also of a file ``*.mat`` of SBD.

    Raises:
        ValueError: If the file cannot be read, or holds colours in place of numbers.
    """
    try:
        if path.suffix == ".mat":
            return torch.from_numpy(_from_matlab(path).astype(np.int64))
        with Image.open(path) as file:
            if file.mode not in ("L", "P", "1"):
                raise ValueError(f"expected class numbers in one channel of 8 bits, got mode {file.mode}")
            return torch.from_numpy(np.array(file).astype(np.int64))
    except ImportError:
        raise
    except Exception as error:  # Pillow and SciPy raise whatever their decoders do
        raise ValueError(f"folder: {path} cannot be read: {error}") from error


def _from_matlab(path: Path) -> np.ndarray:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("files of SBD need SciPy: pip install 'densessl[evaluation]'") from error
    return loadmat(path)["GTcls"][0]["Segmentation"][0]
