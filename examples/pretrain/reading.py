"""Images on disk to two views each: finding, decoding, drawing.

Every draw is a function of (seed, epoch, sample index, view): the number of workers and processes changes nothing.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image, read_file

from densessl import DistanceMatcher, MaskedView, MultiView, View, cell_validity

log = logging.getLogger(__name__)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff"}

# A decoded image (C, H, W) to a map (H, W), uint8 or int64, that moves with the views: what lies where, 0 for nothing.
MaskOf = Callable[[Tensor], Tensor]


class Batch(NamedTuple):
    """Two batches of views, and what happened while they were read.

    Attributes:
        view1: of B images; with a mask where the loader makes one.
        view2: of the same images.
        unreadable: int64 ``(B,)``, files that could not be read before one could.
        enlarged: bool ``(B,)``, images smaller than the views.
    """

    view1: View | MaskedView
    view2: View | MaskedView
    unreadable: Tensor
    enlarged: Tensor


def valid_cells(view: View | MaskedView, size: tuple[int, int]) -> Tensor | None:
    """Which cells of a batch of views show something, bool ``(B, N)``; None, for all, where the views have no mask."""
    return cell_validity(view.mask, size) if isinstance(view, MaskedView) else None


class NoData:
    """A mask of where an image has data: what segments it has there, 1 without segments, and 0 elsewhere.

    Args:
        value: of all channels of a pixel without data, as decoded: 0 to 255, and 0 to 1 from 16 bits.
        segments: other mask to restrict.

    Raises:
        ValueError: if the value is no finite number.
    """

    def __init__(self, value: float, segments: MaskOf | None = None) -> None:
        if not abs(value) < float("inf"):
            raise ValueError(f"data.nodata: expected a finite number, got {value}")
        self.value, self.segments = value, segments

    def __call__(self, image: Tensor) -> Tensor:
        """``(H, W)``."""
        most, whole = (255, True) if image.dtype == torch.uint8 else (1, False)
        if self.value > most or (whole and (self.value < 0 or self.value % 1)):
            kind = "a whole number in 0..255, as these pixels" if whole else "at most 1: 16 bits are divided by 65,535"
            raise ValueError(f"data.nodata: expected {kind}, got {self.value}")
        has_data = (image != self.value).any(0)
        return has_data.byte() if self.segments is None else self.segments(image) * has_data


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


class DrawViews:
    """Two views of an image, drawn from the seed and the numbers that stand for the image in its epoch.

    Args:
        views: two pipelines.
        seed: of all draws.
        redraws: how often to draw again where the two views share no cell, or none with data; for elongated images,
            where that is common.
        size: side of the views, to know which images are smaller.
        mask_of: gives each image a mask, and so ``MaskedView``; a function of the image alone.
    """

    def __init__(self, views: MultiView, *, seed: int, redraws: int, size: int, mask_of: MaskOf | None = None) -> None:
        self.views = [MultiView(transform) for transform in views.transforms]
        self.seed, self.redraws, self.size, self.mask_of = seed, redraws, size, mask_of
        self._overlap = DistanceMatcher(0.7)
        self._named: set[str] = set()

    def __call__(self, image: Tensor, name: str, *numbers: int, unreadable: int = 0) -> Batch:
        height, width = image.shape[-2:]
        enlarged = min(height, width) < self.size
        if enlarged:
            self.name_once(name, f"is smaller than the views ({width}x{height}): enlarged")
        mask = None if self.mask_of is None else self.mask_of(image)
        for attempt in range(self.redraws + 1):
            views = [self._draw(image, mask, view, *numbers, view, attempt) for view in range(2)]
            if attempt == self.redraws or self.share_cells(*views):
                break
        return Batch(*views, torch.tensor(unreadable), torch.tensor(enlarged))

    def _draw(self, image: Tensor, mask: Tensor | None, view: int, *numbers: int) -> View | MaskedView:
        # Not fork_rng: it asks after GPUs, which takes as long as a crop.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(seed_of(self.seed, *numbers))
        try:
            return self.views[view](image, mask)[0]
        finally:
            generator.set_state(before)

    def share_cells(self, view1: View | MaskedView, view2: View | MaskedView) -> bool:
        """Whether any cell of one view matches one of the other."""
        size = (7, 7)
        one, other = (type(view)(*(part[None] for part in view)) for view in (view1, view2))
        valid = {"valid_q": valid_cells(one, size), "valid_k": valid_cells(other, size)}
        return bool(self._overlap(one.coords, other.coords, size, **valid).any())

    def name_once(self, name: str, what: str) -> None:
        """Logs what befell an image, the first time."""
        if name not in self._named:
            self._named.add(name)
            log.warning("%s: %s", name, what)


class Photos(Dataset):
    """Views of photos, addressed by (epoch, index).

    Args:
        paths: of the photos.
        views: two pipelines.
        seed: of all draws.
        channels: of the images.
        redraws: see DrawViews.
        size: side of the views.
        mask_of: see DrawViews.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        views: MultiView,
        *,
        seed: int,
        channels: int,
        redraws: int,
        size: int,
        mask_of: MaskOf | None = None,
    ) -> None:
        self.paths, self.channels = paths, channels
        self.draw = DrawViews(views, seed=seed, redraws=redraws, size=size, mask_of=mask_of)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        image, unreadable = self._read(index)
        return self.draw(image, str(self.paths[index]), epoch, index, unreadable=unreadable)

    def _read(self, index: int) -> tuple[Tensor, int]:
        """The photo, or the next readable one in its place; and how many were not."""
        for unreadable in range(len(self.paths)):
            path = self.paths[(index + unreadable) % len(self.paths)]
            try:
                return read_photo(path, self.channels), unreadable
            except ImportError:
                raise  # a missing package is no unreadable photo
            except (RuntimeError, OSError) as error:
                self.draw.name_once(str(path), f"unreadable, another takes its place: {error}")
        raise ValueError(f"data.folder: expected photos, got {len(self.paths)} files of which none can be read")


def seed_of(*numbers: int) -> int:
    """One seed that is a function of these numbers alone."""
    # With their count: SeedSequence takes (0, 1) and (0, 1, 0) for the same.
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> np.uint64(1))
