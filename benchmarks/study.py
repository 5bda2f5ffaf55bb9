"""Does pixel-level pretraining beat instance-level, and none, on real photos at equal cost?

    python benchmarks/study.py --data FOLDER                # the full study, meant for a GPU
    python benchmarks/study.py --data FOLDER --cpu          # the reduced one, about an hour on two free cores
    python benchmarks/study.py --data FOLDER --cards CARDS  # then also fine-tunes the encoders of seed 0, on a GPU
    python benchmarks/study.py --data FOLDER --report       # table and figure again, from the rows

FOLDER holds ``pretrain/`` (photos, sub-folders included) and ``camvid/`` (``images/SPLIT/*``, ``labels/SPLIT/*.png``);
CARDS is a detection set in COCO's layout. Fine-tuning goes through ``examples/transfer`` and needs the whole backbone
(``--layer layer4``, the default but for ``--cpu``).
Every method sees the same photos, views, steps and seeds, and gets the same grid of learning rates, from which the
linear probe on CamVid's val split chooses at seed 0 (``tuning.csv``). What is chosen is reported on the test split, a
row of ``rows.csv`` for each seed. A row that is there is not made again, so that a run can be stopped and continued,
and several can share the work (``--only pixpro,pixcontrast``). The encoders lie beside, as safetensors.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import torch
import torchvision
from finetune import detector_ap, fcn_miou
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2.functional import center_crop
from tqdm import tqdm

from densessl import (
    EMA,
    LARS,
    MLP,
    PPM,
    BatchAugment,
    ConvMLP,
    DistanceMatcher,
    FeatureMap,
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    PixContrastLoss,
    PixProLoss,
    View,
    param_groups,
)
from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from densessl.evaluation import correspondence_accuracy, linear_segmentation, nearest_neighbor_segmentation
from densessl.metrics import feature_std

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from photos import CAMVID_CLASSES, read_camvid, read_photos

METHODS = {
    "none": "no pretraining",
    "instance-byol": "instance, BYOL form",
    "instance-infonce": "instance, InfoNCE form",
    "pixcontrast": "PixContrast",
    "pixpro": "PixPro",
    "pixpro+instance": "PixPro + instance",
}
SCORES = {"linear": "linear", "neighbors": "nearest neighbours", "pck": "PCK, 1 cell"}
SETTINGS = ["steps", "batch_size", "size", "backbone", "layer"]
TUNING = ["method", "lr", "val_linear", "loss", "std"]
ROWS = ["method", "lr", "seed", *SCORES, "loss", "std", *SETTINGS, "device", "torch", "commit", "seconds"]


Camvid = dict[str, list[tuple[Tensor, Tensor]]]


class Study(nn.Module):
    """All parts of all methods, so that each starts from the same weights; a method uses what it needs."""

    def __init__(self, backbone: str, layer: str, size: int, dim: int = 128, hidden_dim: int = 1024) -> None:
        super().__init__()
        features = FeatureMap(torchvision.models.get_model(backbone, weights=None), layer)
        with torch.no_grad():
            width = features.eval()(torch.zeros(1, 3, size, size)).shape[1]
        self.encoder = Encoder(features, ConvMLP(width, hidden_dim, dim), MLP(width, hidden_dim, dim))
        self.ppm, self.predictor = PPM(nn.Conv2d(dim, dim, 1)), MLP(dim, hidden_dim, dim)
        self.match = DistanceMatcher(0.7)
        self.pixpro, self.pixcontrast = PixProLoss(), PixContrastLoss()
        self.consistency, self.contrast = InstanceConsistencyLoss(), InstanceContrastLoss()

    def loss(self, method: str, view1: View, view2: View, target: EMA) -> tuple[Tensor, Tensor]:
        """The loss, and features whose standard deviation tells a collapse."""
        (z1, g1), (z2, g2) = self.encoder(view1.image), self.encoder(view2.image)
        (t1, h1), (t2, h2) = target(view1.image), target(view2.image)
        mask = self.match(view1.coords, view2.coords, z1.shape[-2:])
        losses = {
            "instance-byol": lambda: (
                self.consistency(self.predictor(g1), h2) + self.consistency(self.predictor(g2), h1)
            ),
            "instance-infonce": lambda: self.contrast(g1, h2) + self.contrast(g2, h1),
            "pixcontrast": lambda: self.pixcontrast(z1, t2, mask) + self.pixcontrast(z2, t1, mask.mT),
            "pixpro": lambda: 2 * (self.pixpro(self.ppm(z1), t2, mask) + self.pixpro(self.ppm(z2), t1, mask.mT)),
        }
        features = z1 if method.startswith("pix") else g1[:, :, None, None]
        if method == "pixpro+instance":
            return losses["pixpro"]() + losses["instance-infonce"](), features
        return losses[method](), features


class Encoder(nn.Module):
    """Backbone, projection per cell, projection per image."""

    def __init__(self, backbone: FeatureMap, per_cell: nn.Module, per_image: nn.Module) -> None:
        super().__init__()
        self.backbone, self.per_cell, self.per_image = backbone, per_cell, per_image

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(image.contiguous(memory_format=torch.channels_last))
        return self.per_cell(features), self.per_image(features.mean((2, 3)))


def make_views(size: int) -> BatchAugment:
    """Crop, flip and colours, on the device. Colours change more than published: on few photos they are a shortcut."""
    return BatchAugment(
        K.AugmentationSequential(
            K.RandomResizedCrop((size, size), scale=(0.2, 1.0)),
            K.RandomHorizontalFlip(0.5),
            K.ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8),
            K.RandomChannelShuffle(p=0.5),
            K.RandomInvert(p=0.3),
            K.RandomGrayscale(p=0.2),
            K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
        )
    )


def pretrain(study: Study, method: str, photos: Tensor, lr: float, seed: int, args: argparse.Namespace):
    """Trains the encoder in place; returns the last tenth's mean loss and std of the unit features x sqrt(C)."""
    augment, device = make_views(args.size), photos.device
    momentum = partial(cosine_schedule, max_steps=args.steps + 1, start_value=0.99, end_value=1.0)
    target = EMA(study.encoder, momentum).train()
    optimizer = LARS(param_groups(study, weight_decay=1e-5), lr=lr)
    schedule = CosineWarmupScheduler(optimizer, warmup_epochs=max(1, args.steps // 20), max_epochs=args.steps + 1)
    # The whole of each square photo: the identity.
    coords = torch.eye(3, device=device).expand(args.batch_size, 3, 3)
    source_size = torch.full((args.batch_size, 2), photos.shape[-1], device=device)
    losses, deviations = [], []
    for step in tqdm(range(args.steps), desc=f"{method}, lr {lr}, seed {seed}", mininterval=5):
        generator = torch.Generator().manual_seed(draw(seed, step))
        chosen = torch.randint(len(photos), (args.batch_size,), generator=generator).to(device)
        whole = View(photos[chosen], coords, source_size)
        view1, view2 = (augment(whole, seed=draw(seed, step, view)) for view in (1, 2))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, features = study.loss(method, view1, view2, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        target.update(study.encoder)
        losses.append(loss.detach())
        deviations.append(feature_std(features.detach().float()) * features.shape[1] ** 0.5)
    last = -max(1, args.steps // 10)
    return float(torch.stack(losses[last:]).mean()), float(torch.stack(deviations[last:]).mean())


def draw(*numbers: int) -> int:
    """A seed that is a function of these numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def features_of(backbone: FeatureMap, images: Tensor) -> Tensor:
    """Whole images, uint8 (B, 3, H, W), to frozen feature maps."""
    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = ((images.to(device).float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return backbone.eval()(images)


def scores(backbone: FeatureMap, camvid: Camvid, seed: int) -> dict[str, float]:
    """The reported numbers, on the test split."""
    features = partial(features_of, backbone)
    fit, test, classes = camvid["train"], camvid["test"], CAMVID_CLASSES
    photos = [image for image, _ in test[::4]]
    return {
        "linear": linear_segmentation(features, fit, test, classes, seed=seed),
        "neighbors": nearest_neighbor_segmentation(features, fit, test, classes, cells=10_000, seed=seed),
        "pck": correspondence_accuracy(features, photos, distances=(1.0,), seed=seed)[1.0],
    }


def trained(method: str, lr: float, seed: int, photos: Tensor, args: argparse.Namespace):
    """The backbone, last loss and std; from its file where it has been trained before."""
    path = args.out / f"{method}-lr{lr}-seed{seed}.safetensors"
    torch.manual_seed(seed)
    study = Study(args.backbone, args.layer, args.size).to(photos.device, memory_format=torch.channels_last).train()
    backbone = study.encoder.backbone
    if seed == 0 and path.exists():  # made by the tuning
        backbone.load_state_dict(load_file(path))
        tuning = read_rows(args.out / "tuning.csv")
        row = next(row for row in tuning if (row["method"], float(row["lr"])) == (method, lr))
        return backbone, row["loss"], row["std"]
    loss, std = ("", "") if method == "none" else pretrain(study, method, photos, lr, seed, args)
    save_file({name: value.cpu().contiguous() for name, value in backbone.state_dict().items()}, path)
    return backbone, loss, std


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_row(path: Path, columns: list[str], row: dict[str, object]) -> None:
    """Appends one line, so that several processes may share the file."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()})


def tune(method: str, photos: Tensor, camvid: Camvid, args: argparse.Namespace) -> None:
    """Rows of the grid that are missing, at seed 0."""
    path = args.out / "tuning.csv"
    for lr in [0.0] if method == "none" else args.lrs:
        if any((row["method"], float(row["lr"])) == (method, lr) for row in read_rows(path)):
            continue
        (args.out / f"{method}-lr{lr}-seed0.safetensors").unlink(missing_ok=True)  # of a run that was stopped here
        backbone, loss, std = trained(method, lr, 0, photos, args)
        features = partial(features_of, backbone)
        val = linear_segmentation(features, camvid["train"], camvid["val"], CAMVID_CLASSES)
        add_row(path, TUNING, {"method": method, "lr": lr, "val_linear": val, "loss": loss, "std": std})


def chosen_lr(tuning: list[dict[str, str]], method: str) -> float:
    """The learning rate that CamVid's val split chooses at seed 0."""
    tried = [row for row in tuning if row["method"] == method]
    return float(max(tried, key=lambda row: float(row["val_linear"]))["lr"])


def run(args: argparse.Namespace) -> None:
    """Makes the rows that are missing."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    facts = {column: getattr(args, column) for column in SETTINGS}
    facts |= {"device": name, "torch": torch.__version__, "commit": commit}

    args.out.mkdir(parents=True, exist_ok=True)
    found = read_photos(args.data / "pretrain", args.photos, side=128)
    photos = torch.stack([center_crop(photo, [128, 128]) for photo in found]).to(device)
    camvid = {split: read_camvid(args.data / "camvid", split) for split in ("train", "val", "test")}
    for method in args.only:
        tune(method, photos, camvid, args)
        lr = chosen_lr(read_rows(args.out / "tuning.csv"), method)
        for seed in range(args.seeds):
            if any((row["method"], int(row["seed"])) == (method, seed) for row in read_rows(args.out / "rows.csv")):
                continue
            start = time.perf_counter()
            backbone, loss, std = trained(method, lr, seed, photos, args)
            row = {"method": method, "lr": lr, "seed": seed, "loss": loss, "std": std} | scores(backbone, camvid, seed)
            add_row(args.out / "rows.csv", ROWS, row | facts | {"seconds": time.perf_counter() - start})


def fine_tune(args: argparse.Namespace) -> None:
    """Rows of ``finetune.csv`` that are missing: FCN on CamVid and FCOS on the cards, from the encoders of seed 0."""
    path = args.out / "finetune.csv"
    for method in args.only:
        if any(row["method"] == method for row in read_rows(path)):
            continue
        lr = chosen_lr(read_rows(args.out / "tuning.csv"), method)
        weights, out = args.out / f"{method}-lr{lr}-seed0.safetensors", args.out / "finetune" / method
        miou = fcn_miou(weights, args.data / "camvid", args.backbone, out / "fcn", args.options)
        ap = detector_ap(weights, args.cards, args.backbone, out / "fcos", args.options)
        add_row(path, ["method", "lr", "fcn", "ap", "ap50"], {"method": method, "lr": lr, "fcn": miou} | ap)


def report(folder: Path) -> str:
    """The table, mean and least to greatest over the seeds; and the figure, study.png."""
    from matplotlib.figure import Figure

    rows = read_rows(folder / "rows.csv")
    kept = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    kept = {method: its for method, its in kept.items() if its}
    figure = Figure(figsize=(9, 3.2), dpi=100, layout="constrained")
    for axes, (score, title) in zip(figure.subplots(1, len(SCORES), sharey=True), SCORES.items(), strict=True):
        for height, its in enumerate(kept.values()):
            values = [float(row[score]) for row in its]
            axes.plot(values, [height] * len(values), "o", color=f"C{height}", alpha=0.6)
            axes.plot([statistics.mean(values)] * 2, [height - 0.3, height + 0.3], color=f"C{height}")
        axes.set(title=title, yticks=range(len(kept)), yticklabels=[METHODS[m] for m in kept])
        axes.set_ylim(len(kept) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(folder / "study.png")

    lines = [f"| method | lr | {' | '.join(SCORES.values())} | std | seeds |", "|---" * (4 + len(SCORES)) + "|"]
    for method, its in kept.items():
        cells = []
        for score in SCORES:
            values = [float(row[score]) for row in its]
            cells.append(f"**{statistics.mean(values):.3f}** ({min(values):.3f} to {max(values):.3f})")
        std = "" if method == "none" else f"{statistics.mean(float(row['std']) for row in its):.2f}"
        lr = "" if method == "none" else f"{float(its[0]['lr']):g}"
        lines.append(f"| {METHODS[method]} | {lr} | {' | '.join(cells)} | {std} | {len(its)} |")
    tuned = read_rows(folder / "finetune.csv")
    if tuned:
        lines += ["", "| fine-tuned, seed 0 | FCN, CamVid test mIoU | FCOS, cards val AP | AP50 |", "|---|---|---|---|"]
    for row in tuned:
        lines.append(f"| {METHODS[row['method']]} | {row['fcn']} | {row['ap']} | {row['ap50']} |")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--cards", type=Path, help="also fine-tune; detection set in COCO's layout")
    parser.add_argument("--options", default="", help="of the transfer recipes, with spaces between")
    parser.add_argument("--cpu", action="store_true", help="the reduced size")
    parser.add_argument("--report", action="store_true", help="no training: table and figure from the rows")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, with commas between (%(default)s)")
    parser.add_argument("--photos", type=int, default=7000)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--layer", help="to cut after (layer4; --cpu: layer2)")
    parser.add_argument("--size", type=int, help="of the views (128; --cpu: 64)")
    parser.add_argument("--steps", type=int, help="(400; --cpu: 500)")
    parser.add_argument("--batch-size", type=int, help="(256; --cpu: 32)")
    parser.add_argument("--lrs", help="grid, with commas between (1,2,4; --cpu: 0.5,1.5)")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    small = ("layer2", 64, 500, 32, "0.5,1.5")
    whole = ("layer4", 128, 400, 256, "1,2,4")
    names = ("layer", "size", "steps", "batch_size", "lrs")
    for name, default in zip(names, small if args.cpu else whole, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.cards is not None and args.layer != "layer4":
        parser.error(f"--cards: fine-tuning needs the whole backbone, --layer layer4, got {args.layer}")
    args.lrs = [float(lr) for lr in args.lrs.split(",")]
    args.only, args.options = args.only.split(","), args.options.split()
    if unknown := set(args.only) - set(METHODS):
        parser.error(f"--only: expected some of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if not args.report:
        run(args)
        if args.cards is not None:
            fine_tune(args)
    print(report(args.out))


if __name__ == "__main__":
    main()
