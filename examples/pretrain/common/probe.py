"""Watches a run: scores the backbone while it trains, on the user's own images that are never trained on."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from safetensors.torch import save
from torch import Tensor, nn

from densessl.plots import pca_colours
from examples.pretrain.common.checkpoint_files import written_beside
from examples.pretrain.common.data.datamodule import PhotoViews
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.label_masks import mask_warning
from examples.pretrain.common.data.sources import HELD_OUT, evenly
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.pictures import enlarged, in_colour, strip
from examples.pretrain.common.samples import Labels, read_labels, read_squares
from examples.pretrain.common.scores import SCORES, Form, changes, frozen, noise_of, scores, settled, told
from examples.pretrain.common.sharding import is_sharded
from examples.pretrain.common.stop_signals import stopped_by
from examples.pretrain.common.training import steps_of

log = logging.getLogger(__name__)

SHOWN = 4  # photos whose features go to TensorBoard
READINGS = 40  # of a run, at the default spacing
LEAST = 200  # steps between readings, at the default spacing
QUICK = 3  # seconds of a reading that is still taken of a run that is told to end


def dense_probe(
    data: PhotoViews,
    form: Form,
    out: str,
    images: int | None = None,
    every_n_steps: int | None = None,
    photos: str | None = None,
    labels: str | None = None,
    score: Literal["pck", "pck_colour", "neighbors", "linear"] = "pck",
) -> DenseProbe:
    """The probe of a run, and its images taken out of those that are trained on.

    Args:
        data: The data of the run; the probe's images are held out of its source.
        form: How images go into the network.
        out: Folder of the run.
        images: Number of images of ``data.folder`` that are kept for the probe and never trained on, at most half of
            them; 0 keeps none. The same folder always gives the same ones. By default a tenth of the images are kept,
            at most 64, and none from fewer than 100.
        every_n_steps: Number of steps between two readings of the probe; it is also read before the first step and
            after the last. 0 switches it off, and its images are kept out of the training all the same. By default it
            is a fortieth of the run's steps, and at least 200.
        photos: Folder of other photos to probe on, at most 64 of them, which must not be in ``data.folder``; they take
            the place of ``images``. Tar shards need them, because nothing can be kept out of a shard.
        labels: Folder of labelled images, to probe with labels too: photos in ``images/``, and for each a PNG of its
            name in ``masks/`` that holds in each pixel the number of its class. By default there are no probes with
            labels.
        score: Which score decides what ``best.safetensors`` keeps: ``pck``, correspondence between a photo and a warped
            copy of it; ``pck_colour``, the same with changed colours; or, with labels, ``neighbors``, nearest
            neighbours, or ``linear``, a linear layer on top.

    Raises:
        ValueError: If a number is negative, or the score needs labels that are not there.
    """
    for name, value in (("images", images), ("every_n_steps", every_n_steps)):
        if value is not None and value < 0:
            raise ValueError(f"probe.{name}: expected at least 0, got {value}")
    if score in ("neighbors", "linear") and labels is None:
        raise ValueError(f"probe.score: {score} needs probe.labels, a folder of labelled images, got none")
    if photos is None:
        data.source.hold_out(images)
    return DenseProbe(data, form, out, every_n_steps, photos, labels, score)


class DenseProbe(Callback):
    """Scores the backbone at the start, every n steps and at the end, and keeps the best.

    The values are those of ``densessl.evaluation``, called by ``scores``. The training is the same, bit for bit on the
    CPU, with and without it. Readings go to all loggers at the step that they follow, and into checkpoints, so that a
    continued run compares itself with its own start.

    Args:
        data: The data of the run.
        form: How images go into the network.
        out: Folder of the run; ``best.safetensors`` is written there.
        every_n_steps: As of ``dense_probe``.
        photos: As of ``dense_probe``.
        labels: As of ``dense_probe``.
        score: As of ``dense_probe``.

    Attributes:
        readings: A row for each reading: its step and its scores by name.
        sample: The photos, uint8 ``(C, size, size)``, from the start of the run on.
        labelled: The labelled images, from the start of the run on; None: there are none.
        seconds: Time that all readings took.
    """

    def __init__(
        self,
        data: PhotoViews,
        form: Form,
        out: str,
        every_n_steps: int | None = None,
        photos: str | None = None,
        labels: str | None = None,
        score: str = "pck",
    ) -> None:
        self.data, self.form, self.out = data, form, Path(out)
        self.every_n_steps, self.photos, self.labels, self.score = every_n_steps, photos, labels, score
        self.readings: list[dict[str, float]] = []
        self.sample: list[Tensor] = []
        self.seconds, self.warned = 0.0, False
        self.labelled: Labels | None = None

    @property
    def is_on(self) -> bool:
        """Whether there is something to score on, and a step at which to do it."""
        return self.every_n_steps != 0 and bool(self.sample or self.labelled)

    @property
    def noise(self) -> dict[str, float]:
        """Up to how large a change of each score counts as none, by the number of images that it is of."""
        return noise_of(len(self.sample), len(self.labelled.test) if self.labelled else 0)

    def state_dict(self) -> dict[str, Any]:
        return {"readings": self.readings, "seconds": self.seconds, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.readings, self.seconds, self.warned = state["readings"], state["seconds"], state["warned"]

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Reads the sample, once; the spacing follows from the run's length."""
        if not trainer.is_global_zero or self.sample or self.labelled:
            return
        paths = self.data.source.held_out() if self.photos is None else find_photos(self.photos, "probe.photos")
        if self.photos is not None:
            masks = mask_warning(paths, "probe.photos")
            if masks is not None:
                log.warning("%s", masks)
            paths = [paths[i] for i in evenly(len(paths), HELD_OUT)]
        if self.labels is not None:
            self.labelled = read_labels(self.labels, self.form.channels, self.form.size)
        self.sample = read_squares(paths, self.form.channels, self.form.size)
        if not self.sample and self.labelled is not None and self.score.startswith("pck"):
            self.score = "neighbors"  # correspondence needs photos
        if self.every_n_steps is None:
            self.every_n_steps = max(LEAST, steps_of(trainer) // READINGS)
        if not self.sample and self.labelled is None:
            log.warning(
                "probe: off, no image was kept out of the training: shards, and folders of fewer than 100 images, give "
                "none by themselves. --probe.photos names a folder of other photos, --probe.images a number to keep out"
            )

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        if is_sharded(module) and self.every_n_steps != 0:
            self.every_n_steps = 0
            if trainer.is_global_zero:
                log.warning("probe: off, because the first process alone cannot run a backbone that is sharded")
        if not self.readings:
            self._read(trainer, module, settled(backbone_of(module.method), self.sample, self.form))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._read(trainer, module, backbone_of(module.method))
        for name, value in self.latest.items():  # in every step, because the bar forgets at an epoch's end
            module.log(f"probe/{name}", value, prog_bar=True, logger=False, rank_zero_only=True)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._read(trainer, module, backbone_of(module.method))

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        # Who waits for a run to end does not wait for a slow reading; a cluster kills what does not end soon.
        if stopped_by(exception) and self.readings and self.seconds < QUICK * len(self.readings):
            self._read(trainer, module, backbone_of(module.method))

    @property
    def latest(self) -> dict[str, float]:
        """The scores of the last reading."""
        return {name: self.readings[-1][name] for name in SCORES if self.readings and name in self.readings[-1]}

    def _read(self, trainer: pl.Trainer, module: Any, backbone: nn.Module) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or not self.is_on or (self.readings and self.readings[-1]["step"] == step):
            return
        begun = time.perf_counter()
        with frozen(backbone, self.form) as features:
            found = scores(features, self.sample, self.labelled)
            pictures = features(torch.stack(self.sample[:SHOWN])).cpu() if self.sample else None
        self.readings.append({"step": step, **found})
        for logger in trainer.loggers:
            logger.log_metrics({f"probe/{name}": value for name, value in found.items()}, step)
            if isinstance(logger, TensorBoardLogger) and pictures is not None:
                self._show(logger, pictures, step)
        if found[self.score] > max((row[self.score] for row in self.readings[:-1]), default=-1.0):
            self._keep(backbone)
        self._judge()
        self.seconds += time.perf_counter() - begun

    def _show(self, logger: TensorBoardLogger, maps: Tensor, step: int) -> None:
        size = max(128, maps.shape[-1])
        photos = torch.nn.functional.interpolate(in_colour(torch.stack(self.sample[:SHOWN])), (size, size))
        colours = enlarged(pca_colours(maps)[0], size)
        logger.experiment.add_image("probe/pca", torch.cat([strip(list(photos)), strip(list(colours))], 1), step)

    def _keep(self, backbone: nn.Module) -> None:
        """Writes best.safetensors, under the names that encoder.safetensors has."""
        weights = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
        with written_beside(self.out / "best.safetensors") as part:
            part.write_bytes(save(weights))  # save_file makes files that others cannot read

    def _judge(self) -> None:
        """Says once, in words, that the run makes the backbone worse than it was.

        Where another score rose, the fall is told without a verdict and without advice.
        """
        values = [row[self.score] for row in self.readings]
        if self.warned or len(values) < 4 or max(values[-3:]) >= values[0] - self.noise[self.score]:
            return
        self.warned = True
        best = max(self.readings, key=lambda row: row[self.score])
        rose, _ = changes(self.readings[0], self.readings[-1], self.noise)
        last = ", ".join(f"{value:.3f}" for value in values[-3:])
        text = f"probe: {self.score} was {last} in the last three readings, below the {values[0]:.3f} that the run "
        if rose:
            text += (
                f"started with, while {told(rose, 'rose')}. best.safetensors goes by {self.score} alone, and holds the "
                f"best so far, of step {best['step']}."
            )
        else:
            text += (
                "started with: the training makes this backbone worse on these images. best.safetensors holds the best "
                f"so far, of step {best['step']}. Lower the learning rate (optimizer.lr_*), and look at the views "
                "(preview). If the run goes on from pretrained weights by another recipe than adapt.py, use adapt.py: "
                "it freezes batch norm's statistics and anchors the backbone to its start."
            )
        log.warning("%s", text)
