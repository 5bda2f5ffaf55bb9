"""Is pretraining FPN and head worth more to a detector than pretraining the backbone alone? Equal steps, FCOS, AP.

    python benchmarks/studies/heads.py --photos FOLDER,FOLDER --sets cards=FOLDER,nuclei=FOLDER --out runs/heads
    python benchmarks/studies/heads.py --report --out runs/heads

A FOLDER of ``--sets`` is in COCO's layout, with ``images/SPLIT`` and ``annotations/SPLIT.json`` for train and val. All
arms see the same photos, views and steps. Encoders stay in ``--out``. A row that is there is not made again, and a
pretraining that was killed goes on from its last state (every 100 steps), so that the work can be stopped, continued
and shared by several processes (``--only``, ``--seeds``). The protocol: docs/fpn.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.studies.arms import HEADS
from benchmarks.studies.compare import drawing, read_images
from benchmarks.studies.compare_options import check_counts, folders_of
from benchmarks.studies.heads_detection import SETS, fine_tuned_ap
from benchmarks.studies.resumable import train_resumable
from benchmarks.studies.rows import FACTS, add_row, check_options, circumstances, has_row, options_of, read_rows
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.checkpoint_files import written_beside
from examples.pretrain.common.fcos_trunk import make_trunk
from examples.pretrain.common.optimizers import SquareRootLARS, backbone_of
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_fpn import PixProFPN
from examples.quickstart.loop import fill_statistics

NETWORK = "resnet18"
PRETRAINED = ["arm", "seed", "steps", "loss", "std", "seconds", *FACTS]
COLUMNS = ["set", "arm", "seed", "steps", "tuned", "ap", "ap50", "ap75", "pretraining_seconds", "seconds", *FACTS]
# Options in which the rows of a folder agree.
PRETRAINED_WITH = ("lr", "batch_size", "size", "images", "bfloat16")
TUNED_WITH = (*PRETRAINED_WITH, "tune_steps")


class Arm(NamedTuple):
    """What is pretrained.

    Attributes:
        title: What tables call it.
        network: Makes the part of the detector that is pretrained, and its number of channels, for a size of views.
        method: Makes the method of both; None: no training, batch norm's statistics are filled.
    """

    title: str
    network: Callable[..., tuple[nn.Module, int]]
    method: Callable[..., nn.Module] | None


ARMS = {
    "fpn": Arm("PixPro on backbone, FPN and towers", partial(make_trunk, NETWORK), partial(PixProFPN, **HEADS)),
    "backbone": Arm("PixPro on the backbone", partial(make_backbone, NETWORK), partial(PixPro, **HEADS)),
    "rate-0": Arm("learning rate 0", partial(make_backbone, NETWORK), None),
}


def steps_of(name: str, args: argparse.Namespace) -> int:
    """Number of pretraining steps of an arm."""
    return args.steps if ARMS[name].method else 0


def encoder_file(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Where the weights of a pretraining are kept, under the names of torchvision's FCOS or ResNet."""
    return args.out / f"{name}-{steps_of(name, args)}-seed{seed}.safetensors"


def pretrain(name: str, seed: int, photos: Tensor, args: argparse.Namespace) -> None:
    """Pretrains one arm, and leaves its encoder and a row in pretraining.csv."""
    arm, path, steps = ARMS[name], encoder_file(name, seed, args), steps_of(name, args)
    torch.manual_seed(seed)  # the network is made first: its backbone starts alike in all arms
    network, width = arm.network(size=args.size)
    network = network.to(args.device, memory_format=torch.channels_last)
    # Statistics are filled in float32, so that views kept in bfloat16 would change them.
    draw = drawing(photos, args, seed, args.views if arm.method else None)
    begin = time.process_time()
    if arm.method is None:
        fill_statistics(network, draw, min(args.steps, 50))
        found = {"loss": "", "std": "", "seconds": time.process_time() - begin}
    else:
        method = arm.method(network, width).to(args.device)
        scheduled = SquareRootLARS(args.lr)(method, 1024, args.steps)  # 1,024 images: the rate is --lr as it is
        found = train_resumable(
            method,
            scheduled,
            draw,
            args.steps,
            path.with_suffix(".pt"),
            args.bfloat16,
            options=options_of(args, *PRETRAINED_WITH),
        )
        network = backbone_of(method)
    weights = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    with written_beside(path) as part:
        part.write_bytes(save(weights))
    row = {"arm": name, "seed": seed, "steps": steps} | found | {"seconds": round(found["seconds"])}
    facts = {"options": options_of(args, *PRETRAINED_WITH)} | circumstances(args.device, args.bfloat16)
    add_row(args.out / "pretraining.csv", PRETRAINED, row | facts)
    path.with_suffix(".pt").unlink(missing_ok=True)


def fine_tune(name: str, seed: int, of_set: str, folder: str, args: argparse.Namespace) -> None:
    """Fine-tunes FCOS from one encoder on one set, and writes a row for each evaluation."""
    facts = {"arm": name, "seed": seed, "steps": steps_of(name, args)}
    of_arm = {key: str(value) for key, value in facts.items()}.items()
    spent = [row["seconds"] for row in read_rows(args.out / "pretraining.csv") if of_arm <= row.items()][-1]
    begin, rows = time.process_time(), args.out / "rows.csv"
    curve = fine_tuned_ap(of_set, folder, str(encoder_file(name, seed, args)), seed, args.tune_steps, args.every)
    seconds = round(time.process_time() - begin)
    extra = {"pretraining_seconds": spent, "seconds": seconds, "options": options_of(args, *TUNED_WITH)}
    extra |= circumstances(args.device, args.bfloat16)
    for tuned, figures in curve.items():
        if not has_row(rows, set=of_set, tuned=tuned, **facts):  # a process that was killed may have left some
            add_row(rows, COLUMNS, {"set": of_set, "tuned": tuned} | facts | figures | extra)


