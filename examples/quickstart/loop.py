"""A training loop in plain PyTorch, for any method of examples/pretrain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import kornia.augmentation as K
import numpy as np
import torch
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from densessl import BatchAugment, View
from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from examples.pretrain.common.optimizers import Scheduled
from examples.pretrain.common.step import Step

DrawViews = Callable[[int], tuple[View, View]]  # the two batches of views of a step


def train(
    method: nn.Module,
    scheduled: Scheduled,
    draw: DrawViews,
    steps: int,
    after: Callable[[int, Step], None] = lambda step, result: None,
    momentum: tuple[float, float] = (0.99, 1.0),
    begin: int = 0,
    bfloat16: bool | None = None,
) -> None:
    """Trains a method in place.

    Args:
        method: ``forward(view1, view2) -> Step``, with ``encoder`` and, where it has one, ``target``.
        scheduled: Its optimiser and schedule.
        draw: Gives the views of a step.
        steps: Number of optimiser steps.
        after: Called after each step with its number and what the method returned.
        momentum: Momentum of the target encoder at the start and at the end.
        begin: Number of steps that were taken before; the states of method, optimiser and schedule are those of then.
        bfloat16: Whether to compute in bfloat16 where autocast does so. None: on a GPU only, since few CPUs gain by it.
    """
    optimizer, schedule = scheduled
    target = getattr(method, "target", None)
    if target is not None:
        start, end = momentum
        target.momentum = partial(cosine_schedule, max_steps=steps + 1, start_value=start, end_value=end)
        if not begin:
            target.update(method.encoder)
    method.train()
    device = next(method.parameters()).device
    half = device.type == "cuda" if bfloat16 is None else bfloat16
    for step in range(begin, steps):
        views = draw(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            result = method(*views)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        schedule.step()
        if target is not None and step + 1 < steps:
            target.update(method.encoder)
        after(step, result)


@torch.no_grad()
def fill_statistics(backbone: nn.Module, draw: DrawViews, steps: int = 50) -> None:
    """Lets batch norm see the views without changing a weight: what a run at learning rate 0 would leave.

    A backbone whose batch norm has seen nothing cannot be compared with a trained one.
    """
    backbone.train()
    for step in range(steps):
        for view in draw(step):
            backbone(view.image)


def seed_step(*numbers: int) -> None:
    """Seeds torch's generators with a function of these numbers alone."""
    torch.manual_seed(draw_seed(*numbers))


def draw_seed(*numbers: int) -> int:
    """A seed that is a function of these numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def strong_colours(*first: nn.Module) -> BatchAugment:
    """Colour changes beyond the published ones, on the device: on a small set, colour is a shortcut.

    Args:
        *first: Steps of kornia's that come before.
    """
    return BatchAugment(
        K.AugmentationSequential(
            *first,
            K.ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8),
            K.RandomChannelShuffle(p=0.5),
            K.RandomInvert(p=0.3),
            K.RandomGrayscale(p=0.2),
            K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        )
    )


def normalized(images: Tensor) -> Tensor:
    """Images, uint8 ``(B, 3, H, W)``, with ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def frozen_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Whole images, uint8 ``(B, 3, H, W)``, to feature maps, without gradients."""
    x = normalized(images.to(next(backbone.parameters()).device))
    backbone.eval()
    with torch.no_grad():
        return backbone(x)
