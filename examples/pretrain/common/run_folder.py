"""The folder of a run: where a new one goes, what is continued, and that no other run is lost."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only

from examples.pretrain.common.checkpoint_files import remove_parts
from examples.pretrain.common.training import steps_of

log = logging.getLogger(__name__)

SETTINGS = "config.yaml"  # the first file that a run writes
# What a run leaves behind, and --overwrite takes away. Other files of the folder stay.
LEFT_BEHIND = (
    *(SETTINGS, "checkpoints/*.ckpt", "*.safetensors", "metrics*.csv", "events.out.tfevents.*", "hparams.yaml"),
    *("report.html", "report.md", "report/*.png"),
)


class Settings(Callback):
    """Writes all options beside the run, as a file that ``--config`` takes.

    Only when every process of the run has begun: before that, another process may still look whether the folder is
    free.

    Args:
        out: Folder of the run.
        text: The options as YAML.
        name: What a user calls the run.
    """

    def __init__(self, out: str, text: str, name: str) -> None:
        self.out, self.text, self.name = out, text, name

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        if trainer.is_global_zero:
            remove_parts(Path(self.out))
            part = Path(self.out, f"{SETTINGS}.part")
            part.write_text(self.text)
            part.replace(part.with_suffix(""))

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Says what is trained on what, and how long."""
        steps, data = steps_of(trainer), trainer.datamodule
        at = f", from step {trainer.global_step} on" if trainer.global_step else ""
        rank_zero_info(
            f"{self.name} on {data.source.folder}: {steps} steps{at}, {data.batches_per_epoch()} batches of "
            f"{data.batch_size} images an epoch; all goes to {self.out}"
        )

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        rank_zero_info(f"{trainer.global_step} steps done; the backbone is {Path(self.out, 'encoder.safetensors')}")


def last_checkpoint(out: str | Path) -> Path:
    """Where a run keeps the checkpoint that it is continued from."""
    return Path(out, "checkpoints", "last.ckpt")


def checkpoint_of(ckpt_path: str | None, out: str | None, name: str) -> Path | None:
    """The checkpoint that ``--ckpt_path`` means; None: the run begins.

    Args:
        ckpt_path: ``last``, ``auto``, a file, or None.
        out: Folder of the run; None where none is named.
        name: Name of the method.

    Raises:
        ValueError: If there is no such checkpoint, or no folder to look for it.
    """
    if ckpt_path is None:
        return None
    if ckpt_path in ("last", "auto"):
        if out is None:
            newest = max(Path("runs").glob(f"{name}-*/checkpoints/last.ckpt"), key=os.path.getmtime, default=None)
            hint = "none is in runs/" if newest is None else f"the newest is --out {newest.parents[1]}"
            raise ValueError(
                f"out: expected the folder of the run that --ckpt_path {ckpt_path} means, got none; {hint}"
            )
        path = last_checkpoint(out)
        if ckpt_path == "auto" and not path.is_file():
            return None
        hint = "without --ckpt_path a run begins"
    else:
        path, hint = Path(ckpt_path), "last is that of the run in --out"
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(f"ckpt_path: expected a checkpoint to continue from, got {path}: {what}; {hint}")
    return path


def check_place(out: str | None, start: Path | None, ckpt_path: str | None, overwrite: bool) -> None:
    """Refuses a folder that holds a run already, other than the one that is continued.

    Args:
        out: Folder of the run; None: a new one.
        start: The checkpoint that is continued, if any.
        ckpt_path: How it was asked for.
        overwrite: Whether the run that the folder holds is to be deleted.

    Raises:
        ValueError: If the folder holds another run, which the message tells three ways out of; or if the run that is
            continued would be deleted.
    """
    if out is None:
        return
    if not out:
        raise ValueError("out: expected the name of a folder, got none")
    own = start is not None and start.resolve().is_relative_to(Path(out).resolve())
    if overwrite and own:
        raise ValueError(
            f"overwrite: expected a run to begin, got --ckpt_path {start}, of the run that it would delete"
        )
    holds = Path(out, SETTINGS).exists() or last_checkpoint(out).exists()
    if holds and not (own or overwrite or ckpt_path == "auto"):
        last = "" if last_checkpoint(out).exists() else " (it has no checkpoint yet)"
        raise ValueError(
            f"out: {out} holds a run: continue it with --ckpt_path last{last}, name another folder with --out, or "
            "delete that run with --overwrite"
        )


def prepare(out: str) -> None:
    """Makes the folder, and tries to write to it.

    Raises:
        ValueError: If it cannot be written to.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        trial = Path(out, f".writable-{os.getpid()}")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be written to, got {out}: {error.strerror}") from error


def new_folder(name: str) -> str:
    """The first free folder ``runs/NAME-NUMBER``, made.

    Raises:
        ValueError: If it cannot be made, or if a launcher has started several processes: each would take its own.
    """
    if max(int(os.environ.get(count, 1)) for count in ("WORLD_SIZE", "SLURM_NTASKS")) > 1:
        raise ValueError(f"out: expected the folder that all processes share, as --out runs/{name}, got none")
    number = 1
    while True:
        folder = Path("runs", f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ValueError(
                f"out: expected a place for {folder}, got {error.strerror}; name another: --out"
            ) from error
        else:
            return str(folder)


@contextmanager
def watched(out: str) -> Iterator[None]:
    """Says of the folder that it is gone or has become read-only, where that has ended a run."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if os.access(out, os.W_OK):
            raise
        raise ValueError(f"out: the folder of the run, {out}, can no longer be written to: {error}") from error


@contextmanager
def freed(out: str, start: str | None, trainer: pl.Trainer) -> Iterator[None]:
    """Leaves the folder free for the next attempt, where the options of a run end it before its first step.

    Args:
        out: Folder of the run.
        start: The checkpoint that is continued; None: the run begins.
        trainer: What runs it.
    """
    try:
        yield
    except ValueError:
        if start is None and trainer.global_step == 0:
            remove_run(out)
        raise


@rank_zero_only
def clear(out: str) -> None:
    """Deletes what a run has left behind in the folder, for ``--overwrite``."""
    gone = remove_run(out)
    if gone:
        log.info("--overwrite: deleted %d files of the run that %s held", gone, out)


@rank_zero_only
def remove_run(out: str) -> int:
    """Deletes what a run has left behind in the folder; gives the number of files."""
    gone = [path for pattern in LEFT_BEHIND for path in Path(out).glob(pattern)]
    for path in gone:
        path.unlink()
    return len(gone)
