"""What is done to a run, and when."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.torturing.runs import Running
from benchmarks.torturing.settings import BATCH, PHOTOS, Setting

PER_EPOCH = PHOTOS // BATCH
GRACEFUL = ("term_one", "term_all", "term_group", "ctrl_c")


class Moment(NamedTuple):
    """A blow falls so many seconds after an event of the run; ``("batch", -1)`` is the start of its processes."""

    event: str
    number: int
    seconds: float


class Told(NamedTuple):
    """How far a run was, by its own words, when the blow fell."""

    step: int
    saved: int
    ended: bool


def at_any_time(setting: Setting, draw: random.Random) -> Moment:
    """Anywhere from the start of the processes to the end of the run."""
    number = draw.randrange(-2, setting.batches)
    return Moment("start" if number < 0 else "batch", max(number, 0), draw.uniform(0, 1.0 if number < 0 else 0.15))


def at_an_epochs_end(setting: Setting, draw: random.Random) -> Moment:
    """In the last batch of an epoch, or shortly after it, where the epoch's checkpoint is written."""
    return Moment("batch", PER_EPOCH - 1, draw.uniform(0, 0.2))


def in_a_window(setting: Setting, draw: random.Random) -> Moment:
    """In a batch that is not the last of its window of accumulated gradients."""
    inside = [n for n in range(setting.batches) if (n % PER_EPOCH + 1) % setting.accumulate or setting.accumulate == 1]
    return Moment("batch", draw.choice(inside), draw.uniform(0, 0.05))


def while_saving(setting: Setting, draw: random.Random) -> Moment:
    """While a checkpoint is written."""
    return Moment("saving", draw.randrange(setting.steps // 2), draw.uniform(0, 0.03))


def wait_for(run: Running, moment: Moment) -> Told:
    """Waits for the moment, or for the end of the run."""
    step, saved, savings, ended = 0, 0, 0, False
    due = time.monotonic() + moment.seconds if moment.event == "start" else None
    while due is None or time.monotonic() < due:
        events = run.events(0.05 if due is None else max(0.0, due - time.monotonic()))
        if events is None:
            ended = True
            break
        for event, number in events:
            step = number if event in ("step", "started") else step
            saved = number if event == "saved" else saved
            happened = event == moment.event and (savings if event == "saving" else number) == moment.number
            savings += event == "saving"
            if happened and due is None:
                due = time.monotonic() + moment.seconds
    return Told(step, saved, ended)


def kill_one(run: Running, draw: random.Random) -> None:
    """SIGKILL to one process: out of memory, or a node that is gone."""
    run.send(signal.SIGKILL, draw.randrange(len(run.pids)))


def kill_all(run: Running, draw: random.Random) -> None:
    """SIGKILL to all processes and their readers."""
    run.send_group(signal.SIGKILL)


def term_one(run: Running, draw: random.Random) -> None:
    """SIGTERM to one process."""
    run.send(signal.SIGTERM, draw.randrange(len(run.pids)))


def term_all(run: Running, draw: random.Random) -> None:
    """SIGTERM to all processes, up to 50 ms apart, in any order."""
    ranks = list(range(len(run.pids)))
    draw.shuffle(ranks)
    for rank in ranks:
        run.send(signal.SIGTERM, rank)
        time.sleep(draw.uniform(0, 0.05))


def term_group(run: Running, draw: random.Random) -> None:
    """SIGTERM to all processes and their readers, as Slurm sends it."""
    run.send_group(signal.SIGTERM)


def ctrl_c(run: Running, draw: random.Random) -> None:
    """SIGINT to all processes and their readers, as a terminal sends it."""
    run.send_group(signal.SIGINT)


def ctrl_c_twice(run: Running, draw: random.Random) -> None:
    """The same twice; where torchrun may repeat the first, more than a second later."""
    run.send_group(signal.SIGINT)
    time.sleep(draw.uniform(0, 0.3) + (1.0 if len(run.pids) > 1 else 0.0))
    run.send_group(signal.SIGINT)


Strike = Callable[[Running, random.Random], None]
When = Callable[[Setting, random.Random], Moment]
BLOWS: dict[str, tuple[Strike, When]] = {
    "SIGKILL to one process": (kill_one, at_any_time),
    "SIGKILL to all": (kill_all, at_any_time),
    "SIGTERM to one process": (term_one, at_any_time),
    "SIGTERM to all, 0 to 50 ms apart": (term_all, at_any_time),
    "SIGTERM to the group": (term_group, at_any_time),
    "Ctrl-C": (ctrl_c, at_any_time),
    "Ctrl-C twice": (ctrl_c_twice, at_any_time),
    "SIGKILL at an epoch's end": (kill_all, at_an_epochs_end),
    "SIGTERM at an epoch's end": (term_all, at_an_epochs_end),
    "SIGTERM in a window": (term_all, in_a_window),
    "SIGKILL in a window": (kill_all, in_a_window),
    "SIGKILL while saving": (kill_all, while_saving),
    "SIGTERM while saving": (term_all, while_saving),
}
FULL = "a full disk"


class SmallDisk:
    """A file system of 24 MB in memory, which can be filled up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        self.refused = done.stderr.strip() if done.returncode else ""

    def fill(self, free: int) -> None:
        """Leaves so many bytes."""
        with (self.folder / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(self.folder).free - free))

    def empty(self) -> None:
        """Makes room again."""
        (self.folder / "ballast").unlink(missing_ok=True)

    def remove(self) -> None:
        """Takes the file system away."""
        subprocess.run(["umount", str(self.folder)], check=False)
