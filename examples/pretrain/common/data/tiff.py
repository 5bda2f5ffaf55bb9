"""TIFF files to images: what has no stated range or no stated colour is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode

from examples.pretrain.common.data.depths import as_bytes

PIXELS_A_BYTE = 10_000  # more than any codec here reaches on a blank page, so a file that claims more is damaged
MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def check_claim(pixels: int, size: int) -> None:
    """Refuses a damaged size before memory is asked for it."""
    if pixels > PIXELS_A_BYTE * size:
        raise RuntimeError(f"it claims {pixels} pixels, which do not fit into its {size} bytes")


def decode_tiff(data: Tensor, channels: int, side: int | None, turn: bool) -> Tensor:
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
            check_claim(page.size, len(data))
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
    check_claim(stack.size, len(data))
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
