"""What the recipes share beside data and backbones: the optimiser, callbacks, the command line."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from data import PhotoViews, steps_of
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException
from reading import Batch
from safetensors.torch import save_file
from torch import Tensor, nn

from densessl import EMA, LARS, param_groups
from densessl.metrics import effective_rank, feature_std, pair_similarity, positives_per_cell, unmatched_share

log = logging.getLogger(__name__)


def lars_with_warmup(trained: nn.Module, trainer: pl.Trainer, lr_at_1024: float, weight_decay: float, warmup: float):
    """The published optimiser and schedule, for any batch size by the author's square-root rule.

    ``lr = lr_at_1024 * sqrt(batch / 1024)``: 4.0 at 1,024 images a step, 2.83 at 512. Linear warm-up from a
    hundredth of it, then a cosine to 1e-6, both per step.

    Args:
        trained: holds the parameters.
        trainer: for the batch size, with accumulation, and the number of steps.
        lr_at_1024: published 4.0.
        weight_decay: published 1e-5.
        warmup: share of the steps, published 5 epochs of the run's.

    Raises:
        ValueError: if the learning rate is not positive.
    """
    if not lr_at_1024 > 0:
        raise ValueError(f"model.lr_at_1024: expected a positive learning rate, got {lr_at_1024}")
    batch = trainer.datamodule.batch_size * trainer.accumulate_grad_batches
    return lars(trained, trainer, lr_at_1024 * (batch / 1024) ** 0.5, weight_decay, warmup)


def lars(trained: nn.Module, trainer: pl.Trainer, lr: float, weight_decay: float, warmup: float):
    """LARS at a learning rate, with the published warm-up and cosine."""
    steps = steps_of(trainer)
    warm = max(1, round(warmup * steps))
    optimizer = LARS(param_groups(trained, weight_decay), lr=lr, momentum=0.9)
    schedule = CosineWarmupScheduler(
        optimizer,
        warmup_epochs=warm,
        max_epochs=steps + 1,
        warmup_start_value=0.01 - 0.99 / warm,
        warmup_end_value=1 - 0.99 / warm,
        end_value=1e-6 / lr,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def start_target(target: EMA, online: nn.Module, trainer: pl.Trainer, start: float = 0.99) -> None:
    """Gives the momentum encoder its published schedule over the run's steps, and its first update.

    The published code updates before the keys of a step; that equals updating after the optimiser's step, but for the
    very first update, which changes nothing: target and online encoder are still the same.
    """
    steps = steps_of(trainer)
    target.momentum = lambda step: cosine_schedule(min(step, steps), steps + 1, start, 1.0)
    if target.step == 0:
        target.update(online)


def mean_over_cells(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of a map over its valid cells, ``(B, C)``; None: over all. 0 where no cell is valid."""
    if valid is None:
        return x.mean((2, 3))
    summed = x.masked_fill(~valid.view(len(x), 1, *x.shape[2:]), 0).sum((2, 3))
    return summed / valid.sum(1, keepdim=True).clamp(min=1)


def refuse_nodata(trainer: pl.Trainer) -> None:
    """Raises ValueError where cells without data would count: for methods that hand no validity on."""
    nodata = trainer.datamodule.nodata
    if nodata is not None:
        raise ValueError(
            f"data.nodata: expected none for this method, got {nodata}: its cells without data would count; "
            "PixPro's recipes, PixContrast, DetCon and the ViT's leave them out"
        )


def health(
    query: Tensor, key: Tensor, mask: Tensor, valid_q: Tensor | None = None, valid_k: Tensor | None = None
) -> dict[str, Tensor]:
    """The meters, as named in the logs; of valid cells, where not all are."""
    positive, negative = pair_similarity(query, key, mask, valid_q, valid_k)
    channels = query.shape[1 if query.ndim == 4 else 2]  # of a map, or of tokens
    return {
        "health/std_times_sqrt_c": feature_std(query, valid_q) * channels**0.5,
        "health/effective_rank": effective_rank(query, valid_q),
        "health/positives_per_cell": positives_per_cell(mask, valid_q),
        "health/images_without_match": unmatched_share(mask),
        "health/similarity_positive": positive,
        "health/similarity_negative": negative,
    }


