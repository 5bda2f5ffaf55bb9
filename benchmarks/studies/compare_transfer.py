"""Fine-tunes the encoders of compare.py's final runs with an FCN head, on a tenth of the labels.

    python benchmarks/studies/compare.py --stage final --out runs/study ...   # makes the encoders
    python benchmarks/studies/compare_transfer.py --seeds 3 --out runs/study ...   # the same options otherwise
    python benchmarks/studies/compare_transfer.py --out runs/study --report

All arms see the same labels, crops and head for each seed. Rows go to transfer.csv; a row that is there is not made
again. The protocol: docs/study.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from safetensors.torch import load_file

from benchmarks.studies.arms import ARMS
from benchmarks.studies.compare import TRAINED, encoder_file, final_lr, make_backbone, read_labelled
from benchmarks.studies.compare_options import CLASS_COUNTS, checked, parser_of
from benchmarks.studies.finetune import fine_tuned_miou
from benchmarks.studies.rows import FACTS, add_row, check_options, circumstances, has_row, options_of, read_rows
from examples.quickstart.loop import normalized

COLUMNS = ["arm", "lr", "seed", "step", "set", "share", "miou", "seconds", *FACTS]
# Options in which all rows of a folder agree. The tuning is in 32 bits, whatever the encoder was trained in.
ENCODER = tuple(name for name in TRAINED if name != "bfloat16")
TUNED = (*ENCODER, "tune_steps", "tune_lr")


def run_one(name: str, seed: int, sets: dict, args: argparse.Namespace) -> None:
    """Makes the rows of one encoder that are missing.

    Raises:
        ValueError: If compare.py has not left that encoder in ``--out``.
    """
    arm, lr = ARMS[name], final_lr(name, args)
    step = 0 if arm.make is None else args.steps
    file = encoder_file(args, name, lr, seed, step)
    if not file.is_file():
        raise ValueError(f"--out: expected {file.name}, which compare.py writes, got none in {args.out}")
    backbone, path = (arm.backbone or make_backbone)(), args.out / "transfer.csv"
    backbone.load_state_dict(load_file(file))
    backbone.to(args.device)
    for of_set, (fit, test) in sets.items():
        facts = {"arm": name, "lr": f"{lr:.4f}", "seed": seed, "step": step, "set": of_set, "share": args.share}
        if has_row(path, **facts | {"share": f"{args.share:.4f}"}):
            continue
        begin = time.perf_counter()
        miou = fine_tuned_miou(
            backbone, fit, test, CLASS_COUNTS[of_set], normalized,
            share=args.share, steps=args.tune_steps, lr=args.tune_lr, seed=seed,
        )  # fmt: skip
        extra = {"seconds": round(time.perf_counter() - begin), "options": options_of(args, *TUNED)}
        add_row(path, COLUMNS, facts | {"miou": miou} | extra | circumstances(args.device))


def report(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: mean and standard deviation over seeds for each labelled set, arm, learning rate and share."""
    lines = ["| set | method | lr | seeds | labels | FCN, fine-tuned, mIoU |", "|---" * 6 + "|"]
    order = list(ARMS)
    keys = sorted({(row["set"], order.index(row["arm"]), float(row["lr"]), float(row["share"])) for row in rows})
    for of_set, number, lr, share in keys:
        key = (of_set, order[number], lr, share)
        own = [row for row in rows if (row["set"], row["arm"], float(row["lr"]), float(row["share"])) == key]
        values = [float(row["miou"]) for row in own]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        facts = [of_set, ARMS[key[1]].title, f"{lr:g}", str(len(own)), f"{share:.0%}"]
        lines.append("| " + " | ".join([*facts, f"{statistics.mean(values):.3f}{spread}"]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> str:
    """Makes the rows that are missing; returns the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--share", type=float, default=0.1, help="Share of the labels to train on (%(default)s).")
    parser.add_argument("--tune-steps", type=int, default=400, help="Steps of the fine-tuning (%(default)s).")
    parser.add_argument("--tune-lr", type=float, default=1e-3, help="Peak learning rate of the backbone (%(default)s).")
    args = checked(parser, argv)
    if not args.report:
        check_options(args.out / "rows.csv", options_of(args, *ENCODER))
        check_options(args.out / "transfer.csv", options_of(args, *TUNED))
        sets = read_labelled(args, "test")
        for seed in range(args.seeds):
            for name in args.only:
                run_one(name, seed, sets, args)
    text = report(read_rows(args.out / "transfer.csv"))
    print(text)
    return text


if __name__ == "__main__":
    main()
