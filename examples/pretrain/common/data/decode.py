"""Finds image files and decodes them: the one reader of pretraining, quickstart, probes and transfer.

The form of an image says what its file holds: 8 bits give uint8 in 0..255, everything deeper gives float32 in 0..1.
``as_bytes`` and ``alike`` bring images of both forms together. What a file holds is found in its bytes, not in its
name. A file that cannot be read rightly raises a RuntimeError (or the OSError of the file system) that names it, so a
run can count it and take another.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import rgb_to_grayscale

log = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little and big end first, and their forms beyond 4 GB
PIXELS_A_BYTE = 10_000  # more than any codec here reaches on a blank page, so a file that claims more is damaged
MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def find_photos(folder: str | Path, name: str = "data.folder") -> list[Path]:
    """All photos below a folder, sorted: an ImageFolder layout, a flat or a nested folder alike.

    Linked folders are followed, and a folder that can be reached in several ways is read once. Files and folders
    whose names begin with a dot are left out: ``.ipynb_checkpoints`` holds copies, and macOS leaves ``._photo.jpg``
    beside ``photo.jpg`` on foreign disks.

    Args:
        folder: Path of the folder.
        name: Name of the argument, for errors.

    Raises:
        ValueError: If the folder is missing or holds no photo.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise ValueError(f"{name}: expected a folder, got {shown(folder)}, which is {what}")
    paths: list[Path] = []
    files, seen = 0, {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, onerror=_warn, followlinks=True):
        here = sorted(child for child in folders if child[0] != ".")
        # os.walk descends into what is left in this list.
        folders[:] = [child for child in here if _is_new(os.path.join(root, child), seen)]
        files += len(names)
        paths += [Path(root, name) for name in names if name[0] != "." and Path(name).suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(
            f"{name}: expected images ({', '.join(sorted(SUFFIXES))}) below {shown(folder)}, "
            f"found none among its {files} files"
        )
    return sorted(paths)


def _is_new(folder: str, seen: set[str]) -> bool:
    """Whether a folder has not been seen yet; it has been from now on."""
    before = len(seen)
    seen.add(os.path.realpath(folder))
    return len(seen) > before


def _warn(error: OSError) -> None:
    log.warning("a folder is left out, because it cannot be read: %s", shown(str(error)))


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
    # Not torchvision's read_file, which takes no names that are not UTF-8.
    data = torch.from_numpy(np.fromfile(path, np.uint8))
    return decode_photo(data, os.fspath(path), channels, side=side, turn=turn)


def decode_photo(data: Tensor, name: str, channels: int, *, side: int | None = None, turn: bool = True) -> Tensor:
    """As read_photo, from a file's bytes (uint8) and its name."""
    name = shown(name)
    start = data[:4].numpy().tobytes()
    if start in TIFF:
        _check_tifffile(name)
        decode = _decode_tiff
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
    file = Image.open(io.BytesIO(data.numpy()), formats=("PNG", "GIF", "WEBP", "BMP", "JPEG"))
    if file.format != "WEBP":  # its blank pages have no limit, and its sides have one
        _check_claim(file.width * file.height, len(data))
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


def _check_claim(pixels: int, size: int) -> None:
    """Refuses a damaged size before memory is asked for it."""
    if pixels > PIXELS_A_BYTE * size:
        raise RuntimeError(f"it claims {pixels} pixels, which do not fit into its {size} bytes")


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


def as_bytes(image: Tensor) -> Tensor:
    """An image of read_photo in 8 bits: uint8 stays as it is, 0..1 is multiplied by 255 and rounded."""
    return image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)


def alike(images: Sequence[Tensor]) -> list[Tensor]:
    """Images of one form, to be stacked: where any is float in 0..1, those of 8 bits are divided by 255."""
    if len({image.dtype for image in images}) < 2:
        return list(images)
    return [image.float() / 255 if image.dtype == torch.uint8 else image for image in images]


