"""Photos on disk to batches of views: the data side that all pretraining recipes share.

Every draw is a function of (seed, epoch, sample index, view): the number of workers and processes changes nothing, and
a run can be continued in the middle of an epoch.
"""

from __future__ import annotations

import atexit
import io
import logging
import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl import DistanceMatcher, MultiView, View, byol_photometric, byol_views
from densessl.presets import IMAGENET_MEAN, IMAGENET_STD

log = logging.getLogger(__name__)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff"}


class Batch(NamedTuple):
    """Two batches of views, and what happened while they were read.

    Attributes:
        view1: of B images.
        view2: of the same images.
        unreadable: int64 ``(B,)``, files that could not be read before one could.
        enlarged: bool ``(B,)``, images smaller than the views.
    """

    view1: View
    view2: View
    unreadable: Tensor
    enlarged: Tensor


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
        redraws: how often to draw again where the two views share no cell; for elongated images, where that is common.
        size: side of the views, to know which images are smaller.
    """

    def __init__(self, views: MultiView, *, seed: int, redraws: int, size: int) -> None:
        self.views = [MultiView(transform) for transform in views.transforms]
        self.seed, self.redraws, self.size = seed, redraws, size
        self._overlap = DistanceMatcher(0.7)
        self._named: set[str] = set()

    def __call__(self, image: Tensor, name: str, *numbers: int, unreadable: int = 0) -> Batch:
        height, width = image.shape[-2:]
        enlarged = min(height, width) < self.size
        if enlarged:
            self.name_once(name, f"is smaller than the views ({width}x{height}): enlarged")
        for attempt in range(self.redraws + 1):
            views = [self._draw(image, view, *numbers, view, attempt) for view in range(2)]
            if attempt == self.redraws or self.share_cells(*views):
                break
        return Batch(*views, torch.tensor(unreadable), torch.tensor(enlarged))

    def _draw(self, image: Tensor, view: int, *numbers: int) -> View:
        # Not fork_rng: it asks after GPUs, which takes as long as a crop.
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(seed_of(self.seed, *numbers))
        try:
            return self.views[view](image)[0]
        finally:
            generator.set_state(before)

    def share_cells(self, view1: View, view2: View) -> bool:
        """Whether any cell of one view matches one of the other."""
        return bool(self._overlap(view1.coords[None], view2.coords[None], (7, 7)).any())

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
    """

    def __init__(
        self, paths: Sequence[Path], views: MultiView, *, seed: int, channels: int, redraws: int, size: int
    ) -> None:
        self.paths, self.channels = paths, channels
        self.draw = DrawViews(views, seed=seed, redraws=redraws, size=size)

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


def outlive_sigterm(worker: int) -> None:
    """A preemption signals the whole process group: were the readers to die of it, no checkpoint could be written."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_readers() -> None:
    """At exit: multiprocessing would send its children a SIGTERM, which they ignore, and wait for them."""
    for process in multiprocessing.active_children():
        process.kill()


class ResumableLoader:
    """A DataLoader whose position is part of a checkpoint; Lightning saves and restores it.

    Each epoch is a permutation drawn from (seed, epoch); each process takes its share of every batch, so that the
    batches of one process are those of several put together.

    Args:
        dataset: addressed by (epoch, index).
        batch_size: per process.
        rank: of this process.
        world_size: number of processes.
        seed: of the permutations.
        workers: processes that read.
    """

    def __init__(
        self, dataset: Photos, *, batch_size: int, rank: int, world_size: int, seed: int, workers: int
    ) -> None:
        self.epoch, self.batch = 0, 0
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._loader = DataLoader(
            dataset,
            batch_sampler=_Keys(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_sigterm,
        )
        atexit.register(kill_readers)

    def __len__(self) -> int:
        return len(self.dataset) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[Any]:
        if self.batch >= len(self):
            self.epoch, self.batch = self.epoch + 1, 0
        for batch in self._loader:
            self.batch += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the next batch starts."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues there."""
        self.epoch, self.batch = state["epoch"], state["batch"]


class _Keys:
    """The (epoch, index) keys of this process's batches, from the loader's position to the end of the epoch."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        at = self.loader
        epoch = at.epoch
        order = torch.randperm(len(at.dataset), generator=torch.Generator().manual_seed(seed_of(at.seed, epoch)))
        whole = at.batch_size * at.world_size
        for batch in range(at.batch, len(at)):
            start = batch * whole + at.rank * at.batch_size
            yield [(epoch, int(index)) for index in order[start : start + at.batch_size]]


class QuarterTurn(v2.Transform):
    """Turns by 0, 90, 180 or 270 degrees: for images without an up, as aerial and microscopic ones."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"angle": 90.0 * int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.rotate, inpt, params["angle"], expand=True)


