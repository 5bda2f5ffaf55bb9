"""Images to score a backbone on, small and in memory: photos without labels, and images with masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from examples.pretrain.common.data.decode import read_photo, reason, shown
from examples.pretrain.common.data.depths import as_bytes
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.sources import evenly

log = logging.getLogger(__name__)

IGNORED = 255
NO_CLASS = ("unlabelled", "unlabeled", "void", "ignore", "ignored")


class Labels(NamedTuple):
    """Labelled images in two parts, to fit a probe on and to test it on.

    Attributes:
        fit: Images, uint8 ``(C, H, W)``, with labels, int64 ``(H, W)``.
        test: Other images with labels, in the same form.
        classes: Labels run 0..classes-1; 255 is ignored.
        ignored: How many of these numbers stand for no class, as those of a line ``void`` in classes.txt.
        named: Whether a classes.txt names the classes.
    """

    fit: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    classes: int
    ignored: int = 0
    named: bool = True

    @property
    def counted(self) -> int:
        """Number of classes that count."""
        return self.classes - self.ignored

    @property
    def beside(self) -> str:
        """Words to follow the number of classes: which numbers are ignored, or that none but 255 is."""
        if not self.named:
            return " (no classes.txt names them, so every number except 255 counts as a class)"
        numbers = "number" if self.ignored == 1 else "numbers"
        return f" and {self.ignored} ignored {numbers}" if self.ignored else ""


def square(image: Tensor, size: int, mode: InterpolationMode = InterpolationMode.BILINEAR) -> Tensor:
    """The image's central square ``(..., size, size)``, its shorter side being the square's."""
    height, width = image.shape[-2:]
    scale = size / min(height, width)
    smaller = F.resize(image, [max(size, round(height * scale)), max(size, round(width * scale))], mode)
    return F.center_crop(smaller, [size, size]).contiguous()


def read_squares(paths: Sequence[Path], channels: int, size: int) -> list[Tensor]:
    """Photos as uint8 ``(channels, size, size)``; one that cannot be read is named in the log and left out."""
    photos = []
    for path in paths:
        try:
            photos.append(square(as_bytes(read_photo(path, channels, side=size)), size))
        except (RuntimeError, OSError) as error:
            log.warning("%s: unreadable, left out of the probe: %s", shown(path), reason(error, path))
    return photos


def read_labels(folder: str, channels: int, size: int, most: int = 64, name: str = "probe.labels") -> Labels:
    """Labelled images of a folder: ``images/`` and ``masks/`` (or ``labels/``), masks with the images' stems as PNG.

    With sub-folders ``train`` and ``val`` (or ``test``) in both, the first are fitted on and the second tested on;
    without, every second image is tested on. A mask holds the number of a class, from 0, in one channel of 8 bits; 255
    is ignored. ``classes.txt`` has a class a line, of which unlabelled, void and ignore are ignored. Without the file
    the largest number says how many classes there are. A photo is turned as its EXIF entry says, unless its mask has
    the size of the pixels as they are stored.

    Args:
        folder: Path of the folder.
        channels: Number of channels of the images.
        size: Side of the squares that images and masks are cut to.
        most: At most so many images in each part, evenly spaced.
        name: Name of the argument, for errors.

    Raises:
        ValueError: If a folder or a mask is missing; if a mask is in colours, of another size, or holds a number beyond
            the classes of classes.txt; or if there are fewer than 2 images or classes.
    """
    root, parts = Path(folder), labelled_pairs(folder, name)
    names = optional_class_names(root, name)
    if len(names) == 1:
        raise ValueError(f"{name}: expected at least 2 classes, a line each, in {shown(root / 'classes.txt')}, got 1")
    least = len(names) or IGNORED  # of the numbers that no class has
    read = [[_labelled(*part[i], channels, size, least, name) for i in evenly(len(part), most)] for part in parts]
    masks_read = [mask for part in read for _, mask in part]
    found = {number for mask in masks_read for number in mask.unique().tolist()} - {IGNORED}
    if len(found) < 2:  # masks of 0 and 255, for instance
        what = f"the number {found.pop()} alone" if found else "none"
        raise ValueError(f"{name}: expected masks of at least 2 classes, got {what} in {shown(root)}; 255 is ignored")
    nothing = [i for i, word in enumerate(names) if word.lower() in NO_CLASS]
    for mask in masks_read:
        for label in nothing:
            mask[mask == label] = IGNORED
    labels = Labels(*read, max(2, len(names) or max(found) + 1), len(nothing), bool(names))
    log.info("%s: %d classes%s", name, labels.counted, labels.beside)
    return labels


def labelled_pairs(folder: str, name: str) -> list[list[tuple[Path, Path]]]:
    """Images with their masks, those to fit on and those to test on, by their places alone: nothing is read.

    Args:
        folder: Path of the folder, as of ``read_labels``.
        name: Name of the argument, for errors.

    Raises:
        ValueError: If a folder or a mask is missing, or there are fewer than 2 images.
    """
    root = Path(folder)
    masks = next((root / part for part in ("masks", "labels") if (root / part).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        raise ValueError(f"{name}: expected the folders images and masks (or labels) in {shown(root)}")
    test = next((part for part in ("val", "test") if (root / "images" / part).is_dir()), None)
    if test is not None and (root / "images" / "train").is_dir():
        parts = [_pairs(root / "images" / part, masks / part, name) for part in ("train", test)]
    else:
        pairs = _pairs(root / "images", masks, name)
        parts = [pairs[0::2], pairs[1::2]]
    if not all(parts):
        raise ValueError(f"{name}: expected at least 2 images, one to fit and one to test on, in {shown(root)}")
    return parts


def _pairs(images: Path, masks: Path, name: str) -> list[tuple[Path, Path]]:
    pairs = [(path, masks / path.relative_to(images).with_suffix(".png")) for path in find_photos(images, name)]
    for path, mask in pairs:
        if not mask.is_file():
            raise ValueError(f"{name}: expected the mask of {shown(path)} in {shown(mask)}, which is missing")
    return pairs


def _labelled(image: Path, mask: Path, channels: int, size: int, least: int, name: str) -> tuple[Tensor, Tensor]:
    try:
        with Image.open(mask) as file:
            mode, numbers = file.mode, np.array(file)
        pixels = photo_under(image, numbers.shape[:2], channels)
    except Exception as error:  # Pillow raises whatever its decoders do
        raise ValueError(f"{name}: {shown(image)} or its mask cannot be read: {error}") from error
    if mode not in ("L", "P"):
        raise ValueError(f"{name}: expected masks of class numbers in one channel of 8 bits, got {shown(mask)}: {mode}")
    if numbers.shape != tuple(pixels.shape[1:]):
        raise ValueError(f"{name}: expected a mask of the image's size, got {numbers.shape} in {shown(mask)}")
    wrong = numbers[(numbers >= least) & (numbers != IGNORED)]
    if wrong.size:
        raise ValueError(
            f"{name}: expected numbers 0..{least - 1} of the lines of classes.txt, or 255, "
            f"got {wrong.min()} in {shown(mask)}"
        )
    labels = square(torch.from_numpy(numbers)[None], size, InterpolationMode.NEAREST_EXACT)[0]
    return square(pixels, size), labels.long()


def photo_under(path: Path, size: tuple[int, ...], channels: int) -> Tensor:
    """A photo in 8 bits, turned as its EXIF entry says; if only the stored pixels have this size, as they are stored.

    Args:
        path: Path of the photo.
        size: Height and width of its mask.
        channels: Number of channels of the photo.
    """
    pixels = read_photo(path, channels)
    if pixels.shape[1:] != size:  # the mask was drawn on the pixels as they are stored, perhaps
        pixels = read_photo(path, channels, turn=False)
    return as_bytes(pixels)


def optional_class_names(root: Path, name: str) -> list[str]:
    """The last word of each line of classes.txt; none where there is no such file."""
    path = root / "classes.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {shown(path)} cannot be read as UTF-8: {error}") from error
    return [line.split()[-1] for line in lines if line.strip()]
