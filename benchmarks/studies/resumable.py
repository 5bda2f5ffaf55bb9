"""Pretraining that goes on from its last state after it was killed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.studies.rows import other_option
from examples.pretrain.common.checkpoint_files import written_beside
from examples.pretrain.common.collapsed import RANK, STD
from examples.pretrain.common.optimizers import Scheduled
from examples.quickstart.loop import DrawViews, train

SAVE_EVERY = 100  # steps
Reading = dict[str, float]


def train_resumable(
    method: nn.Module,
    scheduled: Scheduled,
    draw: DrawViews,
    steps: int,
    path: Path,
    bfloat16: bool | None = None,
    momentum: tuple[float, float] = (0.99, 1.0),
    snapshots: Collection[int] = (),
    at_snapshot: Callable[[int, Reading], None] = lambda step, reading: None,
    clock: Callable[[], float] = time.process_time,
    options: str = "",
) -> Reading:
    """Trains a method in place, from the state in a file if there is one, and keeps the state there as it goes.

    The caller removes the file once the result is in safety.

    Args:
        method: The method, see ``train``.
        scheduled: Its optimiser and schedule.
        draw: Gives the views of a step, as a function of its number alone.
        steps: Number of optimiser steps.
        path: File of the state, which is written every 100 steps.
        bfloat16: Whether to compute in bfloat16, see ``train``.
        momentum: Momentum of the target encoder at the start and at the end.
        snapshots: Numbers of steps after which ``at_snapshot`` is called.
        at_snapshot: Called with the number of steps so far and what this function would return now.
        clock: Gives the seconds so far; by default those that this process has spent on its CPU cores.
        options: What the run was asked for, as text from ``options_of``. A state of other options is refused.

    Returns:
        Means over the last steps that were logged (every tenth, at most 50) of ``loss`` and ``std``, and ``seconds``,
        the time by the clock over all steps, those before a stop included.

    Raises:
        ValueError: If the state in the file is of a run of another length, whose schedule differs, or of other options.
    """
    begin, seen, start = 0, [], clock()
    states = {"method": method, "optimizer": scheduled.optimizer, "schedule": scheduled.schedule}
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if (planned := saved.get("steps", "an unknown number")) != steps:
            raise ValueError(
                f"steps: expected {planned}, the length of the run whose state is {path}, got {steps}; "
                "remove the file to begin anew"
            )
        other = other_option(saved.get("options", ""), options)
        if other is not None:
            raise ValueError(
                f"--{other[0]}: expected {other[1]}, as in the run whose state is {path}, got {other[2]}; remove the "
                "file to begin anew"
            )
        begin, seen, start = saved["step"], saved["seen"], start - saved["seconds"]
        for key, part in states.items():
            part.load_state_dict(saved[key])
    bar = tqdm(total=steps, initial=begin, desc=path.stem, mininterval=10, nrows=20)

    def reading() -> Reading:
        loss, std = (statistics.mean(column) for column in zip(*seen[-50:], strict=True))
        return {"loss": loss, "std": std, "seconds": clock() - start}

    def after(step: int, result) -> None:
        bar.update()
        if step % 10 == 9 or step + 1 in {*snapshots, steps}:
            metrics = result.metrics()
            seen.append((float(result.loss), float(metrics[STD])))
            bar.set_postfix(std=f"{seen[-1][1]:.2f}", rank=f"{float(metrics[RANK]):.0f}", refresh=False)
        if step + 1 in snapshots:
            at_snapshot(step + 1, reading())
        if (step + 1) % SAVE_EVERY == 0:
            state = {key: part.state_dict() for key, part in states.items()}
            with written_beside(path) as new:  # whole, or not at all
                torch.save(
                    state
                    | {"step": step + 1, "steps": steps, "seen": seen, "seconds": clock() - start, "options": options},
                    new,
                )

    train(method, scheduled, draw, steps, after, momentum, begin, bfloat16)
    bar.close()
    return reading()
