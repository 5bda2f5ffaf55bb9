"""Methods compared at equal cost: pixel-level, instance-level, and none; on photos or on drawn scenes.

    python benchmarks/studies/compare.py --photos FOLDER,FOLDER --labelled camvid=FOLDER,nuclei=FOLDER --stage tune
    python benchmarks/studies/compare.py --photos ... --labelled ... --stage final --seeds 5
    python benchmarks/studies/compare.py --stage final --lr 1 --steps 400      # on scenes that it draws itself
    python benchmarks/studies/compare.py --report

A labelled FOLDER holds ``images/SPLIT/*`` and ``labels/SPLIT/*.png`` for train, val and test. ``tune`` searches for the
learning rate on seed 100 and scores on val; ``final`` takes the rate with the best mean over the val sets (or ``--lr``)
and scores on test. Every arm sees the same photos, views and steps. A row that is there is not made again, and a run
that was killed goes on from its last state (every 100 steps), so that the work can be stopped, continued and shared by
several processes (``--only``). The protocol: docs/study.md.
The ViT starts at random here: no pretrained one fits the views.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import kornia.augmentation as K
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop, resize
from tqdm import tqdm

from benchmarks.studies.arms import ARMS, Arm
from benchmarks.studies.bootstrap import mean_iou, save_overlaps
from benchmarks.studies.colours import recoloured
from benchmarks.studies.compare_options import CLASS_COUNTS, checked, parser_of
from benchmarks.studies.compare_report import SCORES, endpoints, report
from benchmarks.studies.resumable import train_resumable
from benchmarks.studies.rows import (
    FACTS,
    add_row,
    check_options,
    circumstances,
    encoder_of,
    has_row,
    options_of,
    read_rows,
)
from benchmarks.studies.tuning import chosen_lr, next_lr, val_scores
from benchmarks.studies.views import kept_views, views_key
from densessl import FeatureMap, MaskedView, View, hub
from densessl.evaluation import correspondence_accuracy, linear_overlaps, nearest_neighbor_segmentation
from examples.pretrain.common.backbones import map_shape
from examples.pretrain.common.data.segments import Grid
from examples.pretrain.common.optimizers import LinearSGD
from examples.quickstart.loop import draw_seed, fill_statistics, frozen_features, strong_colours
from examples.quickstart.photos import read_camvid, read_photos
from examples.quickstart.scenes import draw_scene

SIDE = 128  # of the photos that are held in memory
TUNE_SEED = 100
COLUMNS = ["arm", "lr", "seed", "step", "split", "set", *SCORES, "loss", "std", "seconds", *FACTS]
# Options in which all rows of a folder agree: those of the training, and all.
TRAINED = ("steps", "batch_size", "size", "images", "bfloat16")
SAME = (*TRAINED, "probe_images", "probe_steps")
Labelled = list[tuple[Tensor, Tensor]]


def make_backbone() -> FeatureMap:
    """torchvision's ResNet with one block a stage, cut at stride 8: 64 px views give 8x8 cells."""
    return hub.r10().to(memory_format=torch.channels_last)


def read_images(args: argparse.Namespace) -> Tensor:
    """Square photos, or drawn scenes, uint8 ``(N, 3, SIDE, SIDE)``."""
    if not args.photos:
        return torch.stack(
            [resize(draw_scene(0, i)[0], [SIDE, SIDE]) for i in tqdm(range(args.images), desc="scenes", nrows=20)]
        )
    found = [photo for folder in args.photos.split(",") for photo in read_photos(folder, args.images, side=SIDE)]
    return torch.stack([center_crop(photo, [SIDE, SIDE]) for photo in found])


def read_labelled(args: argparse.Namespace, split: str) -> dict[str, tuple[Labelled, Labelled]]:
    """Images to fit and to score a probe on, for each labelled set."""
    if not args.labelled:
        seed = {"val": 3, "test": 2}[split]  # of the generator: scenes other than those trained on
        return {"scenes": tuple([draw_scene(s, i) for i in range(args.probe_images)] for s in (1, seed))}
    return {
        name: tuple(read_camvid(folder, part, "--labelled", CLASS_COUNTS[name]) for part in ("train", split))
        for name, folder in args.labelled.items()
    }


def drawing(photos: Tensor, args: argparse.Namespace, seed: int, folder: Path | None):
    """Gives the views of a step: crop, flip and colours, all functions of (seed, step); kept if there is a folder."""
    size = (args.size, args.size)
    augment = strong_colours(K.RandomResizedCrop(size, scale=(0.2, 1.0)), K.RandomHorizontalFlip(0.5))
    coords = torch.eye(3, device=photos.device).expand(args.batch_size, 3, 3)  # the whole of each square photo
    source_size = torch.full((args.batch_size, 2), SIDE, device=photos.device)
    grid = Grid(5)(photos[0].cpu()).to(photos.device).expand(args.batch_size, SIDE, SIDE)

    def drawn(step: int, masked: bool = False) -> tuple[View, View]:
        torch.manual_seed(draw_seed(seed, step))
        chosen = torch.randperm(len(photos))[: args.batch_size].to(photos.device)
        whole = View(photos[chosen], coords, source_size)
        if masked:
            whole = MaskedView(*whole, grid)
        views = [augment(whole, seed=draw_seed(seed, step, view)) for view in (1, 2)]
        return tuple(v._replace(image=v.image.contiguous(memory_format=torch.channels_last)) for v in views)

    half = torch.bfloat16 if args.bfloat16 or photos.is_cuda else torch.float32
    kept = drawn
    if folder:
        key = f"seed{seed}-{views_key(photos, args.batch_size, args.size, half)}"
        kept = kept_views(drawn, folder / key, half, photos.device)

    def draw(step: int, masked: bool = False) -> tuple[View, View]:
        views = drawn(step, masked=True) if masked else kept(step)
        torch.manual_seed(draw_seed(seed, step, 3))  # a method draws alike whether or not views were drawn before
        return views

    return draw


