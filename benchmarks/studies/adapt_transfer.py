"""What a backbone adapted by adapt.py is worth elsewhere: fine-tuned on few and on all labels, and at a finer stride.

    python benchmarks/studies/adapt.py --out runs/adapt --only pixcontrast+infonce ...   # makes the encoders
    python benchmarks/studies/adapt_transfer.py --out runs/adapt --only start,pixcontrast+infonce ...   # as above
    python benchmarks/studies/adapt_transfer.py --out runs/adapt --report

``fcn 10%`` and ``fcn 100%`` fine-tune the backbone with an FCN head on that share of the labels; start and adapted
backbone see the same labels, crops and head for each seed. ``finer`` are the scores of adapt.py at ``blocks.2``
(stride 8, 40 channels), and ``colour pck`` is its correspondence between photos in other colours. Rows go to
transfer.csv; a row that is there is not made again. The protocol: docs/adapt.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from safetensors.torch import load_file

from benchmarks.studies.adapt import (
    RECIPES,
    SCORED,
    SCORES,
    TRAINED,
    checked,
    encoder_file,
    features,
    make_backbone,
    normalized,
    parser_of,
    read_all,
    scores,
)
from benchmarks.studies.colours import recoloured
from benchmarks.studies.finetune import fine_tuned_miou
from benchmarks.studies.rows import add_row, check_options, commit, has_row, options_of, read_rows
from densessl import FeatureMap
from densessl.evaluation import correspondence_accuracy

SHARES = {"fcn 10%": 0.1, "fcn 100%": 1.0}
FINER = "blocks.2"
WHAT = ("fcn", "finer", "colour")
COLUMNS = ["set", "arm", "seed", "split", "score", "value", "seconds", "options", "torch", "commit"]
TUNED = ("classes", "enlarge", "every", "tune_steps", "tune_lr")  # options of the fine-tuned scores


def backbone_of(name: str, seed: int, args: argparse.Namespace) -> FeatureMap:
    """The start, or an encoder that adapt.py left in ``--out``.

    Raises:
        ValueError: If there is no such encoder.
    """
    backbone = make_backbone(args.weights, frozen=True)
    if name != "start":
        path = encoder_file(args, name, seed)
        if not path.is_file():
            raise ValueError(f"--out: expected {path.name}, which adapt.py writes, got none in {args.out}")
        backbone.load_state_dict(load_file(path))
    return backbone


def finer(backbone: FeatureMap, args: argparse.Namespace) -> FeatureMap:
    """The same network, cut at stride 8."""
    cut, weights = make_backbone(args.weights, frozen=True, layer=FINER), backbone.state_dict()
    cut.load_state_dict({key: weights[key] for key in cut.state_dict()})
    return cut


def colour_pck(backbone: FeatureMap, labelled: dict, args: argparse.Namespace) -> float:
    """Share of right correspondences within a cell between a photo and its warped copy in other colours."""
    photos = [image for image, _ in labelled[args.split][:: args.pck_every]]
    extract = partial(features, backbone)
    return correspondence_accuracy(extract, photos, distances=(1.0,), photometric=recoloured)[1.0]


def made_with(score: str, args: argparse.Namespace) -> str:
    """The options that a score depends on, as text."""
    return options_of(args, *TRAINED, *(TUNED if score in SHARES else SCORED))


def run_one(name: str, seed: int, labelled: dict, args: argparse.Namespace) -> None:
    """Makes the rows of one backbone that are missing."""
    backbone, path = backbone_of(name, seed, args), args.out / "transfer.csv"
    facts = {"set": args.name, "arm": name, "seed": seed, "split": args.split}
    fit, test = labelled["train"], labelled[args.split]
    tune = partial(fine_tuned_miou, backbone, fit, test, args.classes, normalized, steps=args.tune_steps, seed=seed)
    jobs: dict[tuple[str, ...], Callable[[], list[float]]] = {
        (score,): lambda share=share: [tune(share=share, lr=args.tune_lr)] for score, share in SHARES.items()
    }
    if name != "start" or seed == args.seeds[0]:  # frozen, the start does not depend on a seed
        names = tuple(f"finer {score}" for score in SCORES)
        jobs[names] = lambda: list(scores(finer(backbone, args), labelled, args).values())
        jobs["colour pck",] = lambda: [colour_pck(backbone, labelled, args)]
    for names, job in jobs.items():
        if names[0].split()[0] not in args.what or all(has_row(path, **facts, score=score) for score in names):
            continue
        begin = time.perf_counter()
        values = job()
        extra = {"seconds": round(time.perf_counter() - begin), "options": made_with(names[0], args)}
        extra |= {"torch": torch.__version__, "commit": commit()}
        for score, value in zip(names, values, strict=True):
            if not has_row(path, **facts, score=score):  # a job that was killed may have left some of its rows
                add_row(path, COLUMNS, facts | {"score": score, "value": value} | extra)


def report(rows: Sequence[dict[str, str]], split: str = "test") -> str:
    """Markdown: mean and standard deviation over seeds, and the mean difference to the start."""
    rows = [row for row in rows if row["split"] == split]
    lines = ["| set | score | recipe | seeds | mIoU or PCK | to the start |", "|---" * 6 + "|"]
    for of_set, score in sorted({(row["set"], row["score"]) for row in rows}):
        own = [row for row in rows if (row["set"], row["score"]) == (of_set, score)]
        start = {row["seed"]: float(row["value"]) for row in own if row["arm"] == "start"}
        for name, recipe in RECIPES.items():
            values = {row["seed"]: float(row["value"]) for row in own if row["arm"] == name}
            if not values:
                continue
            spread = f" ± {statistics.stdev(values.values()):.3f}" if len(values) > 1 else ""
            cells = [of_set, score, recipe.title, str(len(values)), f"{statistics.mean(values.values()):.3f}{spread}"]
            # Paired by seed where the start was tuned with that seed, and against its one value where it was frozen.
            one = next(iter(start.values()), None) if len(start) == 1 else None
            gains = [value - start.get(seed, one) for seed, value in values.items() if start.get(seed, one) is not None]
            apart = f" ± {statistics.stdev(gains):.3f}" if len(gains) > 1 else ""
            cells.append("" if name == "start" or not gains else f"{statistics.mean(gains):+.3f}{apart}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> str:
    """Makes the rows that are missing; returns the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--tune-steps", type=int, default=400, help="Steps of the fine-tuning (%(default)s).")
    parser.add_argument("--tune-lr", type=float, default=1e-4, help="Peak learning rate of the backbone (%(default)s).")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="Rows to make (all).")
    args = checked(parser, argv)
    if not args.report:
        check_options(args.out / "rows.csv", options_of(args, *TRAINED), set=args.name)
        for score in (*SHARES, *(f"finer {score}" for score in SCORES), "colour pck"):
            if score.split()[0] in args.what:
                where = {"set": args.name, "split": args.split, "score": score}
                check_options(args.out / "transfer.csv", made_with(score, args), **where)
        _, labelled = read_all(args)
        for seed in args.seeds:
            for name in args.only:
                run_one(name, seed, labelled, args)
    text = report(read_rows(args.out / "transfer.csv"), args.split)
    print(text)
    return text


if __name__ == "__main__":
    main()
