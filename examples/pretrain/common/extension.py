"""A run that gets a longer budget: what its schedules do."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

from examples.pretrain.common.training import steps_of

log = logging.getLogger(__name__)


class Extension(Callback):
    """From the continuation on, rates and momentum are those of a run that had the longer budget from its start.

    The momentum follows by itself, since it is a function of the step and of the budget. A checkpoint brings the rates'
    schedule of the shorter budget back, so the one of the longer budget is kept here and put in its place.

    Args:
        done: Optimiser steps before the continuation.
    """

    def __init__(self, done: int) -> None:
        self.done = done
        self.schedules: list[tuple[dict[str, Any], list[float]]] = []

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Here the schedules are fresh; the checkpoint's come afterwards."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no optimiser's step came before these
            for config in trainer.lr_scheduler_configs:
                schedule = config.scheduler
                for _ in range(self.done):  # step by step, because a schedule may follow from its last rate
                    schedule.step()
                rates = [group["lr"] for group in schedule.optimizer.param_groups]
                self.schedules.append((schedule.state_dict(), rates))

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        before = rates_of(trainer)
        for config, (state, rates) in zip(trainer.lr_scheduler_configs, self.schedules, strict=True):
            config.scheduler.load_state_dict(state)
            for group, rate in zip(config.scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        target = getattr(module.method, "target", None)
        momentum = "" if target is None else f", the target's momentum {target.momentum(target.step):.6g}"
        _say(self.done, steps_of(trainer), before[0], rates_of(trainer)[0], momentum)


def rates_of(trainer: pl.Trainer) -> list[float]:
    """The learning rate of every group of parameters."""
    return [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]


@rank_zero_only
def _say(done: int, steps: int, before: float, after: float, momentum: str) -> None:
    log.info(
        "extend_to: from step %d on, rate and momentum are those of a run that had %d steps from its start; the rate "
        "goes from %.3g to %.3g%s",
        done, steps, before, after, momentum,
    )  # fmt: skip