class PhotoViews(pl.LightningDataModule):
    """Two views of every photo of a folder, or of tar shards, a batch at a time.

    Args:
        folder: of photos, sub-folders included; or tar shards, see shards.py: ``shards/{000..099}.tar``, a URL, or
            ``pipe:`` and a command that writes one.
        size: side of the views in pixels.
        batch_size: images a step over all processes, before gradient accumulation.
        workers: reading processes per GPU.
        scale: share of the image's area that a crop covers.
        photometric: ``"device"``: colours and blur on the GPU, through kornia; ``"cpu"``: in the workers; ``"none"``.
        vertical_flip: also flip upside down.
        quarter_turns: also turn by multiples of 90 degrees.
        channels: of the images; the photometric steps are made for 3 (colour) and reduced to noise-free views else.
        mean: per channel, in 0..1.
        std: per channel.
        redraws: how often to draw views again that share no cell.
        max_unreadable: share of unreadable files above which the run stops.
        seed: of everything drawn.
        images: number of images in all shards; a folder is counted.
    """

    def __init__(
        self,
        folder: str,
        size: int = 224,
        batch_size: int = 1024,
        workers: int = 8,
        scale: tuple[float, float] = (0.08, 1.0),
        photometric: Literal["device", "cpu", "none"] = "device",
        vertical_flip: bool = False,
        quarter_turns: bool = False,
        channels: int = 3,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        redraws: int = 0,
        max_unreadable: float = 0.01,
        seed: int = 0,
        images: int | None = None,
    ) -> None:
        super().__init__()
        self.images, self._found = images, None
        self.folder, self.size, self.batch_size, self.workers, self.seed = folder, size, batch_size, workers, seed
        self.channels, self.redraws, self.max_unreadable, self.photometric = (
            channels,
            redraws,
            max_unreadable,
            photometric,
        )
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"data.mean, data.std: expected {channels} numbers, as data.channels, got {mean}, {std}")
        if photometric != "none" and channels != 3:
            raise ValueError(
                f"data.photometric: expected 'none' for {channels} channels: the published steps need colour"
            )
        self.views = _views(size, scale, photometric == "cpu", vertical_flip, quarter_turns, mean, std)
        self.on_device = byol_photometric(mean, std) if photometric == "device" else None
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def paths(self) -> list[Path]:
        """The photos, checked against batch size and number of processes."""
        processes = self.trainer.world_size
        if self._found is None:
            self._found = find_photos(self.folder)  # once: a large set takes minutes to list
        paths = self._found
        if len(paths) < processes:
            raise ValueError(
                f"data.folder: expected an image for each of {processes} processes, found {len(paths)} in {self.folder}"
            )
        self._check_batch_size(len(paths))
        return paths

    def shards(self) -> list[str]:
        """The tar shards, none for a folder; checked as the photos are."""
        from shards import find_shards, is_shards

        if not is_shards(self.folder):
            return []
        shards = find_shards(self.folder, self.images, self.trainer.world_size, self.workers)
        self._check_batch_size(self.images)
        return shards

    def _check_batch_size(self, images: int) -> None:
        processes = self.trainer.world_size
        if self.batch_size < 1 or self.batch_size % processes or self.batch_size > images:
            raise ValueError(
                f"data.batch_size: expected a multiple of the {processes} processes, at most the {images} images "
                f"of {self.folder}, got {self.batch_size}"
            )

    def batches_per_epoch(self) -> int:
        """Whole batches only; the rest of an epoch's images is left out."""
        return (self.images if self.shards() else len(self.paths())) // self.batch_size

    def train_dataloader(self) -> Any:
        """The loader of this process: a ResumableLoader, or a ShardLoader."""
        process = {
            "batch_size": self.batch_size // self.trainer.world_size,
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
            "workers": self.workers,
        }
        draws = {"seed": self.seed, "redraws": self.redraws, "size": self.size}
        shards = self.shards()
        if shards:
            from shards import ShardLoader

            draw = DrawViews(self.views, **draws)
            return ShardLoader(shards, draw, images=self.images, channels=self.channels, **process)
        photos = Photos(self.paths(), self.views, channels=self.channels, **draws)
        return ResumableLoader(photos, seed=self.seed, **process)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Colours on the device, drawn from (seed, batch, process, view); then the faster memory layout."""
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1  # of the batch that is about to start
        views = []
        for index, view in enumerate((batch.view1, batch.view2)):
            if self.on_device is not None:
                view = self.on_device[index](view, seed=seed_of(self.seed, step, self.trainer.global_rank, index))
            elif self.photometric == "none":
                x = view.image.float() / 255 if view.image.dtype == torch.uint8 else view.image
                view = view._replace(image=(x - self.mean.to(x.device)) / self.std.to(x.device))
            views.append(view._replace(image=view.image.contiguous(memory_format=torch.channels_last)))
        return batch._replace(view1=views[0], view2=views[1])


def _views(
    size: int,
    scale: tuple[float, float],
    photometric: bool,
    vertical_flip: bool,
    quarter_turns: bool,
    mean: Sequence[float],
    std: Sequence[float],
) -> MultiView:
    published = byol_views(size, photometric, scale=scale, mean=mean, std=std)
    extra: list[nn.Module] = [v2.RandomVerticalFlip()] if vertical_flip else []
    extra += [QuarterTurn()] if quarter_turns else []
    # After crop and flip, before the photometric steps: a quarter of the pixels to turn, still uint8.
    return MultiView(*(v2.Compose([*p.transforms[:2], *extra, *p.transforms[2:]]) for p in published.transforms))


def steps_of(trainer: pl.Trainer) -> int:
    """Optimiser steps of the whole run.

    Not ``trainer.estimated_stepping_batches``: that opens the loader before its position is restored.
    """
    batches = trainer.datamodule.batches_per_epoch()
    limit = trainer.limit_train_batches
    batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    steps = math.ceil(batches / trainer.accumulate_grad_batches) * (trainer.max_epochs or -1)
    if trainer.max_steps > 0:
        steps = min(steps, trainer.max_steps) if steps > 0 else trainer.max_steps
    if steps < 1:
        raise ValueError("trainer: expected a budget, max_epochs or max_steps, and at least one batch, got none")
    return steps
