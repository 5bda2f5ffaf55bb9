"""Rows of CSV files, appended as they come, so that several processes may share the work."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_row(path: Path, columns: list[str], row: dict[str, object]) -> None:
    """Appends a row, after a header if it is the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if not file.tell():
            writer.writeheader()
        writer.writerow({name: f"{x:.4f}" if isinstance(x, float) else x for name, x in row.items()})


def has_row(path: Path, **wanted: object) -> bool:
    """Whether a file has a row with these values."""
    return any(all(row[name] == str(value) for name, value in wanted.items()) for row in read_rows(path))


def keep_settings(rows: Path, args: argparse.Namespace, names: Sequence[str], part: str = "") -> None:
    """Keeps the options that a file of rows is made with in a JSON file beside it, and refuses others later.

    A row is found again by a few of its columns. Without this, rows that were made with other options would count as
    done, or stand in the same mean.

    Args:
        rows: The file of rows. While it is not there, other options replace those that were kept.
        args: The command line.
        names: Names of the options that must stay the same.
        part: Name of a part of the rows that has options of its own.

    Raises:
        ValueError: If an option differs from the kept one.
    """
    path = rows.with_name("-".join(filter(None, (rows.stem, part))) + ".json")
    given = json.loads(json.dumps({name: getattr(args, name) for name in names}))  # tuples become lists, as in the file
    if rows.exists() and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        for name, value in given.items():
            if name in kept and kept[name] != value:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected {kept[name]}, with which the rows in {rows} were made "
                    f"({path.name}), got {value}; name another folder with --out"
                )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own, because processes that share the work begin at the same time.
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(given, indent=1), encoding="utf-8")
    new.replace(path)


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
