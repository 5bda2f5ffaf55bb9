"""Fine-tunes FCOS on boxes with examples/transfer/detection.py, and gives its AP as it goes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from examples.transfer.common.command import TransferCLI
from examples.transfer.datasets.boxes import Boxes
from examples.transfer.detection import FIGURES, Detection

CONFIG = Path(__file__).parents[2] / "examples" / "transfer" / "configs" / "cards_fcos_r18.yaml"
DROPS = (0.8, 0.95)  # shares of the run after which the rate falls to a tenth, as in the configuration


class BoxSet(NamedTuple):
    """How a labelled set is looked at.

    Attributes:
        classes: Number of classes.
        sizes: Lengths of the shorter side in training; the last is the test's.
        max_size: Greatest length of the longer side in pixels.
    """

    classes: int
    sizes: tuple[int, ...]
    max_size: int


SETS = {"cards": BoxSet(6, (112, 128), 176), "nuclei": BoxSet(1, (192,), 192)}


class Curve(Callback):
    """Keeps the figures of every evaluation, by the number of steps.

    Attributes:
        figures: AP, AP50 and AP75 of the boxes in percent, by name, for each number of steps.
    """

    def __init__(self) -> None:
        self.figures: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the figures from what Detection logged."""
        self.figures[trainer.global_step] = {n: float(trainer.callback_metrics[f"val/box_{n}"]) for n in FIGURES}


def recipe(of_set: str, folder: str, encoder: str, seed: int, steps: int, every: int, out: str) -> TransferCLI:
    """The recipe with the configuration's own rate, on a set and from the weights of a file.

    Args:
        of_set: Name of the set in SETS.
        folder: Its folder, with ``images/SPLIT`` and ``annotations/SPLIT.json``.
        encoder: File of the weights of a backbone, with or without those of FPN and towers.
        seed: Seed of the new layers, of the order of the images and of their flips.
        steps: Number of optimiser steps.
        every: Number of steps between evaluations.
        out: Folder of Lightning's logs.
    """
    how = SETS[of_set]
    options = {
        "config": str(CONFIG),
        "seed_everything": seed,
        "data.folder": folder,
        "model.classes": how.classes,
        "model.sizes": list(how.sizes),
        "model.max_size": how.max_size,
        "model.pretrained": encoder,
        "model.drops": [round(share * steps) for share in DROPS],
        "trainer.max_epochs": -1,
        "trainer.max_steps": steps,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.val_check_interval": every,
        "trainer.num_sanity_val_steps": 0,
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
        "out": out,
    }
    made = TransferCLI(
        Detection, Boxes, args=[f"--{name}={value}" for name, value in options.items()], run=False,
        save_config_callback=None,
    )  # fmt: skip
    made.trainer.callbacks = [part for part in made.trainer.callbacks if not isinstance(part, ModelCheckpoint)]
    return made


def fine_tuned_ap(
    of_set: str, folder: str, encoder: str, seed: int, steps: int, every: int
) -> dict[int, dict[str, float]]:
    """AP, AP50 and AP75 in percent after every so many steps; arguments as of ``recipe``."""
    curve = Curve()
    with tempfile.TemporaryDirectory() as out:
        made = recipe(of_set, folder, encoder, seed, steps, every, out)
        made.trainer.callbacks.append(curve)
        pl.seed_everything(seed, verbose=False)  # the making drew numbers that hang on the file
        made.trainer.fit(made.model, made.datamodule)
    return curve.figures
