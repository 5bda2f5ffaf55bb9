"""What a run shows while it trains: one bar over all its steps, or lines where the output is no terminal."""

from __future__ import annotations

import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from examples.pretrain.common.training import steps_of

LEAST_BAR, LONGEST_BAR = 6, 40  # columns; with less room than the first the bar itself is left out
ROWS = 20  # of the terminal. A bar is not shown where tqdm is told of none, as some containers do.
FIRST = 5  # values that go before the bar itself: loss, images/s, std, the first of the probe, rate
SHOWN_ELSEWHERE = ("loss", "speed/images_per_s")


class RunBar(ProgressBar):
    """One bar over the whole run: steps, time left, images/s, loss, rate, std, and what else asks to be shown.

    Values are read in logged steps only, because reading one back stalls the GPU. Where the output is no terminal, as
    in the log of a cluster, a line comes at most every ``seconds`` instead.

    Args:
        file: Where to write; None: standard error.
        seconds: Least time between two lines where there is no terminal.
        scores: Gives the newest scores by name. It is asked when the run ends, because scores that are read after the
            last step cannot be logged any more.
    """

    def __init__(
        self, file: TextIO | None = None, seconds: float = 60, scores: Callable[[], dict[str, float]] = dict
    ) -> None:
        super().__init__()
        self.file, self.seconds, self.scores = file or sys.stderr, seconds, scores
        self.values: dict[str, float] = {}
        self.began: float | None = None  # the first step
        self.bar: tqdm | None = None
        self.enabled = True

    def disable(self) -> None:
        """Lightning calls this in all processes but the first."""
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        tqdm.write(sep.join(map(str, args)), file=self.file)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.begun_at, self.began = trainer.global_step, None
        self.shown_at, self.step, self.per_step = -float("inf"), self.begun_at, 0.0
        self.total = steps_of(trainer)
        self.images = trainer.datamodule.batch_size * trainer.accumulate_grad_batches
        if self.enabled and self.file.isatty():
            self.bar = tqdm(
                total=self.total, initial=self.begun_at, file=self.file, bar_format="{desc}", leave=True, nrows=ROWS
            )

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.began is None:  # not before: the probe's first reading is no part of a step
            self.began = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.enabled or trainer.global_step == self.step:
            return  # between two steps, where gradients are accumulated
        self.step = trainer.global_step
        self.per_step = (time.monotonic() - self.began) / (self.step - self.begun_at)
        if self.step % trainer.log_every_n_steps == 0:
            self._read(trainer)
        self._show(every=0.2 if self.bar is not None else self.seconds)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._finish()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self._finish()

    def _finish(self) -> None:
        if self.enabled and self.values is not None and hasattr(self, "total"):
            self.values |= self.scores()
            self._show(every=0)
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.enabled = False

    def _read(self, trainer: pl.Trainer) -> None:
        shown = trainer.progress_bar_metrics
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        std = trainer.callback_metrics.get("health/std_times_sqrt_c")
        self.values = {"loss": float(shown["loss"])}
        if std is not None:
            self.values["std"] = float(std)
        asked_for = [(name.rpartition("/")[2], float(shown[name])) for name in shown if name not in SHOWN_ELSEWHERE]
        # The probe's first score before the rate: on a narrow terminal the last parts have no room.
        self.values |= dict(asked_for[:1]) | {"lr": rate} | dict(asked_for[1:])

    def _show(self, every: float) -> None:
        now = time.monotonic()
        if now - self.shown_at < every:
            return
        self.shown_at = now
        if self.bar is None:
            print(self.line(200), file=self.file, flush=True)
        else:
            columns = shutil.get_terminal_size().columns - 1  # asked each time: a window changes its size
            self.bar.n, self.bar.ncols = self.step, columns
            self.bar.set_description_str(self.line(columns))

    def line(self, columns: int) -> str:
        """The state of the run in one line: as many parts, the most important first, as there is room for."""
        left = (self.total - self.step) * self.per_step
        text = f"{self.step / self.total:4.0%}  {self.step}/{self.total}  {clock(left)} left"
        parts = [f"{name} {value:.3g}" for name, value in self.values.items()]
        if self.per_step:
            parts.insert(1 if "loss" in self.values else 0, f"{self.images / self.per_step:.3g} img/s")
        for number, part in enumerate(parts):
            kept = LEAST_BAR + 2 if self.bar is not None and number >= FIRST else 0
            if len(text) + 2 + len(part) <= columns - kept:
                text += f"  {part}"
        room = min(columns - len(text) - 2, LONGEST_BAR)
        if self.bar is None or room < LEAST_BAR:
            return text[:columns]
        full = round(room * self.step / self.total)
        return f"{'█' * full}{'░' * (room - full)}  {text}"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss``, ``h:mm:ss`` or ``d days h:mm``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


class _AboveTheBar(logging.Handler):
    """Log lines above the bar instead of in it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a message is more than Lightning's remarks on what it has found and done."""
    return record.levelno > logging.INFO or "lightning" not in Path(record.pathname).as_posix()


NOISE = (
    r".*does not have many workers",
    r"The number of training batches .* is smaller than the logging interval",
    r"Checkpoint directory .* exists and is not empty",
    r"Experiment logs directory .* exists and is not empty",
    r"The dirpath has changed from",
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
    r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`",  # of a first step that overflowed in fp16
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"You're resuming from a checkpoint that ended",
    r"Found \d+ module\(s\) in eval mode",  # batch norm with frozen statistics, the anchor's copy of the start
    r"Current step number \d+ exceeds max_steps",  # of the schedule that an extension replaces
)


def speak_plainly() -> None:
    """Log lines without prefix, above the bar; nothing of what the packages below say to their own developers."""
    handler = _AboveTheBar()
    handler.addFilter(_is_ours)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    hub = logging.getLogger("huggingface_hub")  # says every retry, twice; the error in the end is ours
    hub.handlers.clear()
    hub.setLevel(logging.ERROR)
    # Of packages below, about each other's next versions; and Lightning's advice on settings that are meant.
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
