"""Batches of views for the recipes: Lightning's data module.

Every draw is a function of (seed, epoch, sample index, view), and so is the order: a run can be continued in the middle
of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from densessl import View
from examples.pretrain.common.data.frames import FrameSource
from examples.pretrain.common.data.seeds import seed_of
from examples.pretrain.common.data.sources import FolderSource, ShardSource
from examples.pretrain.common.data.views import Batch, DrawViews

DeviceViews = Callable[..., View]  # as BatchAugment: a batch of views and a seed to a batch of views


class PhotoViews(pl.LightningDataModule):
    """Views of every photo of a source, a batch at a time.

    Args:
        source: Where the images come from.
        draw: Draws the views of an image, in the workers.
        on_device: What is done to each of the views on the device, such as colours and blur, in their order; None:
            nothing, the views come normalised from the workers.
        batch_size: Images of a step over all processes, before gradient accumulation.
        workers: Number of reading processes per GPU.
        channels: Number of channels of the images.
        max_unreadable: Share of unreadable files above which the run stops.
    """

    def __init__(
        self,
        source: FolderSource | ShardSource | FrameSource,
        draw: DrawViews,
        on_device: Sequence[DeviceViews] | None = None,
        *,
        batch_size: int = 1024,
        workers: int = 8,
        channels: int = 3,
        max_unreadable: float = 0.01,
    ) -> None:
        super().__init__()
        self.source, self.draw, self.on_device = source, draw, on_device
        self.batch_size, self.workers, self.channels, self.max_unreadable = (
            batch_size,
            workers,
            channels,
            max_unreadable,
        )
        self.unreadable, self.enlarged, self.seen = 0, 0, 0  # of the images that came so far
        self._loader: Any = None
        self._position: dict[str, Any] | None = None  # of the loader, in the checkpoint that is continued

    @property
    def seed(self) -> int:
        """The seed of everything that is drawn."""
        return self.draw.seed

    def batches_per_epoch(self) -> int:
        """Whole batches only; the rest of an epoch's images is left out.

        Raises:
            ValueError: If the batch size does not fit the images or the processes.
        """
        processes = self.trainer.world_size
        images = self.source.count(processes, self.workers)
        if self.batch_size < 1 or self.batch_size % processes or self.batch_size > images:
            raise ValueError(
                f"data.batch_size: expected 1 to {images}, the images of {self.source.folder}"
                + (f" and a multiple of the {processes} processes" if processes > 1 else "")
                + f", got {self.batch_size}"
            )
        return images // self.batch_size

    def batches_taken(self) -> int:
        """Batches of an epoch that the trainer takes; ``trainer.limit_train_batches`` may leave some out."""
        batches, limit = self.batches_per_epoch(), self.trainer.limit_train_batches
        return int(batches * limit) if isinstance(limit, float) else min(batches, limit)

    def setup(self, stage: str) -> None:
        """A run starts at the beginning, whatever came before it; a checkpoint's position is loaded after this."""
        self._loader = self._position = None

    def train_dataloader(self) -> Any:
        """The loader of this process: a ResumableLoader, or a ShardLoader. A second one of a run goes on."""
        batches = self.batches_taken()
        if self._loader is not None:
            self._position = self._loader.state_dict()
        self._loader = self.source.loader(
            self.draw,
            self.channels,
            batch_size=self.batch_size // self.trainer.world_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            workers=self.workers,
            batches=batches,
        )
        if self._position is not None:
            self._loader.load_state_dict(self._position)
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """The position in the data. Lightning restores a loader's own state in the middle of an epoch only."""
        return {} if self._loader is None else {"position": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues there."""
        self._position = state.get("position")

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
        for index, view in enumerate(batch.views):
            if self.on_device is not None:
                view = self.on_device[index](view, seed=seed_of(self.seed, step, self.trainer.global_rank, index))
            views.append(view._replace(image=view.image.contiguous(memory_format=torch.channels_last)))
        return batch.with_views(views)