def scores(backbone: nn.Module, sets: dict[str, tuple[Labelled, Labelled]], args: argparse.Namespace):
    """A dict of scores for each labelled set, and the overlaps that the linear one is made of, image by image.

    The homographies are the same for all arms and seeds.
    """
    features = partial(frozen_features, backbone)
    for name, (fit, test) in sets.items():
        classes, photos = CLASS_COUNTS[name], [image for image, _ in test]
        overlaps = linear_overlaps(features, fit, test, classes, steps=args.probe_steps)
        yield (
            name,
            {
                "linear": float(mean_iou(overlaps.sum(0))),
                "neighbors": nearest_neighbor_segmentation(
                    features, fit, test, classes, cells=10_000, temperature=0.02
                ),
                "pck": correspondence_accuracy(features, photos, distances=(1.0,))[1.0],
                "pck_colour": correspondence_accuracy(features, photos, distances=(1.0,), photometric=recoloured)[1.0],
            },
            overlaps,
        )


def encoder_file(args: argparse.Namespace, name: str, lr: float, seed: int, step: int) -> Path:
    """Where the encoder of a run is kept, as it was after so many steps."""
    return encoder_of(args.out, {"arm": name, "lr": lr, "seed": seed, "step": step})


def run_arm(name: str, lr: float, seed: int, photos: Tensor, sets: dict, split: str, args: argparse.Namespace) -> None:
    """Trains one arm, and writes a row for each snapshot and labelled set."""
    arm: Arm = ARMS[name]
    torch.manual_seed(seed)
    # Statistics are filled in float32, so that views kept in bfloat16 would change them.
    draw = drawing(photos, args, seed, args.views if arm.make else None)
    backbone = (arm.backbone or make_backbone)().to(photos.device)
    path, rows = args.out / f"{name}-lr{lr:g}-seed{seed}.pt", args.out / "rows.csv"
    facts = {"options": options_of(args, *SAME)} | circumstances(photos.device, args.bfloat16)

    def snapshot(step: int, reading: dict) -> None:
        modes = [(m, m.training) for m in backbone.modules()]
        weights = {key: value.cpu().contiguous() for key, value in backbone.state_dict().items()}
        file = encoder_file(args, name, lr, seed, step)
        save_file(weights, file)  # before its rows: a run that has them is done
        for of_set, values, overlaps in scores(backbone, sets, args):
            save_overlaps(overlaps, file, of_set)
            if has_row(rows, arm=name, lr=f"{lr:.4f}", seed=seed, step=step, split=split, set=of_set):
                continue
            row = {"arm": name, "lr": lr, "seed": seed, "step": step, "split": split, "set": of_set}
            add_row(rows, COLUMNS, row | values | reading | {"seconds": round(reading["seconds"])} | facts)
        for module, training in modes:
            module.training = training

    if arm.make is None:
        begin = time.perf_counter()
        fill_statistics(backbone, draw, min(args.steps, 100))
        snapshot(0, {"loss": "", "std": "", "seconds": time.perf_counter() - begin})
        return
    method = arm.make(backbone, map_shape(backbone, args.size, 3)[0]).to(photos.device)
    images = 256 if arm.optimizer is LinearSGD else 1024  # at which the rate is --lr as it is
    scheduled = arm.optimizer(lr)(method, images, args.steps)
    drawn = partial(draw, masked=name == "detcon")
    train_resumable(
        method, scheduled, drawn, args.steps, path, args.bfloat16, arm.momentum, args.snapshots, snapshot,
        time.perf_counter, options_of(args, *TRAINED),
    )  # fmt: skip
    path.unlink(missing_ok=True)


def final_lr(name: str, args: argparse.Namespace) -> float:
    """The learning rate of an arm in --stage final."""
    if ARMS[name].make is None:
        return 0.0
    return args.lr or chosen_lr(read_rows(args.out / "rows.csv"), name, args.steps)


def run(args: argparse.Namespace) -> None:
    """Makes the rows that are missing."""
    args.out.mkdir(parents=True, exist_ok=True)
    check_options(args.out / "rows.csv", options_of(args, *SAME))
    split = "val" if args.stage == "tune" else "test"
    photos, sets = read_images(args).to(args.device), read_labelled(args, split)
    path = args.out / "rows.csv"
    if args.stage == "tune":
        for name in args.only:
            lrs = args.lrs if ARMS[name].make is not None else [0.0]
            while (lr := next_lr(val_scores(read_rows(path), name, args.steps, len(sets)), lrs)) is not None:
                run_arm(name, lr, TUNE_SEED, photos, sets, split, args)
        return
    for seed in range(args.seeds):
        for name in args.only:
            trained = ARMS[name].make is not None
            lr, step = final_lr(name, args), args.steps if trained else 0
            if not has_row(path, arm=name, lr=f"{lr:.4f}", seed=seed, step=step, split=split, set=list(sets)[-1]):
                run_arm(name, lr, seed, photos, sets, split, args)


def main(argv: Sequence[str] | None = None) -> str:
    """Makes the rows that are missing; returns the table."""
    args = checked(parser_of(__doc__), argv)
    if not args.report:
        run(args)
    rows = read_rows(args.out / "rows.csv")
    text = "\n\n".join(filter(None, (report(rows), endpoints(rows, args.steps, args.out))))
    print(text)
    return text


if __name__ == "__main__":
    main()
