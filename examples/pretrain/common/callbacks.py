"""Callbacks of the recipes: guards, throughput, checkpoints, the encoder's file."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from safetensors.torch import save

from examples.pretrain.common.checkpoint_files import written_beside
from examples.pretrain.common.collapsed import RANK, STD, bounds_crossed, collapsed
from examples.pretrain.common.data.views import Batch
from examples.pretrain.common.last_checkpoint import LastCheckpoint
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.probe import DenseProbe
from examples.pretrain.common.sharding import whole
from examples.pretrain.common.training import is_logged


class StopOnCollapse(Callback):
    """Stops a run whose loss is no number, whose features have collapsed, or whose files cannot be read.

    Args:
        patience: Number of optimiser steps without a healthy reading after which the run stops. Healthy runs dip as
            well, the quickstart's for 80 steps.
    """

    def __init__(self, patience: int = 1000) -> None:
        self.patience = patience
        self.healthy_at = 0

    def state_dict(self) -> dict[str, int]:
        """The last healthy reading: a run that goes on has had the earlier ones."""
        return {"healthy_at": self.healthy_at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there."""
        self.healthy_at = state["healthy_at"]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step % trainer.log_every_n_steps:
            return  # reading a value back stalls the GPU
        loss = float(outputs["loss"])
        if not abs(loss) < float("inf"):
            raise RuntimeError(
                f"loss is {loss} at step {trainer.global_step}: stopped. Lower the learning rate, optimizer.lr_*."
            )
        std, rank = trainer.callback_metrics.get(STD), float(trainer.callback_metrics.get(RANK, math.nan))
        if std is None or not collapsed(float(std), rank):
            self.healthy_at = trainer.global_step
        if trainer.global_step - self.healthy_at >= self.patience:
            of_std, of_rank = bounds_crossed(float(std), rank)
            also = "" if of_rank is None else f" and {RANK} {rank:.1f}, below {of_rank:g},"
            raise RuntimeError(
                f"{STD} is {float(std):.3f}, below {of_std},{also} for the last "
                f"{trainer.global_step - self.healthy_at} steps: the features have collapsed. See the docs, Questions."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if not is_logged(trainer):
            return  # the counts of all processes are added up, and they would wait for each other
        data = trainer.datamodule
        module.log_dict({"data/unreadable": float(data.unreadable), "data/enlarged": data.enlarged / data.seen})
        self._judge_files(trainer, module, least=1000)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._judge_files(trainer, module, least=1)

    def _judge_files(self, trainer: pl.Trainer, module: Any, least: int) -> None:
        """Of few images a share says nothing: two bad files among the first hundred would be too many."""
        data = trainer.datamodule
        counts = torch.tensor([data.unreadable, data.seen], dtype=torch.float32, device=module.device)
        unreadable, seen = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if seen >= least and unreadable > max(1, data.max_unreadable * seen):
            raise RuntimeError(
                f"{unreadable:.0f} unreadable files met in {seen:.0f} images: more than data.max_unreadable = "
                f"{data.max_unreadable}. Their names are in the log."
            )


class Throughput(Callback):
    """Logs images/s and the share of time spent waiting for data; the time of the probe counts in neither."""

    def __init__(self) -> None:
        self.end = self.waited = self.since = 0.0
        self.images = 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.end = self.since = without_probe(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        self.waited += without_probe(trainer) - self.end
        self.images += len(batch.unreadable) * trainer.world_size

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.end = without_probe(trainer)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            elapsed = self.end - self.since
            module.log("speed/images_per_s", self.images / elapsed, prog_bar=True)
            module.log("speed/data_wait", self.waited / elapsed)
            self.since, self.images, self.waited = self.end, 0, 0.0


def without_probe(trainer: pl.Trainer) -> float:
    """A clock in seconds that stands still while the probe is read."""
    probes = (callback for callback in trainer.callbacks if isinstance(callback, DenseProbe))
    return time.perf_counter() - sum(probe.seconds for probe in probes)


class Encoders(Callback):
    """Writes the online encoder's backbone as ``encoder.safetensors`` beside the checkpoints, after every epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: Any) -> None:
        folder = trainer.log_dir  # asked of every process: the answer is broadcast
        # Gathering sharded tensors takes all processes as well.
        state = {key: whole(value) for key, value in backbone_of(module.method).state_dict().items()}
        if trainer.is_global_zero and folder is not None:
            weights = {key: value.cpu().contiguous() for key, value in state.items()}
            with written_beside(Path(folder) / "encoder.safetensors") as part:
                part.write_bytes(save(weights))  # save_file makes files that others cannot read


def without_farewell(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's says more than that a run that has done all its steps has stopped."""
    return not record.getMessage().startswith("`Trainer.fit` stopped")


def standard_callbacks(out: str, every_n_epochs: int, every_n_steps: int) -> list[Callback]:
    """Guards, throughput, encoder export, checkpoints (every n epochs, and ``last.ckpt``)."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(without_farewell)
    folder = Path(out) / "checkpoints"
    return [
        StopOnCollapse(),
        Throughput(),
        Encoders(),
        LearningRateMonitor("step"),
        # Without the counter: a run that is killed and goes on writes an epoch's file again, under the same name.
        ModelCheckpoint(
            folder,
            "epoch={epoch}",
            every_n_epochs=every_n_epochs,
            save_top_k=-1,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        ),
        LastCheckpoint(folder, every_n_steps),
    ]
