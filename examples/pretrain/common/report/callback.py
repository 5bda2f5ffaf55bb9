"""Writes the report at the end of a run, however it ends."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from examples.pretrain.common.collapsed import RANK, STD, bounds_crossed, collapsed
from examples.pretrain.common.data.datamodule import PhotoViews
from examples.pretrain.common.data.label_masks import mask_warning
from examples.pretrain.common.data.sources import FolderSource, evenly
from examples.pretrain.common.known_as import known_as
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.probe import DenseProbe
from examples.pretrain.common.report.content import (
    better_or_worse,
    continuing,
    duration,
    last_of,
    next_commands,
    nothing_learnt,
    of_a_cut,
    read_curves,
    settings,
    told_noise,
    weights_of,
)
from examples.pretrain.common.report.gallery import gallery
from examples.pretrain.common.report.write import Story, write_html, write_markdown
from examples.pretrain.common.samples import read_squares
from examples.pretrain.common.scores import IN_WORDS, Form, changes, frozen, settled
from examples.pretrain.common.sharding import is_sharded
from examples.pretrain.common.stop_signals import stopped_by
from examples.pretrain.common.training import steps_of

log = logging.getLogger(__name__)

SHOWN = 4  # photos


class RunReport(Callback):
    """``report.html`` and ``report.md`` in the run's folder, at its end and when it is stopped.

    Args:
        config: All options of the run.
        data: The data of the run.
        form: How images go into the network.
        probe: The probe of the run; its images are shown.
    """

    def __init__(self, config: Namespace, data: PhotoViews, form: Form, probe: DenseProbe) -> None:
        self.config, self.data, self.form, self.probe = config, data, form, probe
        self.photos: list[Tensor] = []
        self.start: list[Tensor] = []  # sums over the backbone's weights at step 0, which tell whether any has changed
        self.before: Tensor | None = None  # maps of the photos
        self.begun, self.earlier, self.trained_on, self.written = 0.0, 0.0, False, False

    def state_dict(self) -> dict[str, Any]:
        spent = self.earlier + (time.perf_counter() - self.begun if self.begun else 0.0)
        return {"before": None if self.before is None else self.before.half(), "seconds": spent, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before, self.earlier = state["before"], state["seconds"]
        self.start = state.get("start", [])

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        # The probe is read before this: in a run that begins, its first reading is a part of the run's time.
        self.begun = time.perf_counter() - (0.0 if self.earlier else self.probe.seconds)
        if not trainer.is_global_zero or is_sharded(module):
            return  # a sharded backbone cannot be run by this process alone: the report then has no pictures
        if trainer.global_step == 0:
            self.start = _sums(backbone_of(module.method))
        self.photos = self.probe.sample[:SHOWN]
        if not self.photos and isinstance(self.data.source, FolderSource):
            paths = self.data.source.paths()
            self.photos = read_squares([paths[i] for i in evenly(len(paths), SHOWN)], *self.form[:2])
            self.trained_on = True
        if self.photos and (self.before is None or len(self.before) != len(self.photos)):
            self.before = self._maps(settled(backbone_of(module.method), self.photos, self.form))

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        steps = steps_of(trainer)
        early = trainer.global_step < steps
        self._write(trainer, module, f"stopped after {trainer.global_step} of {steps} steps" if early else "finished")

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if self.begun and not self.written:
            said = f": {exception}" if str(exception) else ""
            why = stopped_by(exception) or f"{type(exception).__name__}{said}"
            self._write(trainer, module, f"stopped after {trainer.global_step} of {steps_of(trainer)} steps by {why}")

    def _maps(self, backbone: torch.nn.Module) -> Tensor:
        with frozen(backbone, self.form) as features:
            return features(torch.stack(self.photos)).cpu()

    def _write(self, trainer: pl.Trainer, module: Any, end: str) -> None:
        if not trainer.is_global_zero:
            return
        self.written = True
        for logger in trainer.loggers:
            logger.save()  # the curves are read from the table
        out = Path(self.config.out)
        try:
            story = self._story(trainer, module, end)
            out.mkdir(parents=True, exist_ok=True)
            write_html(out / "report.html", story)
            write_markdown(out / "report.md", story)
        except Exception:  # a run of days is not lost for a picture of it
            log.exception("report: could not be written")
            return
        log.info("report: %s", out / "report.html")

    def _story(self, trainer: pl.Trainer, module: Any, end: str) -> Story:
        out, data, probe = Path(self.config.out), self.data, self.probe
        curves, spent = read_curves(out), time.perf_counter() - self.begun
        recipe = type(getattr(module.method, "method", module.method))  # an anchored one is around its method
        pictures = []
        if self.photos and self.before is not None:
            maps = {"before": self.before.float(), "after": self._maps(backbone_of(module.method))}
            pictures = gallery(self.photos, maps)
        best = max(probe.readings, key=lambda row: row[probe.score])["step"] if probe.readings else None
        device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "CPU"
        total = "" if not self.earlier else f", {duration(self.earlier + spent)} with the earlier parts"
        rate = data.seen * trainer.world_size / max(spent, 1e-9)
        values = {
            "steps": f"{trainer.global_step:,} of {data.batch_size} images",
            "time": duration(spent) + total,
            "images/s": f"{rate:.1f} over the whole time, the probe's included",
            "device": f"{trainer.world_size} x {device}" if trainer.world_size > 1 else device,
            "time of the probe": f"{duration(probe.seconds)} ({probe.seconds / max(spent + self.earlier, 1e-9):.1%})",
            "backbone": f"{self.config.backbone.name}, from {self.config.backbone.get('init', 'random')}",
        }
        goes_on = continuing(self.config, recipe) if trainer.global_step < steps_of(trainer) else {}
        note = (
            "Equal colours mean alike features within one column; the columns are not comparable in colour. Similarity "
            "is that of each cell to the middle of the photo. "
        )
        note += "These photos were trained on." if self.trained_on else "None of these photos was trained on."
        return Story(
            f"{known_as(recipe)}: {end.split(' by ')[0]}",
            (f"The run {end}. " if " by " in end else "") + self._verdict(curves, backbone_of(module.method)),
            self._warnings(curves),
            values,
            self._read(trainer),
            curves,
            probe.readings,
            self._about_scores(),
            best,
            pictures,
            note if pictures else "No photo was at hand.",
            goes_on | next_commands(self.config, weights_of(out)),
            of_a_cut(self.config),
            settings(self.config),
        )

    def _verdict(self, curves: dict, backbone: torch.nn.Module) -> str:
        sums, probe = zip(self.start, _sums(backbone), strict=False), self.probe
        moved = not self.start or any(not torch.equal(before, after) for before, after in sums)
        normed = any(isinstance(module, _BatchNorm) for module in backbone.modules())
        return nothing_learnt(curves, moved, normed and len(probe.readings) > 1) or better_or_worse(
            probe.readings, probe.score, probe.noise
        )

    def _about_scores(self) -> str:
        probe = self.probe
        if not probe.readings:
            return ""
        labels = probe.labelled
        text = told_noise(probe.readings[-1], probe.noise, len(probe.sample), len(labels.test) if labels else 0)
        return text if labels is None else f"{text} The labels have {labels.counted} classes{labels.beside}."

    def _warnings(self, curves: dict) -> list[str]:
        found, source = [], self.data.source
        masks = mask_warning(source.paths(), "data.folder") if isinstance(source, FolderSource) else None
        if masks is not None:
            found.append(masks)
        if self.probe.warned:
            rose, _ = changes(self.probe.readings[0], self.probe.readings[-1], self.probe.noise)
            above = " and ".join(IN_WORDS[name] for name in rose)
            also = f". At the end {above} {'are' if len(rose) > 1 else 'is'} above it."
            found.append(
                f"Three readings of {self.probe.score} in a row were below the start"
                + (also if rose else ": see the learning rate and the views.")
            )
        std, rank = last_of(curves, STD), last_of(curves, RANK)
        if not math.isnan(std) and collapsed(std, rank):
            of_std, of_rank = bounds_crossed(std, rank)
            also = "" if of_rank is None else f", and they use {rank:.1f} directions, fewer than {of_rank:g}"
            found.append(
                f"The spread of the projections ended at {std:.2f}, below {of_std}{also}: all cells look alike to "
                "the head, which is a collapse if it does not rise again."
            )
        if self.data.seen and self.data.unreadable > max(1, 0.01 * self.data.seen):
            found.append(f"{self.data.unreadable} times a file could not be read: their names are in the log.")
        return found

    def _read(self, trainer: pl.Trainer) -> dict[str, str]:
        data = self.data
        count = data.source.count(trainer.world_size, data.workers)
        since = " since the run was continued" if self.earlier else ""
        return {
            "folder": str(data.source.folder),
            "images to train on": f"{count:,}",
            "kept for the probe": f"{len(data.source.held_out()):,}",
            "images read" + since: f"{data.seen:,} ({data.seen * trainer.world_size / count:.1f} passes)",
            "unreadable, replaced" + since: f"{data.unreadable:,}",
            "smaller than the views": f"{data.enlarged:,} of those read",
            "left out of each pass": f"{count % data.batch_size} that fill no batch; others each time",
        }


@torch.no_grad()
def _sums(module: torch.nn.Module) -> list[Tensor]:
    """The sum and the sum of squares of each parameter, on the CPU."""
    return [torch.stack([p.float().sum(), p.float().square().sum()]).cpu() for p in module.parameters()]
