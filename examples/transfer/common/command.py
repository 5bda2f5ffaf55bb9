"""The command line of the transfer recipes: Lightning's, with a run folder and errors of one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from examples.pretrain.common.bar import speak_plainly
from examples.pretrain.common.checkpoint_files import WholeFiles
from examples.pretrain.common.processes import ending_together

log = logging.getLogger(__name__)


class TransferCLI(LightningCLI):
    """``python RECIPE.py fit --config FILE.yaml --data.folder FOLDER --model.pretrained WEIGHTS --out FOLDER``."""

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--out", type=str, default="runs/transfer", help="Folder of the checkpoint and the scores.")
        parser.set_defaults({"trainer.enable_model_summary": False})

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with a table of what is logged, in ``OUT/version_N/metrics.csv``, and ``OUT/last.ckpt``."""
        out = (self.config[self.subcommand] if self.subcommand else self.config)["out"]
        callbacks = [
            LearningRateMonitor("step"),
            ModelCheckpoint(Path(out), "last", enable_version_counter=False),
        ]
        # Each call gets a table of its own: evaluating must not delete the one of training.
        logger = CSVLogger(out, name="")
        return super().instantiate_trainer(callbacks=callbacks, logger=logger, plugins=[WholeFiles()], **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Compares the model's options with those of the checkpoint, by which Lightning would silently replace them.

        The checkpoint brings all weights, so that ``model.pretrained`` is not read again: its file may be gone.

        Raises:
            ValueError: If there is no such checkpoint, or if training is continued with another option.
        """
        self.pretrained: str | None = None
        config = self.config.get(self.config.get("subcommand") or "")
        path = config and config.get("ckpt_path")
        if not path:
            return
        for name, was in options_of(path).items():
            now = config.model.get(name)
            if name == "pretrained" or now is None or plain(was) == plain(now):
                continue
            if self.config.subcommand == "fit":
                raise ValueError(
                    f"model.{name}: the model in {path} has {plain(was)}, got {plain(now)}; continue with "
                    f"--model.{name} {plain(was)}, or train anew without --ckpt_path"
                )
            log.info("model.%s: %s as in %s; the %s of the command line is not used", name, was, path, now)
            config.model[name] = was
        self.pretrained, config.model.pretrained = config.model.pretrained, "none"

    def before_instantiate_classes(self) -> None:
        """Looks for the folder of the data before the model reads or downloads its weights.

        Raises:
            ValueError: If there is no such folder.
        """
        if self.subcommand is None:  # nothing will run
            return
        folder = self.config[self.subcommand].data.folder
        if not Path(folder).is_dir():
            raise ValueError(f"data.folder: expected a folder, got {folder}: there is no such folder")

    def after_instantiate_classes(self) -> None:
        """Keeps the origin of the weights for the next checkpoint."""
        if self.pretrained is not None:
            self.model.hparams.pretrained = self.pretrained

    def after_fit(self) -> None:
        """Says what came out, and where the model is."""
        values = self.trainer.callback_metrics
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name.startswith("val/"))
        log.info("%d steps done; %s", self.trainer.global_step, figures or "not evaluated yet")
        config = self.config[self.subcommand] if self.subcommand else self.config
        log.info("the model is %s", Path(config["out"], "last.ckpt"))


def options_of(path: str) -> dict[str, Any]:
    """The model's options in a checkpoint of a transfer recipe.

    Raises:
        ValueError: If the file is missing, damaged, or of something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"ckpt_path: expected a checkpoint of this recipe, got {path}: there is no such file")
    try:
        options = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["hyper_parameters"]
    except Exception as error:  # the unpickler raises whatever it meets
        raise ValueError(
            f"ckpt_path: expected a checkpoint of this recipe, got {path}, which is none or is damaged "
            f"({type(error).__name__}); weights to begin from are model.pretrained"
        ) from error
    return {name: value for name, value in options.items() if name[0] != "_"}


def plain(value: Any) -> Any:
    """A value as it compares and reads: lists for tuples."""
    return list(value) if isinstance(value, tuple) else value


def run(recipe: type[pl.LightningModule], data: type[pl.LightningDataModule]) -> None:
    """Runs a recipe from the command line; errors of the user's end it with one line."""
    speak_plainly()
    try:
        with ending_together():
            made = TransferCLI(
                recipe,
                data,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"allow_abbrev": False},
            )
            log.info("scores: %s", Path(made.trainer.log_dir, "metrics.csv"))  # which the processes tell each other
    except (ValueError, RuntimeError, OSError, MisconfigurationException) as error:
        raise SystemExit(f"error: {error}") from error
