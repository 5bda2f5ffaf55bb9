"""Batches of views for the recipes: Lightning's data module.

Every draw is a function of (seed, epoch, sample index, view), and so is the order: a run can be continued in the middle
of an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from loading import ResumableLoader
from reading import Batch, DrawViews, MaskOf, NoData, Photos, find_photos, seed_of
from segments import Felzenszwalb, Grid
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl import (
    MultiView,
    byol_photometric,
    byol_views,
    mocov2_photometric,
    mocov2_views,
    multichannel_photometric,
    multichannel_views,
    simclr_photometric,
    simclr_views,
)
from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD

# The two halves of each pipeline: per image on the CPU, per batch on the device.
PRESETS = {
    "byol": (byol_views, byol_photometric),
    "mocov2": (mocov2_views, mocov2_photometric),
    "simclr": (simclr_views, simclr_photometric),
    "multichannel": (multichannel_views, multichannel_photometric),  # ours; any number of channels
}


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
        channels: of the images; the published photometric steps take 3 (colour), those of ``multichannel`` any number.
        mean: per channel, in 0..1.
        std: per channel.
        redraws: how often to draw views again that share no cell.
        max_unreadable: share of unreadable files above which the run stops.
        seed: of everything drawn.
        images: number of images in all shards; a folder is counted.
        preset: whose colours and blur: ``"byol"`` as PixPro, ``"mocov2"`` as DenseCL, ``"simclr"``; ``"multichannel"``:
            ours, for images other than colour.
        segments: what each image is divided into, for methods that compare regions: ``"grid"``, ``"felzenszwalb"``, or
            ``"none"``. The views then come with a mask of segment ids.
        grid: rectangles along each side of the grid.
        segment_scale: of Felzenszwalb's segments, and the least number of pixels of one, in the image as it is read.
        nodata: value of pixels without data, in all channels: 0 to 255, and 0 to 1 from 16 bits. The views then come
            with a mask, 0 there, and cells of which less than half is data neither match nor count.
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
        preset: Literal["byol", "mocov2", "simclr", "multichannel"] = "byol",
        segments: Literal["none", "grid", "felzenszwalb"] = "none",
        grid: int = 5,
        segment_scale: int = 1000,
        nodata: float | None = None,
    ) -> None:
        super().__init__()
        self.images, self._found = images, None
        self.unreadable, self.enlarged, self.seen = 0, 0, 0  # of the images that came so far
        self.folder, self.size, self.batch_size, self.workers, self.seed = folder, size, batch_size, workers, seed
        self.channels, self.redraws, self.max_unreadable, self.photometric = (
            channels,
            redraws,
            max_unreadable,
            photometric,
        )
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"data.mean, data.std: expected {channels} numbers, as data.channels, got {mean}, {std}")
        if photometric != "none" and channels != 3 and preset != "multichannel":
            raise ValueError(
                f"data.channels: expected 3 for the colour jitter of data.preset={preset}, got {channels}; set "
                "data.preset to multichannel, or data.photometric to none"
            )
        whole, on_device = PRESETS[preset]
        published = whole(size, photometric == "cpu", scale=scale, mean=mean, std=std)
        self.views = _with_turns(published, vertical_flip, quarter_turns)
        self.mask_of = _mask_of(segments, grid, segment_scale)
        self.segments, self.nodata = segments, nodata
        if nodata is not None:
            self.mask_of = NoData(nodata, self.mask_of)
        self.on_device = on_device(mean, std) if photometric == "device" else None
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
        draws = {"seed": self.seed, "redraws": self.redraws, "size": self.size, "mask_of": self.mask_of}
        shards = self.shards()
        if shards:
            from shards import ShardLoader

            draw = DrawViews(self.views, **draws)
            return ShardLoader(shards, draw, images=self.images, channels=self.channels, **process)
        photos = Photos(self.paths(), self.views, channels=self.channels, **draws)
        return ResumableLoader(photos, seed=self.seed, **process)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Counts, while the batch is on the CPU: reading a value back from a GPU would stall it."""
        self.unreadable += int(batch.unreadable.sum())
        self.enlarged += int(batch.enlarged.sum())
        self.seen += len(batch.unreadable)
        return batch

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


def _with_turns(published: MultiView, vertical_flip: bool, quarter_turns: bool) -> MultiView:
    extra: list[nn.Module] = [v2.RandomVerticalFlip()] if vertical_flip else []
    extra += [QuarterTurn()] if quarter_turns else []
    # After crop and flip, before the photometric steps: a quarter of the pixels to turn, still uint8.
    return MultiView(*(v2.Compose([*p.transforms[:2], *extra, *p.transforms[2:]]) for p in published.transforms))


def _mask_of(segments: str, grid: int, segment_scale: int) -> MaskOf | None:
    if segments == "none":
        return None
    return Grid(grid) if segments == "grid" else Felzenszwalb(segment_scale)


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