def is_logged(trainer: pl.Trainer) -> bool:
    """Whether the step that is running ends in a row of the logs; meters are read then only."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0


class StopWhenIll(Callback):
    """Stops a run whose loss is no number, whose features have collapsed, or whose files cannot be read.

    Args:
        collapsed_below: of ``health/std_times_sqrt_c``.
        patience: optimiser steps without a healthy reading. Healthy runs dip as well, the quickstart's for 80 steps.
    """

    def __init__(self, collapsed_below: float = 0.3, patience: int = 1000) -> None:
        self.collapsed_below, self.patience = collapsed_below, patience
        self.healthy_at = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step % trainer.log_every_n_steps:
            return  # reading a value back stalls the GPU
        loss = float(outputs["loss"])
        if not abs(loss) < float("inf"):
            raise RuntimeError(f"loss is {loss} at step {trainer.global_step}: stopped. Lower the model's lr_*.")
        std = trainer.callback_metrics.get("health/std_times_sqrt_c")
        if std is None or float(std) >= self.collapsed_below:
            self.healthy_at = trainer.global_step
        if trainer.global_step - self.healthy_at >= self.patience:
            raise RuntimeError(
                f"health/std_times_sqrt_c is {float(std):.3f}, below {self.collapsed_below} for the last "
                f"{trainer.global_step - self.healthy_at} steps: the features have collapsed. See the docs, Questions."
            )

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        # Before the batch goes on: a run on rubbish should not train first.
        data = trainer.datamodule
        if is_logged(trainer):
            module.log_dict({"data/unreadable": float(data.unreadable), "data/enlarged": data.enlarged / data.seen})
        if data.unreadable > max(1, data.max_unreadable * data.seen):
            raise RuntimeError(
                f"{data.unreadable} unreadable files met in {data.seen} images: more than data.max_unreadable = "
                f"{data.max_unreadable}. Their names are in the log."
            )


class Speed(Callback):
    """Logs images/s and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.end = self.waited = self.since = 0.0
        self.images = 0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.end = self.since = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.end
        self.images += len(batch.unreadable) * trainer.world_size

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.end = time.perf_counter()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            elapsed = self.end - self.since
            module.log("speed/images_per_s", self.images / elapsed, prog_bar=True)
            module.log("speed/data_wait", self.waited / elapsed)
            self.since, self.images, self.waited = self.end, 0, 0.0


def backbone_of(module: Any) -> nn.Module:
    """The first part of a recipe's encoder, before its heads; in pixpro_fpn.py with FPN and towers around it."""
    return next(module.encoder.children())


class Encoders(Callback):
    """Writes the query encoder's backbone as ``encoder.safetensors`` beside the checkpoints, after every epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._write(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: Any) -> None:
        folder = trainer.log_dir  # asked of every process: the answer is broadcast
        if trainer.is_global_zero and folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            weights = {key: value.cpu().contiguous() for key, value in backbone_of(module).state_dict().items()}
            part = Path(folder) / "encoder.safetensors.part"
            save_file(weights, part)
            part.replace(part.with_suffix(""))  # never half a file under the final name


class SaveOnSigterm(Callback):
    """A preempted run leaves last.ckpt behind: ``fit --ckpt_path last`` goes on from there."""

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and trainer.checkpoint_callback is not None:
            trainer.save_checkpoint(Path(trainer.checkpoint_callback.dirpath) / "last.ckpt")


class RecipeCLI(LightningCLI):
    """The command line of a recipe: ``python pixpro.py fit --config pixpro_r50_100ep.yaml --data.folder FOLDER``."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--out", type=str, default="runs/pretrain", help="run folder")
        parser.add_argument("--save_every_n_epochs", type=int, default=10, help="checkpoints to keep")
        parser.add_argument("--save_every_n_steps", type=int, default=1000, help="last.ckpt")
        parser.link_arguments("data.size", "model.size")
        parser.link_arguments("data.channels", "model.channels")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with the recipes' loggers and callbacks."""
        options = self.config.get("fit", self.config)
        callbacks = standard_callbacks(options["out"], options["save_every_n_epochs"], options["save_every_n_steps"])
        keep_earlier_rows(Path(options["out"]) / "metrics.csv")
        loggers = [
            CSVLogger(options["out"], name="", version=""),
            TensorBoardLogger(options["out"], name="", version=""),
        ]
        return super().instantiate_trainer(callbacks=callbacks, logger=loggers, **kwargs)


@rank_zero_only
def keep_earlier_rows(path: Path) -> None:
    """A continued run starts a metrics.csv of its own; Lightning would delete the one that is there."""
    if path.exists():
        number = 1 + sum(1 for _ in path.parent.glob("metrics-*.csv"))
        path.rename(path.with_name(f"metrics-{number}.csv"))


def standard_callbacks(out: str, every_n_epochs: int, every_n_steps: int) -> list[Callback]:
    """Meters, speed, checkpoints (``last.ckpt`` and every n epochs), encoder export, preemption."""
    folder = Path(out) / "checkpoints"
    return [
        StopWhenIll(),
        Speed(),
        Encoders(),
        SaveOnSigterm(),
        LearningRateMonitor("step"),
        ModelCheckpoint(
            folder, "epoch={epoch}", every_n_epochs=every_n_epochs, save_top_k=-1, auto_insert_metric_name=False
        ),
        ModelCheckpoint(folder, "last", every_n_train_steps=every_n_steps, enable_version_counter=False),
    ]


def run(method: type[pl.LightningModule]) -> None:
    """Runs a recipe from the command line; errors of the user's end it with one line."""
    logging.basicConfig(level=logging.INFO)
    try:
        RecipeCLI(method, PhotoViews, save_config_kwargs={"overwrite": True})
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
