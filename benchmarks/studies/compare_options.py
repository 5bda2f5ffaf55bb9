"""The command line of compare.py and compare_transfer.py."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from benchmarks.studies.arms import ARMS, BESIDE_THE_STUDY
from examples.quickstart.scenes import CLASSES

CLASS_COUNTS = {"camvid": 11, "nuclei": 2, "scenes": len(CLASSES)}


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that compare.py and compare_transfer.py share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", default="", help="Folders of photos with commas between. By default scenes are drawn."
    )
    parser.add_argument("--labelled", default="", help="NAME=FOLDER with commas between. By default scenes are drawn.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="Folder of rows and encoders (%(default)s)."
    )
    parser.add_argument("--stage", choices=("tune", "final"), default="final", help="What to run (%(default)s).")
    parser.add_argument("--only", default="", help="Arms with commas between (all for which there is a rate).")
    parser.add_argument(
        "--lrs",
        default="0.125,0.25,0.5,1,2,4",
        help="Learning rates among which --stage tune climbs from the middle to the best (%(default)s).",
    )
    parser.add_argument("--lr", type=float, help="Learning rate of --stage final (what tuning chose).")
    parser.add_argument("--steps", type=int, default=2500, help="Steps of a run (%(default)s).")
    parser.add_argument("--snapshots", default="", help="Steps at which to score (the last one).")
    parser.add_argument("--batch-size", type=int, default=64, help="Images of a step (%(default)s).")
    parser.add_argument("--size", type=int, default=64, help="Side of the views in pixels (%(default)s).")
    parser.add_argument("--seeds", type=int, default=5, help="Runs of each arm (%(default)s).")
    parser.add_argument("--images", type=int, default=10_000, help="Most photos per folder, or scenes (%(default)s).")
    parser.add_argument("--probe-images", type=int, default=200, help="Scenes to fit and to test on (%(default)s).")
    parser.add_argument("--probe-steps", type=int, default=1000, help="Steps of the linear probe (%(default)s).")
    parser.add_argument(
        "--bfloat16",
        action="store_const",
        const=True,
        help="Train in bfloat16 on a CPU too, which is faster on CPUs with AMX. On a GPU this is always done.",
    )
    parser.add_argument(
        "--views",
        type=Path,
        help="Folder in which the views of each seed are kept for the next arm (drawn each time). A step of 64 views "
        "of 64 pixels takes 3 MB in bfloat16 and 6 MB in float32; a seed of 2,500 steps 8 GB or 16 GB.",
    )
    parser.add_argument("--report", action="store_true", help="Print the table of the rows that are there.")
    return parser


def folders_of(parser: argparse.ArgumentParser, option: str, text: str, known: Collection[str]) -> dict[str, str]:
    """The folder of each labelled set, out of NAME=FOLDER with commas between."""
    for pair in text.split(",") if text else ():
        if pair.partition("=")[0] not in known or "=" not in pair:
            parser.error(f"{option}: expected NAME=FOLDER, NAME one of {', '.join(known)}, got {pair}")
    return dict(pair.split("=", 1) for pair in text.split(",")) if text else {}


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuses options that count something and are below 1."""
    for name in names:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")


def checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else [name for name in ARMS if name not in BESIDE_THE_STUDY]
    if unknown := set(args.only) - set(ARMS):
        parser.error(f"--only: expected some of {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
    args.labelled = folders_of(parser, "--labelled", args.labelled, CLASS_COUNTS)
    check_counts(parser, args, "steps", "seeds", "batch_size", "size", "images", "probe_images", "probe_steps")
    args.lrs = sorted({float(lr) for lr in args.lrs.split(",")})
    for name, lrs in (("--lrs", args.lrs), ("--lr", [] if args.lr is None else [args.lr])):
        for lr in lrs:
            if lr <= 0 or lr != round(lr, 4):  # as rows are written, by which a run finds what is done
                parser.error(f"{name}: expected rates above 0 with at most 4 decimals, got {lr:g}")
    args.snapshots = {*(int(step) for step in args.snapshots.split(",") if step), args.steps}
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.bfloat16 = bool(args.bfloat16) or args.device == "cuda"
    return args
