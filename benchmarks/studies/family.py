"""Every recipe on generated scenes for a few hundred steps, and what a linear layer reads off its backbone.

    python benchmarks/family.py                        # all methods, three seeds
    python benchmarks/family.py --only densecl,vicregl # some of them; several runs may share a folder
    python benchmarks/family.py --report               # the table again, from the rows

It shows that the recipes train and do not collapse. It is far too short to rank methods. Two things are not as
published: colours are changed as in the quickstart, beyond the published ones, since colour is a shortcut in drawn
scenes; and rates and momenta fit runs of some hundred steps. A row that is in ``rows.csv`` is not made again.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchvision.io import write_png
from tqdm import tqdm

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "pretrain")]

from data import PhotoViews  # noqa: E402
from densecl import DenseCL  # noqa: E402
from detcon import DetCon  # noqa: E402
from engine import RecipeCLI, backbone_of  # noqa: E402
from fcos_trunk import FCOSTrunk  # noqa: E402
from pixcontrast import PixContrast  # noqa: E402
from pixpro import PixPro  # noqa: E402
from pixpro_fpn import PixProFPN  # noqa: E402
from pixpro_instance import PixProInstance  # noqa: E402
from quickstart import frozen_features, strong_colours  # noqa: E402
from report import health  # noqa: E402
from scenes import CLASSES, draw_scene  # noqa: E402
from slotcon import SlotCon  # noqa: E402
from vicregl import VICRegL  # noqa: E402
from vit_posttrain import ViTPostTraining  # noqa: E402

from densessl.evaluation import linear_segmentation  # noqa: E402

HEADS = ["--model.hidden_dim=512", "--model.dim=128"]
# A ViT of six blocks. Its views have the side of the scenes, since its position embedding fits one size. No pretrained
# one is at hand: it starts at random like the others, with a learning rate for that.
VIT = [
    *("--model.backbone=test_vit", "--model.layer=norm", "--model.init=random", "--data.size=96"),
    *("--model.lr_backbone=1e-3", "--model.lr_head=1e-3", "--model.momentum=0.99", "--model.warmup=0.05"),
]
# Rates: the better of two by a probe on scenes other than the table's, seed 0; PixContrast, PixPro + instance and the
# pyramid take PixPro's. A target that follows slower than the run is long stays at its start, and keys from it fill no
# queue of 65,536.
METHODS: dict[str, tuple[type[pl.LightningModule], list[str]]] = {
    "pixpro": (PixPro, HEADS),
    "pixcontrast": (PixContrast, HEADS),
    "pixpro+instance": (PixProInstance, HEADS),
    "pixpro_fpn": (PixProFPN, [*HEADS, "--model.top=p5"]),  # P6 of 64 px views is one cell
    "densecl": (DenseCL, [*HEADS, "--model.lr_at_256=0.15", "--model.queue=2048", "--model.momentum=0.99"]),
    "vicregl": (VICRegL, [*HEADS, "--model.lr_at_256=1.7", "--model.warmup=0.05"]),
    "detcon": (DetCon, [*HEADS, "--model.lr_at_256=5.6", "--model.warmup=0.05", "--data.segments=grid"]),
    "slotcon": (SlotCon, [*HEADS, "--model.lr_at_256=5.6", "--model.prototypes=64", "--data.redraws=10"]),
    "vit_posttrain": (ViTPostTraining, [*HEADS, *VIT]),
}
# Where a method starts: the backbone before the first step.
UNTRAINED = {"untrained": "pixpro", "untrained_vit": "vit_posttrain"}
ROWS = ("untrained", *(name for name in METHODS if name != "vit_posttrain"), "untrained_vit", "vit_posttrain")
FIELDS = ("method", "seed", "steps", "miou", "first_loss", "last_loss", "least_std", "last_std", "rank", "seconds")


class LowestStage(torch.nn.Module):
    """Of a pyramid's ResNet, the stage that the other methods are cut after: layer2, at stride 8."""

    def __init__(self, trunk: FCOSTrunk) -> None:
        super().__init__()
        self.body = trunk.backbone.body

    def forward(self, image: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, h, w)``."""
        return self.body(image)["p3"]


def probed(recipe: pl.LightningModule) -> torch.nn.Module:
    """What the probe reads."""
    backbone = backbone_of(recipe)
    return LowestStage(backbone) if isinstance(backbone, FCOSTrunk) else backbone


def train(method: str, seed: int, folder: Path, args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, object]]:
    """The trained backbone, and its row without the probe; of an untrained one, that where its method starts."""
    recipe, options = METHODS[UNTRAINED.get(method, method)]
    out = args.out / f"{method}-{seed}"
    for old in out.glob("metrics*.csv"):  # of a run that was stopped
        old.unlink()
    pl.seed_everything(seed, verbose=False)
    cli = RecipeCLI(
        recipe,
        PhotoViews,
        args=[
            f"--model.backbone={args.backbone}",
            *([] if recipe is PixProFPN else [f"--model.layer={args.layer}"]),
            *(f"--data.folder={folder}", f"--data.size={args.size}", f"--data.batch_size={args.batch_size}"),
            *("--data.workers=0", "--data.scale=[0.4,1.0]", f"--data.seed={seed}"),
            *(f"--trainer.max_steps={args.steps}", "--trainer.accelerator=auto", "--trainer.devices=1"),
            *(f"--trainer.log_every_n_steps={min(10, args.steps)}", "--trainer.enable_progress_bar=false"),
            *("--trainer.enable_model_summary=false", f"--out={out}"),
            *options,
        ],
        run=False,
        save_config_callback=None,
    )
    cli.datamodule.on_device = (strong_colours(), strong_colours())
    if method in UNTRAINED:
        return probed(cli.model), {"method": method, "seed": seed, "steps": 0}
    start = time.perf_counter()
    cli.trainer.fit(cli.model, cli.datamodule)
    seconds = time.perf_counter() - start
    rows = read_rows(out / "metrics.csv")
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    stds = [float(row["health/std_times_sqrt_c"]) for row in rows if row["health/std_times_sqrt_c"]]
    return probed(cli.model), {
        "method": method,
        "seed": seed,
        "steps": cli.trainer.global_step,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "least_std": min(stds),
        "last_std": stds[-1],
        "seconds": round(seconds),
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV file with a header; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_row(path: Path, row: dict[str, object]) -> None:
    """Appends a row, after a header if it is the first."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not file.tell():
            writer.writeheader()
        writer.writerow({name: f"{x:.4f}" if isinstance(x, float) else x for name, x in row.items()})


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown, a line per method; the spread is the standard deviation over seeds."""
    lines = [
        "| | seeds | mIoU | loss: step 10, last | std x sqrt(C): least, last | effective rank | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in ROWS:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue

        def mean(name: str, own: list[dict[str, str]] = own) -> float:
            return statistics.mean(float(row[name]) for row in own)

        spread = statistics.stdev(float(row["miou"]) for row in own) if len(own) > 1 else float("nan")
        cells = [method, str(len(own)), f"{mean('miou'):.3f} ± {spread:.3f}"]
        if method in UNTRAINED:
            cells += ["", "", f"{mean('rank'):.0f}", ""]
        else:
            cells += [f"{mean('first_loss'):.2f}, {mean('last_loss'):.2f}"]
            cells += [f"{mean('least_std'):.2f}, {mean('last_std'):.2f}", f"{mean('rank'):.0f}"]
            cells += [f"{mean('seconds'):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scene_folder(folder: Path, images: int) -> Path:
    """Scenes to train on, drawn once."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(images), desc="drawing scenes"):
        path = folder / f"{index:05}.png"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}")  # of this run: another may draw the same scene
            write_png(draw_scene(0, index)[0], str(part))
            part.replace(path)
    return folder


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ROWS), help="methods (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="per run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per method (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the views (%(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="scenes to train on (%(default)s)")
    parser.add_argument("--probe-images", type=int, default=200, help="scenes to fit, and to test, on (%(default)s)")
    parser.add_argument("--backbone", default="resnet18", help="(%(default)s)")
    parser.add_argument("--layer", default="layer2", help="to cut it after (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/family"), help="(%(default)s)")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, make nothing")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    unknown = set(args.only) - set(ROWS)
    if unknown:
        parser.error(f"--only: expected some of {', '.join(ROWS)}, got {', '.join(sorted(unknown))}")
    for name in ("steps", "seeds", "batch_size", "size", "images", "probe_images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> str:
    """Makes the rows that are missing; returns the table."""
    args = arguments(argv)
    path = args.out / "rows.csv"
    if not args.report:
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        folder = scene_folder(args.out / "scenes", args.images)
        # Seeds 1 and 2 of the generator: other scenes than those trained on.
        fit, test = ([draw_scene(seed, i) for i in range(args.probe_images)] for seed in (1, 2))
        held_out: Tensor = torch.stack([image for image, _ in test[:32]])
        for seed in range(args.seeds):
            for method in args.only:
                if any((row["method"], row["seed"]) == (method, str(seed)) for row in read_rows(path)):
                    continue
                backbone, row = train(method, seed, folder, args)
                features = partial(frozen_features, backbone)
                row["miou"] = linear_segmentation(features, fit, test, len(CLASSES))
                row["rank"] = health(features(held_out))[1]
                add_row(path, row)
                print(f"{method}, seed {seed}: mIoU {row['miou']:.3f}", flush=True)
    text = table(read_rows(path))
    print(text)
    return text


if __name__ == "__main__":
    main()
