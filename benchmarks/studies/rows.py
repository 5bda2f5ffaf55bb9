"""Rows of CSV files, appended as they come, so that several processes may share the work."""

from __future__ import annotations

import csv
from pathlib import Path


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
