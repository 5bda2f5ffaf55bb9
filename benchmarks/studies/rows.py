"""Rows of CSV files, appended as they come, so that several processes may share the work."""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from examples.pretrain.common.checkpoint_files import written_beside

# Columns that say how a row was made: see options_of and circumstances.
FACTS = ["options", "device", "torch", "commit"]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_row(path: Path, columns: list[str], row: dict[str, object]) -> None:
    """Appends a row, after a header if it is the first. A file of an earlier version gets the columns that it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = _columns(path)
    if held and not set(columns) <= set(held):
        rows, held = read_rows(path), [*columns, *(name for name in held if name not in columns)]
        with written_beside(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, held)
            writer.writeheader()
            writer.writerows(rows)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, held or columns)
        if not file.tell():
            writer.writeheader()
        writer.writerow({name: f"{x:.4f}" if isinstance(x, float) else x for name, x in row.items()})


def _columns(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def has_row(path: Path, **wanted: object) -> bool:
    """Whether a file has a row with these values."""
    return any(all(row[name] == str(value) for name, value in wanted.items()) for row in read_rows(path))


def options_of(args: argparse.Namespace, *names: str) -> str:
    """What the column ``options`` of a row says: the options that it was made with, as ``batch-size=64;size=64``."""
    return ";".join(f"{name.replace('_', '-')}={_plain(getattr(args, name))}" for name in names)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "no" if value is None else str(value)


def other_option(before: str, now: str) -> tuple[str, str, str] | None:
    """Name, earlier and present value of the first option that differs, in two texts as from ``options_of``.

    Options that only one of them names do not count.
    """
    kept, given = (dict(pair.split("=", 1) for pair in text.split(";") if pair) for text in (before, now))
    differing = ((name, kept[name], value) for name, value in given.items() if kept.get(name, value) != value)
    return next(differing, None)


def check_options(path: Path, options: str, **where: object) -> None:
    """Refuses options that differ from those of the rows that are there.

    A row is found again by a few of its columns. Without this check, rows that were made with other options would
    count as done, or stand in the same mean.

    Args:
        path: The file of rows. Rows that do not tell their options pass.
        options: The options, as from ``options_of``.
        where: Values of columns, to look only at the rows that have them.

    Raises:
        ValueError: If an option differs.
    """
    for row in read_rows(path):
        if all(row.get(name) == str(value) for name, value in where.items()):
            other = other_option(row.get("options") or "", options)
            if other is not None:
                raise ValueError(
                    f"--{other[0]}: expected {other[1]}, with which rows in {path} were made, got {other[2]}; name "
                    "another folder with --out, or move that file away"
                )


def commit() -> str:
    """The commit that is checked out."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def circumstances(device: object, bfloat16: bool | None = False) -> dict[str, str]:
    """What a row says of where it was made: device, torch and commit."""
    precision = " bfloat16" if bfloat16 else ""
    return {
        "device": f"{device} {platform.machine()}{precision}",
        "torch": torch.__version__,
        "commit": commit(),
    }


def encoder_of(folder: Path, row: Mapping[str, object]) -> Path:
    """The file in which compare.py keeps the encoder that a row tells of: arm, lr, seed and step name it."""
    return folder / f"{row['arm']}-lr{float(row['lr']):g}-seed{row['seed']}-{row['step']}.safetensors"
