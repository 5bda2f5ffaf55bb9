"""Hands out the encoders of the study: one file for each arm that is done, and the table of their model card.

    python benchmarks/studies/weights.py --runs runs/study

``--runs`` is the ``--out`` of compare.py. An arm is done if its last step is scored on all test sets. The encoder is
always that of seed 0: to take the seed with the best test score would make that score worthless. It may be run again
whenever more arms are done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from benchmarks.studies.arms import ARMS
from benchmarks.studies.compare_report import final_rows
from benchmarks.studies.rows import encoder_of, read_rows
from densessl import hub
from densessl._mismatch import misfit

ROOT = Path(__file__).parents[2]
SEED = 0
# The arms of docs/study.md, in its order.
STUDY = ("rate-0", "byol", "infonce", "pixcontrast", "pixpro", "pixpro+infonce", "pixpro+byol", "densecl")
MARKS = ("<!-- table -->", "<!-- end of table -->")


def name_of(arm: str) -> str:
    """The name under which an arm's encoder is handed out."""
    return ("untrained" if arm == "rate-0" else arm.replace("+", "_")) + "_r10_study"


def done(rows: list[dict[str, str]], arm: str, steps: int) -> list[dict[str, str]]:
    """The rows of the arm's last step with seed 0, one for each test set; none if one of the sets is missing."""
    sets = sorted({row["set"] for row in rows if row["split"] == "test"})
    own = final_rows(rows, arm, steps if ARMS[arm].make is not None else 0)
    own = sorted((row for row in own if int(row["seed"]) == SEED), key=lambda row: row["set"])
    return own if [row["set"] for row in own] == sets else []


def write(source: Path, row: dict[str, str], path: Path) -> None:
    """Writes an encoder with what is known of it in the file's metadata.

    Raises:
        ValueError: If the run left weights of another network.
    """
    weights = load_file(source)
    problem = misfit(weights, hub.r10().state_dict())
    if problem is not None:
        raise ValueError(f"--runs: {source} is no encoder of the study: {problem}")
    names = {"arm": "arm", "lr": "learning_rate", "seed": "seed", "step": "steps", "commit": "commit"}
    facts = {"format": "pt"} | {name: row[column] for column, name in names.items()}
    if path.exists() and same(path, weights, facts):
        return  # the order of the metadata differs each time, and git would keep another copy
    path.write_bytes(save(weights, metadata=facts))  # not save_file, which makes files that others cannot read


def same(path: Path, weights: dict[str, Tensor], facts: dict[str, str]) -> bool:
    """Whether a file holds these weights and these metadata."""
    with safe_open(path, "pt") as file:
        if file.metadata() != facts or set(file.keys()) != weights.keys():
            return False
        return all(torch.equal(file.get_tensor(name), value) for name, value in weights.items())


def table(found: dict[str, list[dict[str, str]]]) -> str:
    """Markdown: a line for each encoder, with its linear mIoU on every test set."""
    sets = [row["set"] for row in next(iter(found.values()))] if found else []
    lines = [f"| name | method | rate | seed | steps | {' | '.join(sets)} | trained on | commit |"]
    lines.append("|---" * (7 + len(sets)) + "|")
    for arm, rows in found.items():
        first = rows[0]
        cells = [f"`{name_of(arm)}`", ARMS[arm].title, f"{float(first['lr']):g}", first["seed"], first["step"]]
        cells += [f"{float(row['linear']):.3f}" for row in rows]
        cells += [f"{first['device']}, torch {first['torch']}", first["commit"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the files and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="Folder that compare.py wrote.")
    parser.add_argument("--out", type=Path, default=ROOT / "weights", help="Folder of the card (%(default)s).")
    parser.add_argument("--steps", type=int, default=2500, help="Steps of a whole run (%(default)s).")
    args = parser.parse_args(argv)
    rows, card = read_rows(args.runs / "rows.csv"), args.out / "README.md"
    if not rows:
        parser.error(f"--runs: expected rows.csv in {args.runs}, there is none")
    if not card.is_file():
        parser.error(f"--out: expected a card, README.md, in {args.out}, there is none")
    text = card.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in MARKS):
        parser.error(f"--out: expected the lines {' and '.join(MARKS)} in {card}, each once")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]

    found = {}
    for arm in STUDY:
        own = done(rows, arm, args.steps)
        if not own or not encoder_of(args.runs, own[0]).exists():
            print(f"{arm}: not done yet")
            continue
        path = args.out / f"{name_of(arm)}.safetensors"
        try:
            write(encoder_of(args.runs, own[0]), own[0], path)
        except ValueError as error:
            parser.error(str(error))
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
        found[arm] = own
    card.write_text(f"{before}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
