"""Optimisers of the methods whose learning rate grows linearly with the batch."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from data import steps_of
from engine import lars
from torch import nn


def sgd_with_cosine(trained: nn.Module, trainer: pl.Trainer, lr_at_256: float, weight_decay: float):
    """SGD as in MoCo v2 and DenseCL: momentum 0.9, a cosine to 0 over the steps, no warm-up, decay on all parameters.

    Args:
        trained: holds the parameters.
        trainer: for the batch size, with accumulation, and the number of steps.
        lr_at_256: learning rate at 256 images a step.
        weight_decay: of every parameter, those of batch norm included, as published.

    Raises:
        ValueError: if the learning rate is not positive.
    """
    lr = lr_by_linear_rule(trainer, lr_at_256)
    trained_parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained_parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_of(trainer))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lars_by_linear_rule(trained: nn.Module, trainer: pl.Trainer, lr_at_256: float, weight_decay: float, warmup: float):
    """LARS of VICRegL, DetCon and SlotCon; arguments as in ``sgd_with_cosine``, ``warmup`` a share of the steps."""
    return lars(trained, trainer, lr_by_linear_rule(trainer, lr_at_256), weight_decay, warmup)


def lr_by_linear_rule(trainer: pl.Trainer, lr_at_256: float) -> float:
    """``lr_at_256 * images a step / 256``.

    Raises:
        ValueError: if it is not positive.
    """
    if not lr_at_256 > 0:
        raise ValueError(f"model.lr_at_256: expected a positive learning rate, got {lr_at_256}")
    return lr_at_256 * trainer.datamodule.batch_size * trainer.accumulate_grad_batches / 256
