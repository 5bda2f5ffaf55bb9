"""The command line of the transfer recipes: Lightning's, with a run folder and errors of one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger


class TransferCLI(LightningCLI):
    """``python RECIPE.py fit --config FILE.yaml --data.folder FOLDER --model.pretrained WEIGHTS --out FOLDER``."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--out", type=str, default="runs/transfer", help="run folder")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with a table of what is logged, in ``OUT/version_N/metrics.csv``, and ``OUT/last.ckpt``."""
        out = (self.config[self.subcommand] if self.subcommand else self.config)["out"]
        callbacks = [
            LearningRateMonitor("step"),
            ModelCheckpoint(Path(out), "last", enable_version_counter=False),
        ]
        # Each call gets a table of its own: evaluating must not delete the one of training.
        return super().instantiate_trainer(callbacks=callbacks, logger=CSVLogger(out, name=""), **kwargs)


def run(recipe: type[pl.LightningModule], data: type[pl.LightningDataModule]) -> None:
    """Runs a recipe from the command line; errors of the user's end it with one line."""
    logging.basicConfig(level=logging.INFO)
    try:
        TransferCLI(recipe, data, seed_everything_default=0, save_config_kwargs={"overwrite": True})
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