def run(args: argparse.Namespace) -> None:
    """Makes the rows that are missing."""
    args.out.mkdir(parents=True, exist_ok=True)
    check_options(args.out / "pretraining.csv", options_of(args, *PRETRAINED_WITH))
    check_options(args.out / "rows.csv", options_of(args, *TUNED_WITH))
    photos = None
    for seed in args.seeds:
        for name in args.only:
            facts = {"arm": name, "seed": seed, "steps": steps_of(name, args)}
            done = has_row(args.out / "pretraining.csv", **facts) and encoder_file(name, seed, args).is_file()
            if not done:
                photos = read_images(args).to(args.device) if photos is None else photos
                pretrain(name, seed, photos, args)
            for of_set, folder in args.sets.items():
                if not has_row(args.out / "rows.csv", set=of_set, tuned=args.tune_steps, **facts):
                    fine_tune(name, seed, of_set, folder, args)


def report(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: AP in percent for each set, number of steps and arm, and the differences paired by seed."""
    held: dict[tuple[str, int], dict[tuple[str, int], dict[int, dict[str, str]]]] = {}
    for row in rows:
        arms = held.setdefault((row["set"], int(row["tuned"])), {})
        arms.setdefault((row["arm"], int(row["steps"])), {})[int(row["seed"])] = row
    lines = ["| set | steps | arm | pretraining steps | its CPU-seconds | seeds | AP |", "|---" * 7 + "|"]
    pairs = ["| set | steps | pretraining steps | FPN - backbone | by seed |", "|---" * 5 + "|"]
    for (of_set, tuned), arms in sorted(held.items()):
        for (name, steps), of_arm in sorted(arms.items(), key=lambda item: (list(ARMS).index(item[0][0]), item[0][1])):
            spent = statistics.mean(float(row["pretraining_seconds"]) for row in of_arm.values())
            cells = [of_set, tuned, ARMS[name].title, steps, f"{spent:.0f}", len(of_arm)]
            lines.append(line(*cells, spread([float(row["ap"]) for row in of_arm.values()], "")))
            for (other, fewer), against in sorted(arms.items()):
                common = sorted(of_arm.keys() & against.keys())
                if name == "fpn" and other == "backbone" and common:
                    gains = [float(of_arm[seed]["ap"]) - float(against[seed]["ap"]) for seed in common]
                    by_seed = ", ".join(f"{seed}: {gain:+.1f}" for seed, gain in zip(common, gains, strict=True))
                    pairs.append(line(of_set, tuned, f"{steps} - {fewer}", spread(gains, "+"), by_seed))
    return "\n".join([*lines, "", *pairs])


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def spread(values: Sequence[float], sign: str) -> str:
    """Mean and standard deviation; the mean alone where there is one value."""
    around = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{around}"


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", default="", help="Folders of photos with commas between. By default scenes are drawn."
    )
    parser.add_argument("--sets", default="", help="NAME=FOLDER with commas between, NAME cards or nuclei.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/heads"), help="Folder of rows and encoders (%(default)s)."
    )
    parser.add_argument("--only", default=",".join(ARMS), help="Arms with commas between (%(default)s).")
    parser.add_argument("--seeds", default="0,1", help="Seeds with commas between (%(default)s).")
    parser.add_argument("--steps", type=int, default=300, help="Steps of the pretraining (%(default)s).")
    parser.add_argument("--lr", type=float, default=2.0, help="LARS's rate in the pretraining (%(default)s).")
    parser.add_argument("--batch-size", type=int, default=16, help="Photos of a pretraining step (%(default)s).")
    parser.add_argument("--size", type=int, default=128, help="Side of the views in pixels (%(default)s).")
    parser.add_argument("--images", type=int, default=10_000, help="Most photos per folder, or scenes (%(default)s).")
    parser.add_argument("--tune-steps", type=int, default=400, help="Steps of the fine-tuning (%(default)s).")
    parser.add_argument("--every", type=int, default=100, help="Steps between evaluations (%(default)s).")
    parser.add_argument(
        "--bfloat16",
        action="store_const",
        const=True,
        help="Pretrain in bfloat16 on a CPU too, which is faster on CPUs with AMX. On a GPU this is always done.",
    )
    parser.add_argument("--views", type=Path, help="Folder in which views are kept for the next arm (drawn each time).")
    parser.add_argument("--report", action="store_true", help="Print the tables of the rows that are there.")
    return parser


def checked(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = parser_of()
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(ARMS):
        parser.error(f"--only: expected some of {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
    args.sets = folders_of(parser, "--sets", args.sets, SETS)
    if not args.sets and not args.report:
        parser.error("--sets: expected at least one NAME=FOLDER, got none")
    check_counts(parser, args, "steps", "batch_size", "size", "images", "tune_steps", "every")
    if args.tune_steps % args.every:
        parser.error(f"--every: expected a divisor of --tune-steps {args.tune_steps}, got {args.every}")
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        parser.error(f"--seeds: expected whole numbers with commas between, got {args.seeds}")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.bfloat16 = bool(args.bfloat16) or args.device == "cuda"
    return args


def main(argv: Sequence[str] | None = None) -> str:
    """Makes the rows that are missing; returns the tables."""
    args = checked(argv)
    if not args.report:
        run(args)
    text = report(read_rows(args.out / "rows.csv"))
    print(text)
    return text


if __name__ == "__main__":
    main()
