"""Training, written once for all methods, on Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from examples.pretrain.common.data.seeds import seed_of
from examples.pretrain.common.data.views import Batch
from examples.pretrain.common.optimizers import Scheduled
from examples.pretrain.common.sharding import shard_method
from examples.pretrain.common.step import check_step


class Pretraining(pl.LightningModule):
    """Trains a method: its loss, the update of its target encoder, optimiser, schedules and logs.

    Args:
        method: ``forward(view1, view2) -> Step``, with ``*small`` where it takes small views. It holds
            ``encoder`` and, where it has one, ``target`` (EMA).
        optimizer: Called with the method, the images of a step and the number of steps; see optimizers.py.
        momentum: Momentum of the target encoder in the first step and at the end of the run; a cosine leads from one to
            the other.
        compiled: Compile the encoders with torch.compile.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: Callable[[nn.Module, int, int], Scheduled],
        momentum: tuple[float, float] = (0.99, 1.0),
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.method, self.optimizer, self.momentum = method, optimizer, momentum
        if compiled:
            for encoder in (method.encoder, *([method.target.module] if self.has_target else [])):
                encoder.compile()

    @property
    def has_target(self) -> bool:
        """Whether the method has a target encoder."""
        return getattr(self.method, "target", None) is not None

    def configure_model(self) -> None:
        """Shards the method where the strategy asks for it: ``trainer.strategy: fsdp2``."""
        if self.device_mesh is not None:
            shard_method(self.method, self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # What a method draws is a function of the seed and of the batch's number, the same in every process.
        torch.manual_seed(seed_of(self.trainer.datamodule.seed, self.trainer.fit_loop.epoch_loop.total_batch_idx))
        step = self.method(*batch.views)
        check_step(step)
        self.log("loss", step.loss, prog_bar=True)
        self.log_dict({f"loss/{name}": value.detach() for name, value in step.terms.items()})
        if is_logged(self.trainer):
            self.log_dict(step.metrics())
            if self.has_target:
                self.log("momentum", self.method.target.momentum(self.method.target.step))
        return step.loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.has_target:
            self.method.target.update(self.method.encoder)

    def on_fit_start(self) -> None:
        """Gives the target encoder its schedule over the run's steps, and its first update; a short run logs more.

        The published code updates before the keys of a step. That equals updating after the optimiser's step, but for
        the very first update, which changes nothing: target and online encoder are still the same.
        """
        steps = steps_of(self.trainer)
        self.trainer.log_every_n_steps = spacing(steps, self.trainer.log_every_n_steps)
        if not self.has_target:
            return
        (start, end), target = self.momentum, self.method.target
        target.momentum = lambda step: cosine_schedule(min(step, steps), steps + 1, start, end)
        if target.step == 0:
            target.update(self.method.encoder)

    def configure_optimizers(self) -> Any:
        images = self.trainer.datamodule.batch_size * self.trainer.accumulate_grad_batches
        optimizer, schedule = self.optimizer(self.method, images, steps_of(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def is_logged(trainer: pl.Trainer) -> bool:
    """Whether the step that is running ends in a row of the logs; metrics are computed then only."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0


def spacing(steps: int, every: int) -> int:
    """Steps between two logged ones: as asked for, but fewer in a run that would have no two points for a curve.

    Args:
        steps: Steps of the whole run.
        every: What ``trainer.log_every_n_steps`` asks for.
    """
    return every if steps >= 2 * every else max(1, steps // 10)


def steps_of(trainer: pl.Trainer) -> int:
    """Optimiser steps of the whole run.

    Not ``trainer.estimated_stepping_batches``: that opens the loader before its position is restored.
    """
    steps = math.ceil(trainer.datamodule.batches_taken() / trainer.accumulate_grad_batches) * (trainer.max_epochs or -1)
    if trainer.max_steps > 0:
        steps = min(steps, trainer.max_steps) if steps > 0 else trainer.max_steps
    if steps < 1:
        raise ValueError("trainer: expected a budget, max_epochs or max_steps, and at least one batch, got none")
    return steps
