"""Pretraining that goes on from its last state after it was killed."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from examples.pretrain.common.checkpoint_files import written_beside
from examples.pretrain.common.optimizers import Scheduled
from examples.quickstart.loop import DrawViews, train

SAVE_EVERY = 100  # steps


def train_resumable(
    method: nn.Module,
    scheduled: Scheduled,
    draw: DrawViews,
    steps: int,
    path: Path,
    bfloat16: bool | None = None,
) -> dict[str, float]:
    """Trains a method in place, from the state in a file if there is one, and keeps the state there as it goes.

    The caller removes the file once the result is in safety.

    Args:
        method: The method, see ``train``.
        scheduled: Its optimiser and schedule.
        draw: Gives the views of a step, as a function of its number alone.
        steps: Number of optimiser steps.
        path: File of the state, which is written every 100 steps.
        bfloat16: Whether to compute in bfloat16, see ``train``.

    Returns:
        Means over the last steps that were logged (every tenth, at most 50) of ``loss`` and ``std``, and ``seconds``,
        the time of this process's CPU cores over all steps, those before a stop included.
    """
    begin, seen, start = 0, [], time.process_time()
    states = {"method": method, "optimizer": scheduled.optimizer, "schedule": scheduled.schedule}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        begin, seen, start = saved["step"], saved["seen"], start - saved["seconds"]
        for key, part in states.items():
            part.load_state_dict(saved[key])
    bar = tqdm(total=steps, initial=begin, desc=path.stem, mininterval=10)

    def after(step: int, result) -> None:
        bar.update()
        if step % 10 == 9 or step + 1 == steps:
            seen.append((float(result.loss), float(result.metrics()["health/std_times_sqrt_c"])))
        if (step + 1) % SAVE_EVERY == 0:
            state = {key: part.state_dict() for key, part in states.items()}
            with written_beside(path) as new:  # whole, or not at all
                torch.save(state | {"step": step + 1, "seen": seen, "seconds": time.process_time() - start}, new)

    train(method, scheduled, draw, steps, after, begin=begin, bfloat16=bfloat16)
    bar.close()
    loss, std = (statistics.mean(column) for column in zip(*seen[-50:], strict=True))
    return {"loss": loss, "std": std, "seconds": time.process_time() - start}
