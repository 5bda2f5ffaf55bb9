"""What a step of each arm of compare.py costs, and what the arms score after equal time.

    python benchmarks/studies/compare_cost.py --bfloat16 --out runs/study          # nothing else may run beside it
    python benchmarks/studies/compare_cost.py --out runs/study --report

The rows of final runs hold their own seconds, but other work runs beside them. Here the arms take their steps in turns,
on noise in place of photos, views and all; the least time counts. Scores after equal time are read from the snapshots
of compare.py by straight lines between them, at the time at which the arm with the cheapest step is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.performance.meter import least
from benchmarks.studies.arms import ARMS
from benchmarks.studies.compare import COLUMNS as OF_RUNS
from benchmarks.studies.compare import SIDE, drawing, make_backbone
from benchmarks.studies.compare_options import checked, parser_of
from benchmarks.studies.compare_report import SCORES, endpoints, final_rows, report
from benchmarks.studies.rows import add_row, circumstances, read_rows
from examples.pretrain.common.backbones import map_shape
from examples.quickstart.loop import train

COLUMNS = ["arm", "seconds", "device", "torch", "commit"]
PART = 5  # steps that are timed at once
Row = dict[str, str]


def taking_steps(name: str, photos: torch.Tensor, args):
    """A function that trains an arm for a few steps."""
    arm, draw = ARMS[name], drawing(photos, args, 0, None)
    backbone = (arm.backbone or make_backbone)().to(photos.device)
    method = arm.make(backbone, map_shape(backbone, args.size, 3)[0]).to(photos.device)
    scheduled = arm.optimizer(1.0)(method, 1024, args.steps)
    return lambda: train(method, scheduled, draw, PART, momentum=arm.momentum, bfloat16=args.bfloat16)


def measure(args) -> None:
    """Appends a row for each arm: its least seconds a step."""
    names = [name for name in args.only if ARMS[name].make is not None]
    generator = torch.Generator().manual_seed(0)
    shape = (4 * args.batch_size, 3, SIDE, SIDE)
    photos = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(args.device)
    found = least([taking_steps(name, photos, args) for name in names], args.device, 1 + args.rounds)
    facts = circumstances(args.device, args.bfloat16)
    for name, seconds in zip(names, found, strict=True):
        add_row(args.out / "cost.csv", COLUMNS, {"arm": name, "seconds": seconds / PART} | facts)


def after_equal_time(rows: Sequence[Row], seconds: dict[str, float], steps: int) -> list[Row]:
    """Rows of the test sets, with the scores that each arm has at the time at which the cheapest one is done.

    Args:
        rows: Rows of compare.py.
        seconds: Seconds that a step of each arm takes.
        steps: Full length of the runs.
    """
    budget, found = min(seconds.values()) * steps, []
    for arm, of_step in seconds.items():
        at = budget / of_step
        own = {(row["seed"], row["set"]): row for row in final_rows(rows, arm, steps)}
        for (seed, of_set), last in own.items():
            parts = sorted(
                (int(row["step"]), row)
                for row in rows
                if (row["arm"], row["split"], row["seed"], row["set"], row["lr"])
                == (arm, "test", seed, of_set, last["lr"])
            )
            low = max((part for part in parts if part[0] <= at), default=None, key=lambda part: part[0])
            high = min((part for part in parts if part[0] >= at), default=None, key=lambda part: part[0])
            if low is None or high is None:
                continue  # no snapshot early enough
            share = (at - low[0]) / max(high[0] - low[0], 1)
            scores = {
                name: f"{(1 - share) * float(low[1][name]) + share * float(high[1][name]):.4f}" for name in SCORES
            }
            found.append({name: last[name] for name in OF_RUNS} | scores)
    return found


def main(argv: Sequence[str] | None = None) -> str:
    """Measures the steps, unless it only reports; returns the tables."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="How often each arm takes its steps (%(default)s).")
    args = checked(parser, argv)
    if not args.report:
        measure(args)
    seconds = {row["arm"]: float(row["seconds"]) for row in read_rows(args.out / "cost.csv")}
    if not seconds:
        raise ValueError(f"--out: expected cost.csv, which this program writes, got none in {args.out}")
    rows = after_equal_time(read_rows(args.out / "rows.csv"), seconds, args.steps)
    lines = ["| method | seconds a step | steps in equal time |", "|---|---|---|"]
    cheapest = min(seconds.values())
    lines += [
        f"| {ARMS[arm].title} | {value:.3f} | {cheapest / value * args.steps:.0f} |" for arm, value in seconds.items()
    ]
    text = "\n\n".join(["\n".join(lines), report(rows), endpoints(rows, args.steps, Path())])
    print(text)
    return text


if __name__ == "__main__":
    main()