def _decode_tiff(data: Tensor, channels: int, side: int | None, turn: bool) -> Tensor:
    """The only full page of a TIFF, or a stack of as many grey pages as channels are wanted.

    TIFF holds more than images for people; what has no stated range or no stated colour is refused.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data.numpy())) as file:
        if len(file.pages) > 500:  # a damaged file can name very many
            raise RuntimeError(f"it has {len(file.pages)} pages: expected one image a file")
        pages = [page for page in file.pages if not (page.is_reduced or page.is_mask)]
        if not pages:
            raise RuntimeError("it has no page of full size")
        page, stack = pages[0], file.series[0]
        if len(pages) > 1 or stack.size > page.size:
            pixels = _stacked(stack, max(len(pages), stack.size // page.size), page.photometric.name, channels, data)
        else:
            _check_claim(page.size, len(data))
            pixels = np.atleast_3d(page.asarray())
            if page.axes[0] != "S" or pixels.ndim != 3:
                pixels = np.moveaxis(pixels, -1, 0)
        if pixels.ndim != 3 or not pixels.size:
            raise RuntimeError(f"expected height, width and channels, got {pixels.shape}")
        image = _colours(page, np.ascontiguousarray(pixels), channels)
        entry = page.tags.get("Orientation")
        return _turned(image, int(entry.value) if entry is not None and turn else 1)


def _stacked(stack: Any, pages: int, photometric: str, channels: int, data: Tensor) -> np.ndarray:
    by_last = stack.kind == "shaped" and stack.shape[-1] == channels  # how tifffile writes H x W x C by default
    if channels in MODES or photometric != "MINISBLACK" or len(stack.shape) != 3 or not (by_last or pages == channels):
        raise RuntimeError(f"it has {pages} pages: expected one image a file")
    _check_claim(stack.size, len(data))
    pixels = stack.asarray()
    return np.moveaxis(pixels, -1, 0) if by_last else pixels


def _colours(page: Any, pixels: np.ndarray, channels: int) -> Tensor:
    """Stored numbers to grey or colour in 0..255 or 0..1, as the page's photometric interpretation says."""
    kind = page.photometric.name
    if kind == "PALETTE":
        colours = np.asarray(page.colormap)
        if len(pixels) != 1 or pixels.max() >= colours.shape[1]:
            raise RuntimeError("its palette does not hold all of its pixels")
        if colours.max() > 255:  # some programs write 8 bits here
            colours = (colours.astype(np.float64) / 257).round()
        return torch.from_numpy(colours.astype(np.uint8)[:, pixels[0].astype(np.int64)])
    image = _in_range(pixels, page.bitspersample)
    full = 255 if image.dtype == torch.uint8 else 1
    if kind == "MINISWHITE":
        image, kind = full - image, "MINISBLACK"
    if kind == "YCBCR" and page.compression.name in ("JPEG", "OJPEG"):
        kind = "RGB"  # the codec has converted it
    if kind == "SEPARATED" and len(image) == 4:
        if channels == 4:
            return image
        cmyk = image.float() / full
        rgb = (1 - cmyk[:3]) * (1 - cmyk[3:])
        return as_bytes(rgb) if full == 255 else rgb
    if kind not in ("MINISBLACK", "RGB"):
        raise RuntimeError(f"expected grey, colour, a palette or CMYK, got {kind} of {len(image)} channels")
    colours_of = 3 if kind == "RGB" else 1
    alpha = len(image) == colours_of + 1 and (kind == "RGB" or (page.extrasamples or (0,))[0] > 0)
    return image[:colours_of] if channels in MODES and len(image) != channels and alpha else image


def _in_range(pixels: np.ndarray, bits: int) -> Tensor:
    """Whole numbers to uint8 or, beyond 8 bits, to 0..1; floating point only where it lies in 0..1 already."""
    if pixels.dtype == bool:
        return torch.from_numpy(pixels.astype(np.uint8) * 255)
    if pixels.dtype == np.uint8:
        return torch.from_numpy(pixels if bits == 8 else (pixels * (255 / (2**bits - 1))).round().astype(np.uint8))
    if pixels.dtype == np.uint16:
        return torch.from_numpy(pixels.astype(np.float32) / np.float32(2**bits - 1))
    if pixels.dtype.kind != "f":
        raise RuntimeError(f"expected 1 to 16 bits without a sign, or floating point in 0..1, got {pixels.dtype}")
    image = torch.from_numpy(pixels.astype(np.float32))
    if not (image.isfinite().all() and image.min() >= 0 and image.max() <= 1):
        raise RuntimeError(
            f"expected floating point in 0..1, got {np.nanmin(pixels)} to {np.nanmax(pixels)} "
            f"and {int((~image.isfinite()).sum())} values that are not finite"
        )
    return image


def _turned(image: Tensor, orientation: int) -> Tensor:
    """As the EXIF orientation says, 1 to 8: from 5 on rows and columns change places before the flips."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    axes = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation, ())
    return image.flip(axes).contiguous() if axes else image.contiguous()
