"""last.ckpt: the checkpoint that a run goes on from, whatever ended it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities import rank_zero_info

from examples.pretrain.common.checkpoint_files import remove_parts
from examples.pretrain.common.stop_signals import SECONDS_TO_END, SECONDS_TO_REPORT, StopSignals


class LastCheckpoint(Checkpoint):  # Lightning calls checkpoints after all other callbacks, whose state they hold
    """Writes ``last.ckpt`` every n steps, when the run is asked to end, and at its end.

    Lightning's ModelCheckpoint also writes when a continued run has done its first batch. Where gradients are
    accumulated that is inside a window, and the window's first gradients would be lost.

    Args:
        folder: Folder of the checkpoints.
        every_n_steps: Optimiser steps between two writings.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder, self.every_n_steps, self.signals = folder, every_n_steps, StopSignals()
        self.step = 0  # the last optimiser step that was looked at
        self.written: int | None = None  # the step of the file

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        self.signals.install(trainer)
        keep_sums(trainer.strategy)
        if trainer.is_global_zero:
            remove_parts(self.folder)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.signals.install(trainer)
        self.step = trainer.global_step
        self.written = self.step if self.step else None  # a run that goes on has its file
        self._obey(trainer, self.signals.agreed(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # The last batch of an epoch is looked at when the epoch's own checkpoint is written: a run that is killed
        # between the two would go on with the next epoch, and that file would never be.
        if not trainer.is_last_batch:
            self._after_step(trainer, trainer.global_step == trainer.max_steps)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._after_step(trainer, trainer.current_epoch + 1 == trainer.max_epochs)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.written != trainer.global_step:
            self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        # A process that was asked to end keeps its handlers until it is gone; a notebook's kernel lives on.
        if not isinstance(exception, SystemExit) or hasattr(sys, "ps1"):
            self.signals.restore()

    def teardown(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        self.signals.restore()

    def _after_step(self, trainer: pl.Trainer, last: bool) -> None:
        if trainer.global_step == self.step:
            return  # inside a window of accumulated gradients
        self.step = trainer.global_step
        number = self.signals.agreed(trainer)
        self.signals.alive(SECONDS_TO_END)
        if last or number or self.step % self.every_n_steps == 0:
            self._write(trainer)
        self._obey(trainer, number)

    def _write(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self.written = trainer.global_step

    def _obey(self, trainer: pl.Trainer, number: int) -> None:
        if number:
            self.signals.alive(SECONDS_TO_REPORT)
            name, step = signal.Signals(number).name, trainer.global_step
            rank_zero_info(f"Stopped by {name} after step {step}; --ckpt_path last goes on from there.")
            raise SystemExit(128 + number)  # as a shell says it of a process that a signal has ended


def keep_sums(strategy: Strategy) -> None:
    """Lets more than two processes on CPUs add up their gradients in the same order in every step.

    After its first step a process sorts its gradients into other buckets, and so each first step of a run that goes on
    would round differently. torch does not sort where it looks for unused parameters. On GPUs that would cost time, and
    equal bits are not promised there.
    """
    if isinstance(strategy, DDPStrategy) and strategy.root_device.type == "cpu":
        strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
