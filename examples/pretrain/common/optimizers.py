"""The published optimisers with their schedules, each for any batch size by its authors' rule.

Each is a settings object that is called with the method, the images of a step over all processes and with accumulation,
and the number of steps of the run; it returns the optimiser and a schedule that advances with every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import nn
from torch.optim import Optimizer

from densessl import LARS, param_groups


class Scheduled(NamedTuple):
    """An optimiser and its schedule."""

    optimizer: Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler


def _checked(name: str, lr: float) -> float:
    if not 0 < lr < float("inf"):
        raise ValueError(f"optimizer.{name}: expected a positive learning rate, got {lr}")
    return lr


def _share(warmup: float) -> float:
    if not 0 <= warmup <= 1:
        raise ValueError(f"optimizer.warmup: expected a share of the steps in 0..1, got {warmup}")
    return warmup


def _lars(method: nn.Module, lr: float, weight_decay: float, warmup: float, steps: int) -> Scheduled:
    """Linear warm-up from a hundredth of the rate, then a cosine to 1e-6, both per step."""
    warm = max(1, round(_share(warmup) * steps))
    optimizer = LARS(param_groups(method, weight_decay), lr=lr, momentum=0.9)
    schedule = CosineWarmupScheduler(
        optimizer,
        warmup_epochs=warm,
        max_epochs=steps + 1,
        warmup_start_value=0.01 - 0.99 / warm,
        warmup_end_value=1 - 0.99 / warm,
        end_value=1e-6 / lr,
    )
    return Scheduled(optimizer, schedule)


@dataclass
class SquareRootLARS:
    """LARS at ``lr_at_1024 * sqrt(batch / 1024)``: 4.0 at 1,024 images a step, 2.83 at 512 (zdaxie/PixPro issue 5).

    Args:
        lr_at_1024: Learning rate at 1,024 images a step, above 0; for another number it follows by the square root, so
            that at 256 it is a half. The published value is 4.0.
        weight_decay: Weight decay of the weights of all layers, at least 0; biases and norms have none. The published
            value is 1e-5.
        warmup: Share of the run's steps, in 0..1, in which the learning rate rises to its full value; a cosine to
            almost 0 follows. The published value is 5 epochs of 100.
    """

    lr_at_1024: float = 4.0
    weight_decay: float = 1e-5
    warmup: float = 0.05

    def __call__(self, method: nn.Module, batch: int, steps: int) -> Scheduled:
        lr = _checked("lr_at_1024", self.lr_at_1024) * (batch / 1024) ** 0.5
        return _lars(method, lr, self.weight_decay, self.warmup, steps)


@dataclass
class LinearLARS:
    """LARS at ``lr_at_256 * batch / 256``, as VICRegL, DetCon and SlotCon have it.

    Args:
        lr_at_256: Learning rate at 256 images a step, above 0; for another number it follows in proportion.
        weight_decay: Weight decay of the weights of all layers, at least 0; biases and norms have none.
        warmup: Share of the run's steps, in 0..1, in which the learning rate rises to its full value; a cosine to
            almost 0 follows.
    """

    lr_at_256: float
    weight_decay: float = 1e-6
    warmup: float = 0.05

    def __call__(self, method: nn.Module, batch: int, steps: int) -> Scheduled:
        lr = _checked("lr_at_256", self.lr_at_256) * batch / 256
        return _lars(method, lr, self.weight_decay, self.warmup, steps)


@dataclass
class LinearSGD:
    """SGD as in MoCo v2 and DenseCL: momentum 0.9, a cosine to 0 over the steps, no warm-up.

    Args:
        lr_at_256: Learning rate at 256 images a step, above 0; for another number it follows in proportion.
        weight_decay: Weight decay of every parameter, those of batch norm included, as published; at least 0.
    """

    lr_at_256: float = 0.03
    weight_decay: float = 1e-4

    def __call__(self, method: nn.Module, batch: int, steps: int) -> Scheduled:
        lr = _checked("lr_at_256", self.lr_at_256) * batch / 256
        trained = [p for p in method.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=self.weight_decay)
        return Scheduled(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))


@dataclass
class BackboneAdamW:
    """AdamW with a small rate for a pretrained backbone and a larger one for all other parts; a cosine to 0.

    Args:
        lr_backbone: Learning rate of the backbone, above 0. It is used as it is given, whatever the batch size.
        lr_head: Learning rate of all other parameters, which start from random weights; above 0. It is used as it is
            given as well.
        weight_decay: Weight decay of the weights of all layers, at least 0; biases, norms, embeddings and tokens have
            none.
        warmup: Share of the run's steps, in 0..1, in which both learning rates rise to their full values; a cosine to 0
            follows.
    """

    lr_backbone: float = 1e-5
    lr_head: float = 1e-4
    weight_decay: float = 0.04
    warmup: float = 0.02

    def __call__(self, method: nn.Module, batch: int, steps: int) -> Scheduled:
        rates = {name: _checked(name, getattr(self, name)) for name in ("lr_backbone", "lr_head")}
        backbone = backbone_of(method)
        inside = {id(p) for p in backbone.parameters()}
        rest = [(name, p) for name, p in method.named_parameters() if id(p) not in inside]
        groups = [
            *_decayed_or_not(backbone.named_parameters(), rates["lr_backbone"], self.weight_decay),
            *_decayed_or_not(rest, rates["lr_head"], self.weight_decay),
        ]
        optimizer = torch.optim.AdamW(groups)
        warm = round(_share(self.warmup) * steps)
        return Scheduled(optimizer, CosineWarmupScheduler(optimizer, warm, max_epochs=steps + 1, end_value=0.0))


def _decayed_or_not(parameters: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    # A ViT's embeddings and tokens have three dimensions, and names of their own.
    decayed = [p for name, p in trained if p.ndim > 1 and name.endswith("weight")]
    other = [p for name, p in trained if p.ndim <= 1 or not name.endswith("weight")]
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": other, "lr": lr, "weight_decay": 0},
    ]
    return [group for group in groups if group["params"]]


def backbone_of(method: nn.Module) -> nn.Module:
    """The first part of a method's encoder, before its heads; in pixpro_fpn.py with FPN and towers around it."""
    return next(method.encoder.children())
