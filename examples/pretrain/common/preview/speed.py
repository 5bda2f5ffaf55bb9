"""What a run would cost on this machine: images/s of its loader, seconds and memory of a step, seconds of the probe."""

from __future__ import annotations

import gc
import resource
import time
from itertools import chain, repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from densessl import MaskedView, View
from examples.pretrain.common.data.views import Batch
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.probe import DenseProbe
from examples.pretrain.common.scores import frozen, scores, settled
from examples.pretrain.common.step import check_step
from examples.pretrain.common.training import steps_of

if TYPE_CHECKING:
    from examples.pretrain.common.cli import Run

SECONDS = 6.0  # of reading, and of training, at most
CPU_IMAGES = 8  # in a step that is timed on a CPU


class Speed(NamedTuple):
    """What was measured.

    Attributes:
        loader: Images/s that the workers read and crop.
        step: Seconds of a step of ``data.batch_size`` images, without waiting for data.
        timed: Images of the step that was timed; fewer than a batch on a CPU, the time then grows with the images.
        memory: Bytes: the most that the device held, or on a CPU the process.
        device: Name of the device that was measured.
        steps: Optimiser steps of the run.
        hours: Hours that the steps take, by the slower of loader and step.
        workers: Number of reading processes.
        readings: Number of readings of the probe in the run.
        reading: Seconds of one of them.
    """

    loader: float
    step: float
    timed: int
    memory: int
    device: str
    steps: int
    hours: float
    workers: int
    readings: int
    reading: float

    @property
    def probe_hours(self) -> float:
        """Hours that the probe takes beside the steps, which wait for it."""
        return self.readings * self.reading / 3600


def measure(run: Run) -> tuple[Speed, Batch]:
    """Reads and trains for a few seconds; gives a batch too. The run's method is changed by it."""
    images = run.data.source.count(1, run.data.workers)
    steps = planned_steps(run)
    loader, batch = time_loader(run, images)
    accelerator = run.config.trainer.accelerator
    device = torch.device("cuda" if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")
    readings, reading = time_probe(run, probe_of(run), steps, device)  # before the steps change the backbone
    share = run.data.batch_size // run.trainer.world_size  # of one process
    timed = share if device.type == "cuda" else min(share, CPU_IMAGES)
    seconds, memory = time_step(run, batch, timed, device, steps)
    step = seconds * share / timed
    every = run.trainer.accumulate_grad_batches
    hours = steps * every * max(step, run.data.batch_size / loader) / 3600
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return Speed(loader, step, timed, memory, name, steps, hours, run.data.workers, readings, reading), batch


def planned_steps(run: Run) -> int:
    """Optimiser steps of the run, without starting it.

    Raises:
        ValueError: If the batch does not fit the images, or the run has no budget.
    """
    return steps_of(stand_in(run))


def stand_in(run: Run) -> SimpleNamespace:
    """A trainer's place before the run: what is asked of it to know the run's length."""
    run.data.trainer = run.trainer  # as the start of a run does
    names = ("limit_train_batches", "accumulate_grad_batches", "max_epochs", "max_steps", "is_global_zero")
    return SimpleNamespace(datamodule=run.data, **{name: getattr(run.trainer, name) for name in names})


def probe_of(run: Run) -> DenseProbe:
    """The run's probe with its images read, without starting the run.

    Raises:
        ValueError: If its images or labels do not fit.
    """
    probe = next(callback for callback in run.trainer.callbacks if isinstance(callback, DenseProbe))
    probe.setup(stand_in(run), run.module, "fit")
    return probe


def readings_of(steps: int, every: int) -> int:
    """How often the probe is read: before the first step, every so many steps, and after the last; 0: never."""
    return 0 if every == 0 else 1 + -(-steps // every)


def time_probe(run: Run, probe: DenseProbe, steps: int, device: torch.device) -> tuple[int, float]:
    """Number of the probe's readings in the run, and seconds of one; the run's method is left as it was."""
    if not probe.is_on:
        return 0, 0.0
    backbone = settled(backbone_of(run.method.to(device)), probe.sample, probe.form)
    with frozen(backbone, probe.form) as features:
        if probe.sample:
            features(torch.stack(probe.sample[:1]))  # the first pass of a device takes longer
        begun = time.perf_counter()
        scores(features, probe.sample, probe.labelled)
    return readings_of(steps, probe.every_n_steps), time.perf_counter() - begun


def time_loader(run: Run, images: int) -> tuple[float, Batch]:
    """Images/s once the workers have started, and the first batch.

    What the workers had ready before the clock started does not count. Where an epoch has little more than that, the
    clock starts with the second one, which finds the workers idle.
    """
    size = min(32, run.data.batch_size, max(1, images // 2))
    loader = run.data.source.loader(
        run.data.draw, run.data.channels, batch_size=size, rank=0, world_size=1, workers=run.data.workers
    )
    batches = iter(loader)
    first, ready = next(batches), 2 * run.data.workers
    if len(loader) > 3 * ready + 1:
        for _ in range(ready):
            next(batches)
    else:
        for _ in batches:
            pass
        batches = chain.from_iterable(repeat(loader))
    begun, seen, past = time.perf_counter(), 0, 0.0
    enough = 16 * size * max(1, run.data.workers)  # workers are done with their batches all at once
    while past < SECONDS and (seen < enough or past < 1):
        if next(batches, None) is None:
            break
        seen, past = seen + size, time.perf_counter() - begun
    del batches, loader
    gc.collect()  # ends the workers
    return seen / past, first


def time_step(run: Run, batch: Batch, images: int, device: torch.device, steps: int) -> tuple[float, int]:
    """Seconds and bytes of a training step on so many images."""
    method: nn.Module = run.method.to(device).train()
    target = getattr(method, "target", None)
    optimizer, schedule = run.module.optimizer(method, run.data.batch_size, steps)
    chosen = torch.arange(images) % len(batch.unreadable)
    views = [on_device(run, index, repeated(view, chosen, device)) for index, view in enumerate(batch.views)]
    precision = str(run.config.trainer.precision or "32")
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(8 if device.type == "cuda" else 2):
        begun = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled="mixed" in precision):
            step = method(*views)
        check_step(step)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        schedule.step()
        if target is not None:
            target.update(method.encoder)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
        if sum(seconds) > SECONDS:
            break
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2], memory


def repeated(view: View | MaskedView, chosen: Tensor, device: torch.device) -> View | MaskedView:
    """The views of these places in the batch, on the device."""
    return type(view)(*(part[chosen].to(device) for part in view))


def on_device(run: Run, index: int, view: View | MaskedView) -> View | MaskedView:
    """A batch of views as the network sees it: colours and blur of the device, normalised."""
    if run.data.on_device is not None:
        view = run.data.on_device[index](view, seed=run.data.seed + index)
    return view._replace(image=view.image.contiguous(memory_format=torch.channels_last))
