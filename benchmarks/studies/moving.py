"""Pairs of frames against single frames, on moving scenes that it draws itself, with exact flow.

    python benchmarks/studies/moving.py --seeds 3

Arms: learning rate 0 (batch norm's statistics are filled), PixPro on two crops of one frame, PixPro on crops of two
frames joined by flow. Same scenes, crops' sizes, colours and steps. The probe is linear, on still scenes. Rows go to
``runs/moving/rows.csv``; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import default_collate

from benchmarks.studies.compare import make_backbone
from benchmarks.studies.rows import add_row, check_options, commit, has_row, options_of
from densessl import MultiView, View, byol_views, coords_from_flow
from densessl.evaluation import linear_segmentation
from examples.pretrain.common.optimizers import SquareRootLARS
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_video import PixProVideo
from examples.quickstart.loop import draw_seed, fill_statistics, frozen_features, strong_colours, train
from examples.quickstart.moving import Frames, draw_frames
from examples.quickstart.scenes import CLASSES, draw_scene

HEADS = {"hidden_dim": 512, "dim": 128}
ARMS = {
    "rate-0": None,
    "pixpro": partial(PixPro, pixel_distances=True, **HEADS),
    "pixpro_video": partial(PixProVideo, **HEADS),
}
COLUMNS = [
    "arm",
    "seed",
    "steps",
    "miou",
    "first_loss",
    "last_loss",
    "least_std",
    "last_std",
    "seconds",
    "options",
    "commit",
]
# Options in which all rows of a folder agree.
SAME = ("steps", "batch_size", "size", "scenes", "lr", "probe_images", "probe_steps")


def drawing(scenes: list[Frames], args: argparse.Namespace, seed: int, paired: bool):
    """Gives the views of a step: of the second frame, and of the first one or of the second again."""
    (first, second) = (MultiView(t) for t in byol_views(args.size, photometric=False, scale=(0.4, 1.0)).transforms)
    recolour = strong_colours()
    starts = [coords_from_flow(scene.flow, scene.visible)[0] for scene in scenes]

    def draw(step: int) -> list[View]:
        torch.manual_seed(draw_seed(seed, step))
        samples = []
        for i in torch.randint(len(scenes), (args.batch_size,)).tolist():
            other = second(scenes[i].first, coords=starts[i]) if paired else second(scenes[i].second)
            samples.append((first(scenes[i].second)[0], other[0]))
        return [recolour(View(*view)) for view in default_collate(samples)]

    return draw


def run_arm(name: str, seed: int, scenes: list[Frames], args: argparse.Namespace) -> None:
    """Trains one arm, probes it, and writes its row."""
    torch.manual_seed(seed)
    backbone, start, seen = make_backbone(), time.perf_counter(), []
    draw = drawing(scenes, args, seed, paired=name == "pixpro_video")

    def after(step: int, result) -> None:
        if step % 10 == 9:
            seen.append((float(result.loss.detach()), float(result.metrics()["health/std_times_sqrt_c"])))
            print(f"{name}, seed {seed}, step {step + 1}: loss {seen[-1][0]:.3f}, std {seen[-1][1]:.2f}", flush=True)

    make = ARMS[name]
    if make is None:
        fill_statistics(backbone, draw, min(args.steps, 30))
    else:
        method = make(backbone, 128)
        train(method, SquareRootLARS(args.lr)(method, 1024, args.steps), draw, args.steps, after)
    fit, test = ([draw_scene(s, i) for i in range(args.probe_images)] for s in (1, 2))
    score = linear_segmentation(partial(frozen_features, backbone), fit, test, len(CLASSES), steps=args.probe_steps)
    row = {"arm": name, "seed": seed, "steps": args.steps if make else 0, "miou": score, "commit": commit()}
    if seen:
        last = [statistics.mean(column[-3:]) for column in zip(*seen, strict=True)]
        row |= {"first_loss": seen[0][0], "least_std": min(std for _, std in seen), "last_std": last[1]}
        row["last_loss"] = last[0]
    add_row(
        args.out / "rows.csv",
        COLUMNS,
        row | {"seconds": round(time.perf_counter() - start), "options": options_of(args, *SAME)},
    )
    print(row, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Makes the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each arm (%(default)s).")
    parser.add_argument("--steps", type=int, default=200, help="Steps of a run (%(default)s).")
    parser.add_argument("--batch-size", type=int, default=32, help="Pairs of views in a step (%(default)s).")
    parser.add_argument("--size", type=int, default=64, help="Side of the views in pixels (%(default)s).")
    parser.add_argument("--scenes", type=int, default=500, help="Scenes to train on (%(default)s).")
    parser.add_argument("--lr", type=float, default=1.0, help="Peak learning rate of LARS (%(default)s).")
    parser.add_argument(
        "--probe-images", type=int, default=100, help="Scenes to fit on, and as many to test on (%(default)s)."
    )
    parser.add_argument("--probe-steps", type=int, default=300, help="Steps of the linear probe (%(default)s).")
    parser.add_argument("--only", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), help="Arms to run (all).")
    parser.add_argument("--out", type=Path, default=Path("runs/moving"), help="Folder of the rows (%(default)s).")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    check_options(args.out / "rows.csv", options_of(args, *SAME))
    scenes = [draw_frames(0, index) for index in range(args.scenes)]
    for seed in range(args.seeds):
        for name in args.only:
            if not has_row(args.out / "rows.csv", arm=name, seed=seed):
                run_arm(name, seed, scenes, args)


if __name__ == "__main__":
    main()
