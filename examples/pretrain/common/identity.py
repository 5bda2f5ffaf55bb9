"""What a run is: the options that its checkpoints carry, and that must stay while it is continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.callbacks import Callback

from examples.pretrain.common.checks import plain

KEY = "densessl_run"  # of the checkpoint
# What may be another when a run is continued: where it runs and what it says, not what it computes.
FREE = {
    *("config", "out", "overwrite", "ckpt_path", "extend_to", "save_every_n_epochs", "save_every_n_steps", "compile"),
    *("data.workers", "data.max_unreadable", "data.folder"),  # the folder is compared by its images
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.num_nodes", "trainer.deterministic"),
    *("trainer.benchmark", "trainer.detect_anomaly", "trainer.log_every_n_steps", "trainer.enable_progress_bar"),
    "trainer.enable_model_summary",
    *("probe.every_n_steps", "probe.photos", "probe.labels", "probe.score"),  # they only look; probe.images takes some
}
BUDGET = ("trainer.max_epochs", "trainer.max_steps")


def identity_of(method: str, config: Namespace) -> dict[str, Any]:
    """The options that make a run what it is, by their whole names, and its method.

    Args:
        method: Name of the method.
        config: All options.
    """
    options = {name: plain(value) for name, value in vars(config.as_flat()).items()}
    kept = {name: value for name, value in options.items() if name not in FREE}
    return {"method": method, **kept, **budget_of(kept, config.extend_to)}


def budget_of(options: dict[str, Any], extend_to: int | None = None) -> dict[str, Any]:
    """The budget, ``trainer.max_epochs`` and ``trainer.max_steps``, with an extension put in.

    Raises:
        ValueError: If the run has both budgets, so that an extension could mean either.
    """
    budget = {name: options[name] for name in BUDGET}
    if extend_to is not None:
        counted = [name for name in BUDGET if (budget[name] or -1) > 0]
        if len(counted) != 1:
            raise ValueError(f"extend_to: expected a run with one budget, got {' and '.join(counted)}")
        budget[counted[0]] = extend_to
    return budget


def read_identity(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run, and its number of optimiser steps, ``step``.

    Raises:
        ValueError: If the file is damaged, or no checkpoint of these recipes.
    """
    try:
        read = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler raises whatever it meets
        what = f"which is none or is damaged ({type(error).__name__})"
        raise ValueError(f"ckpt_path: expected a checkpoint of a run, got {path}, {what}") from error
    if not isinstance(read, dict) or KEY not in read:
        raise ValueError(
            f"ckpt_path: expected a checkpoint of a run of these recipes, got {path}, which holds no settings of one; "
            f"its backbone may be read with --backbone.init {path}"
        )
    return {**read[KEY], "step": read["global_step"]}


def check_same(found: dict[str, Any], identity: dict[str, Any], extend_to: int | None, path: Path) -> None:
    """Compares a checkpoint's run with the one that is asked for.

    An option that one of the two does not know, because it is of another version, is passed over.

    Args:
        found: The identity in the checkpoint.
        identity: The identity by the options.
        extend_to: The longer budget that is asked for, if any.
        path: The checkpoint.

    Raises:
        ValueError: At the first difference, with the option's name, both values and the way out.
    """
    for name in sorted(found.keys() & identity.keys(), key=lambda name: (name != "method", name)):
        was, now = found[name], identity[name]
        if was == now:
            continue
        if name in BUDGET:
            if extend_to == now and (was or -1) > 0:
                if now > was:
                    continue
                raise ValueError(f"extend_to: expected more than the {name}={was} of the run in {path}, got {now}")
            way = f"to train longer, continue with --{name} {was} and add --extend_to N"
        elif name == "method":
            way = f"begin a run from its backbone: --backbone.init {path}, without --ckpt_path, in another --out"
        else:
            way = (
                f"continue with --{name} {was}, or begin a run from its backbone: --backbone.init {path}, without "
                "--ckpt_path, in another --out"
            )
        raise ValueError(f"{name}: the run in {path} has {was}, got {now}; {way}")


class Identity(Callback):
    """Puts the run's identity into every checkpoint, and compares the images with those of the checkpoint.

    Args:
        identity: The options that make the run what it is.
        folder: Name of the source, for errors.
        found: The identity in the checkpoint that is continued; None where the run begins.
    """

    def __init__(self, identity: dict[str, Any], folder: str, found: dict[str, Any] | None = None) -> None:
        self.identity, self.folder, self.found = identity, folder, found

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Counts the images: a folder is listed here, once."""
        data = trainer.datamodule
        images = data.source.count(trainer.world_size, data.workers)
        tell = getattr(data.source, "fingerprint", str)  # a source of one's own may know the number of its images only
        self.identity.update({"images": images, "fingerprint": tell(), "folder": self.folder})
        if self.found is None or "fingerprint" not in self.found:
            return
        was = self.found
        if (was["images"], was["fingerprint"]) != (images, self.identity["fingerprint"]):
            others = "other images" if was["images"] == images else f"{images} images"
            raise ValueError(
                f"data.folder: the run that is continued reads {was['images']} images of {was['folder']}, got {others} "
                f"of {self.folder}; continue with that folder as it was, or begin a run with --backbone.init, without "
                "--ckpt_path, in another --out"
            )

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.identity
