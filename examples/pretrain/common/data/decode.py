"""Decodes image files: the one reader of pretraining, quickstart, probes and transfer.

The form of an image says what its file holds: 8 bits give uint8 in 0..255, everything deeper gives float32 in 0..1.
``as_bytes`` and ``alike`` bring images of both forms together. What a file holds is found in its bytes, not in its
name. A file that cannot be read rightly raises a RuntimeError (or the OSError of the file system) that names it, so a
run can count it and take another.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import rgb_to_grayscale

from examples.pretrain.common.data.tiff import MODES, check_claim, decode_tiff

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big end first, and their forms beyond 4 GB


def shown(path: str | Path) -> str:
    """A path as it can be printed: bytes that are not UTF-8 are written as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_photo(path: str | Path, channels: int, *, side: int | None = None, turn: bool = True) -> Tensor:
    """Decodes one image.

    Args:
        path: Path of the file.
        channels: Number of channels wanted. With 1 and 3, grey, colour, palettes, CMYK and alpha are converted.
        side: A JPEG may be decoded at a half, a quarter or an eighth of its size, as long as its shorter side has this
            many pixels, which takes a fraction of the time. None decodes the whole image.
        turn: Turns the image as its EXIF entry says. False gives the pixels as they are stored.

    Returns:
        uint8 ``(channels, H, W)``, or float32 in 0..1 where the file is deeper than 8 bits.

    Raises:
        RuntimeError: If the file cannot be read rightly; the message names it.
        OSError: If the file system cannot read it.
        ValueError: If the file has another number of channels than the 2 or 4 and more that are wanted.
        ImportError: On a TIFF without the package that reads it.
    """
    return decode_photo(file_bytes(path), os.fspath(path), channels, side=side, turn=turn)


def file_bytes(path: str | Path) -> Tensor:
    """A file's bytes, uint8. Not by torchvision's read_file, which takes no names that are not UTF-8."""
    return torch.from_numpy(np.fromfile(path, np.uint8))


def decode_photo(data: Tensor, name: str, channels: int, *, side: int | None = None, turn: bool = True) -> Tensor:
    """As read_photo, from a file's bytes (uint8) and its name."""
    name = shown(name)
    start = data[:4].numpy().tobytes()
    if start in TIFF:
        _check_tifffile(name)
        decode = decode_tiff
    else:
        # By torchvision (0.29) a damaged PNG ends the process with a segmentation fault; it returns all frames of an
        # animated GIF, refuses an animated WebP, turns no WebP and reads no BMP.
        whole = start[:2] == b"\xff\xd8" and (side is None or channels not in MODES)
        decode = _decode_jpeg if whole else _decode_by_pillow
    try:
        image = decode(data, channels, side, turn)
    except Exception as error:  # the codecs raise whatever they do
        raise RuntimeError(f"{name} cannot be read: {error}") from error
    return _with_channels(image, channels, name)


def reason(error: Exception, name: str | Path) -> str:
    """Why a file cannot be read, for a message that has already named the file."""
    return str(error).removeprefix(f"{shown(name)} cannot be read: ")


def _check_tifffile(name: str) -> None:
    try:
        import tifffile  # noqa: F401
    except ImportError as error:  # that is no fault of the file: the run has to stop
        raise ImportError(
            f"{name}: torchvision.io does not read TIFF; install the extra that does: pip install 'densessl[tiff]'"
        ) from error


def _decode_jpeg(data: Tensor, channels: int, side: int | None, turn: bool) -> Tensor:
    return decode_image(data, mode=MODES.get(channels, ImageReadMode.UNCHANGED), apply_exif_orientation=turn)


def _decode_by_pillow(data: Tensor, channels: int, side: int | None, turn: bool) -> Tensor:
    """A PNG, a BMP, the first frame of a GIF or WebP, or a JPEG at a fraction of its size."""
    with _opened(data, side) as file:
        if file.format == "PNG" and data[24] == 16:
            image = _decode_deep_png(data, file, turn)
            return image[:3] if channels in MODES else image  # without alpha
        upright = ImageOps.exif_transpose(file) if turn else file
        keep = upright.mode in ("L", "LA", "RGB", "RGBA") and channels not in MODES
        pixels = np.array(upright if keep else upright.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1).contiguous()


def _opened(data: Tensor, side: int | None = None) -> Image.Image:
    if not len(data):
        raise RuntimeError("the file is empty")
    try:
        file = Image.open(io.BytesIO(data.numpy()), formats=("PNG", "GIF", "WEBP", "BMP", "JPEG"))
    except UnidentifiedImageError as error:  # its own words name an address in memory
        raise RuntimeError("it is no image, or its beginning is damaged") from error
    if file.format != "WEBP":  # its blank pages have no limit, and its sides have one
        check_claim(file.width * file.height, len(data))
    if side is not None:
        file.draft(None, (side, side))
    return file


def _decode_deep_png(data: Tensor, file: Image.Image, turn: bool) -> Tensor:
    """16 bits a channel, of which Pillow keeps both bytes in grey only: in colour each is asked for by itself."""
    if data[25] == 4:  # the colour type
        raise RuntimeError("expected 16 bits in grey, colour, or colour and alpha, got grey and alpha")
    if file.mode == "I;16":
        pixels = np.array(ImageOps.exif_transpose(file) if turn else file)
        return torch.from_numpy(pixels.astype(np.float32) / np.float32(65535))[None]
    halves = []
    for order in "BL":  # the byte taken for the high one: the first, then the second
        with _opened(data) as half:
            half.tile = [part._replace(args=f"{half.mode};16{order}") for part in half.tile]
            halves.append(np.array(ImageOps.exif_transpose(half) if turn else half).astype(np.float32))
    pixels = (halves[0] * 256 + halves[1]) / np.float32(65535)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _with_channels(image: Tensor, channels: int, name: str) -> Tensor:
    found = image.shape[0]
    if found == channels:
        return image
    if found == 1 and channels == 3:
        return image.expand(3, -1, -1)
    if found == 3 and channels == 1:
        return rgb_to_grayscale(image)
    if channels not in MODES:
        raise ValueError(f"data.channels: expected {channels} channels, got {found} in {name}")
    raise RuntimeError(f"{name} cannot be read: its {found} channels are neither grey nor colour")
