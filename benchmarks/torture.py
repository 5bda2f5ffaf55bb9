"""Kills runs in all ways and at all times, lets each go on to its end, and compares that bit by bit.

    python benchmarks/torture.py --kills 200 --seed 0

Each kill takes one setting of the grid (processes, folder or shards, workers, accumulation; method and colours take
turns), one way to be killed, and a moment. The run goes on with ``--ckpt_path auto`` to its end. Then everything in its
last checkpoint must equal, to the last bit, that of a run of the same setting that nobody disturbed. Every second run
folder is on another file system, /dev/shm. A number of a kill and a seed say all about it; ``--first 17 --kills 1``
repeats kill 17. With ``--rows FILE`` a series that was itself broken off goes on, and its table is over all rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.torturing.blows import BLOWS, FULL, GRACEFUL, SmallDisk, Told, at_any_time, wait_for
from benchmarks.torturing.nodes import end_of
from benchmarks.torturing.runs import Running, preload
from benchmarks.torturing.settings import Setting, grid, write_photos

SECONDS_TO_END = 30  # of a run after its blow; longer is a hang
SECONDS_OF_A_RUN = 300
ENDS = {
    0,
    128 + signal.SIGINT,
    128 + signal.SIGTERM,
    -signal.SIGALRM,
}  # of a run that was asked to end while it trained
# Not compared: paths, and what a checkpoint says about the moment of its writing.
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "PhotoViews")


class Outcome(NamedTuple):
    """What became of a kill; words where it went wrong."""

    hang: str = ""
    lost: str = ""
    differs: str = ""
    skipped: str = ""


class Torture:
    """Makes kills, and keeps the ends of undisturbed runs.

    Args:
        folder: Scratch folder.
        elsewhere: Scratch folder on another file system.
        processes: Largest number of processes of a run.
    """

    def __init__(self, folder: Path, elsewhere: Path, processes: int) -> None:
        self.folder, self.elsewhere, self.photos = folder, elsewhere, folder / "photos"
        self.grid = [setting for setting in grid() if setting.processes <= processes]
        self.ends: dict[Setting, dict[str, Any]] = {}
        write_photos(self.photos)

    def undisturbed(self, setting: Setting) -> dict[str, Any]:
        """The last checkpoint of a run that nobody disturbs."""
        setting = setting.plain()
        if setting not in self.ends:
            out = self.folder / f"undisturbed-{len(self.ends)}"
            self._to_its_end(setting, out)
            self.ends[setting] = torch.load(last_of(out), weights_only=False)
            shutil.rmtree(out)
        return self.ends[setting]

    def kill(self, number: int, seed: int, kind: str) -> Outcome:
        """One kill, and what became of it."""
        draw = random.Random(f"{seed}/{number}")
        (setting,) = draw.choices(self.grid, [1 / each.processes for each in self.grid])  # as much time for each number
        expected = self.undisturbed(setting)
        out = (self.elsewhere if number % 2 else self.folder) / f"run-{number}"
        disk = SmallDisk(out) if kind == FULL else None
        try:
            if disk is not None and disk.refused:
                return Outcome(skipped=f"a file system may not be mounted here ({disk.refused})")
            run = self._start(setting, out)
            if disk is None:
                strike, when = BLOWS[kind]
                told = wait_for(run, when(setting, draw))
                strike(run, draw)
            else:
                told = wait_for(run, at_any_time(setting, draw))
                disk.fill(draw.choice((0, 100_000, 1_000_000)))
            in_time = run.wait(SECONDS_TO_END)
            hang = "" if in_time else f"not ended {SECONDS_TO_END} s after the blow at step {told.step}"
            if disk is not None:
                disk.empty()
            graceful = disk is None and strike.__name__ in GRACEFUL and not told.ended
            lost = self._lost(out, told, graceful)
            if graceful and 0 < told.step < setting.steps and not ENDS.issuperset(run.codes.values()):
                lost = lost or f"exit codes {list(run.codes.values())}"
            self._to_its_end(setting, out)
            differs = difference(torch.load(last_of(out), weights_only=False), expected)
            parts = [path.name for path in out.rglob("*.part")]
            return Outcome(hang, lost, differs or (f"left behind: {parts}" if parts else ""))
        except RuntimeError as error:
            return Outcome(differs=str(error))
        finally:
            if disk is not None and not disk.refused:
                disk.remove()
            shutil.rmtree(out, ignore_errors=True)

    def _lost(self, out: Path, told: Told, graceful: bool) -> str:
        """In words, where the checkpoint that must be there is not."""
        least = told.step if graceful else told.saved
        if not last_of(out).exists():
            return f"no last.ckpt, though step {least} was made" if least else ""
        try:
            step = torch.load(last_of(out), weights_only=False)["global_step"]
        except Exception as error:
            return f"last.ckpt cannot be read: {error}"
        return f"last.ckpt is of step {step}, expected at least {least}" if step < least else ""

    def _start(self, setting: Setting, out: Path) -> Running:
        out.mkdir(parents=True, exist_ok=True)
        arguments = setting.arguments(self.photos, out)
        return Running(setting.method, arguments, setting.processes, self.folder / f"{out.name}.log")

    def _to_its_end(self, setting: Setting, out: Path) -> None:
        run = self._start(setting, out)
        if not run.wait(SECONDS_OF_A_RUN):
            raise RuntimeError(f"does not end: {setting}")
        log = self.folder / f"{out.name}.log"
        if any(run.codes.values()) or not last_of(out).exists():
            raise RuntimeError(f"fails: {setting}, {list(run.codes.values())}: {log.read_text()[-3000:]}")


def last_of(out: Path) -> Path:
    """The checkpoint that a run goes on from."""
    return out / "checkpoints" / "last.ckpt"


def difference(one: Any, other: Any, name: str = "") -> str:
    """The first place where two checkpoints differ, or nothing."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return "" if same else f"{name} differs by up to {(one.double() - other.double()).abs().max():.3g}"
    if isinstance(one, dict):
        keys = COMPARED if not name else one.keys() | other.keys()
        return next((d for k in keys if (d := difference(one.get(k), other.get(k), f"{name}/{k}"))), "")
    if isinstance(one, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return next((d for n, pair in pairs if (d := difference(*pair, f"{name}/{n}"))), "")
    return "" if one == other else f"{name} is {one}, expected {other}"


def two_nodes(epochs: int = 12) -> None:
    """Compares a run on two nodes, of which one is killed and started again, with a run on one."""
    folder = Path(tempfile.mkdtemp())
    write_photos(folder / "photos")
    try:
        began = time.monotonic()
        ends = [end_of(folder / "photos", folder / str(killed), epochs, killed) for killed in (False, True)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    words = difference(*ends) or "equal"
    print(f"two nodes, one killed and started again: {words}, {time.monotonic() - began:.0f} s")
    if words != "equal":
        raise SystemExit(1)


def main() -> None:
    """Makes the kills and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="Number of kills.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of settings and moments.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first kill.")
    parser.add_argument("--processes", type=int, default=4, help="Largest number of processes of a run.")
    parser.add_argument("--rows", type=Path, help="File of outcomes; kills that it holds are not made again.")
    parser.add_argument("--nodes", action="store_true", help="Kill one of two torchrun nodes instead.")
    options = parser.parse_args()
    if options.nodes:
        return two_nodes()
    rows = read_rows(options.rows) if options.rows else {}
    torch.set_num_threads(1)
    preload()
    kinds, numbers, began = [*BLOWS, FULL], range(options.first, options.first + options.kills), time.monotonic()
    # Not TemporaryDirectory: every forked process would remove it at its end.
    folders = [Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp(dir="/dev/shm"))]
    try:
        torture = Torture(*folders, options.processes)
        for number in (number for number in numbers if number not in rows):
            kind, start = kinds[number % len(kinds)], time.monotonic()
            rows[number] = outcome = torture.kill(number, options.seed, kind)
            if options.rows:
                with options.rows.open("a") as file:
                    file.write(json.dumps([number, *outcome]) + "\n")
            words = "; ".join(filter(None, outcome)) or "equal"
            print(f"{number:4} {time.monotonic() - start:6.1f} s  {kind}: {words}", flush=True)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    made = {number: rows[number] for number in numbers}
    print(f"\nseed {options.seed}, kills {numbers[0]} to {numbers[-1]}, {time.monotonic() - began:.0f} s, "
          f"{os.cpu_count()} cores, torch {torch.__version__}\n\n{table_of(made)}")  # fmt: skip
    if any(any(outcome[:3]) for outcome in made.values()):
        raise SystemExit(1)


def read_rows(path: Path) -> dict[int, Outcome]:
    """Outcomes of earlier kills, by number."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {number: Outcome(*words) for number, *words in map(json.loads, lines)}


def table_of(rows: dict[int, Outcome]) -> str:
    """How many kills of each kind went how, as Markdown."""
    kinds, table = [*BLOWS, FULL], defaultdict(Counter)
    for number, outcome in rows.items():
        words = [column for column in Outcome._fields if getattr(outcome, column)]
        table[kinds[number % len(kinds)]].update(["kills", *(words or ["equal"])])
    lines = [f"| how | kills | {' | '.join(['equal', *Outcome._fields])} |", f"|---|{'---|' * 6}"]
    for kind, row in [*table.items(), ("all", sum(table.values(), Counter()))]:
        lines.append(f"| {kind} | {' | '.join(str(row[column]) for column in ('kills', 'equal', *Outcome._fields))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
