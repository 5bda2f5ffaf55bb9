"""Trains a small backbone on dense features and shows what it learned, in a few minutes on two CPU cores.

    python examples/quickstart/quickstart.py  # on generated scenes, no download
    python examples/quickstart/quickstart.py --data FOLDER  # on any folder of photos, scored on some that are kept out
    python examples/quickstart/quickstart.py --data FOLDER --probe-data DIR  # scored on labelled images

Afterwards ``runs/quickstart`` holds report.md, figures, and the backbone, which torchvision's own ResNet loads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm import tqdm

from densessl import FeatureMap, MultiView, View, byol_views
from densessl.evaluation import correspondence_accuracy, linear_segmentation
from examples.pretrain.common.collapsed import RANK, STD
from examples.pretrain.common.data.sources import evenly
from examples.pretrain.common.optimizers import SquareRootLARS
from examples.pretrain.common.samples import square
from examples.pretrain.common.step import Step
from examples.pretrain.pixcontrast import PixContrast
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_instance import PixProInstance
from examples.quickstart.loop import fill_statistics, frozen_features, seed_step, strong_colours, train
from examples.quickstart.options import make_parser
from examples.quickstart.photos import CAMVID_CLASSES, read_camvid, read_photos
from examples.quickstart.report import LOSS, MIOU, PCK, Measure, Outcome, health, write_figures, write_report
from examples.quickstart.scenes import CLASSES, draw_scene

METHODS = {
    "pixpro": PixPro,
    "pixcontrast": PixContrast,
    "pixpro+instance": partial(PixProInstance, instance="contrast"),
}
CHANNELS, PROJECTED = 128, 128
LOAD = """\
from safetensors.torch import load_file
from torchvision.models.resnet import BasicBlock, ResNet

resnet = ResNet(BasicBlock, [1, 1, 1, 1])
resnet.load_state_dict(load_file("{path}/backbone.safetensors"), strict=False)  # layer3, layer4, fc stay as they are"""


def make_backbone() -> FeatureMap:
    """torchvision's ResNet with one block a stage, cut at stride 8: 64 px views give 8x8 cells."""
    backbone = FeatureMap(ResNet(BasicBlock, [1, 1, 1, 1]), "layer2")
    return backbone.to(memory_format=torch.channels_last)  # the faster layout, on CPUs and GPUs


class History(NamedTuple):
    """One value a step: the loss, and of the projected unit features the std times sqrt(C) and the effective rank."""

    loss: list[float]
    std: list[float]
    rank: list[float]


def pretrain(backbone: FeatureMap, images: Sequence[Tensor], name: str, args: argparse.Namespace, seed: int) -> History:
    """The method, from views to weights; changes ``backbone`` in place."""
    device = next(backbone.parameters()).device
    method = METHODS[name](backbone, CHANNELS, hidden_dim=512, dim=PROJECTED, pixel_distances=True).to(device)
    # As published. In short trials AdamW made PixPro alone collapse on some data; LARS did not.
    scheduled = SquareRootLARS(args.lr)(method, 1024, args.steps)  # 1,024: --lr is the rate as it is
    losses, deviations, ranks = [], [], []
    start = time.perf_counter()
    # Some containers say that their terminal has no rows. tqdm would show nothing there.
    bar = tqdm(total=args.steps, desc=f"{name}, seed {seed}", unit="step", nrows=20)

    def after(step: int, result: Step) -> None:
        metrics = result.metrics()
        losses.append(result.loss.detach())
        deviations.append(metrics[STD])
        ranks.append(metrics[RANK])
        bar.update()
        if step % 10 == 9 or step + 1 == args.steps:  # reading values back stalls a GPU
            if not losses[-1].isfinite():
                raise SystemExit(f"The loss is {float(losses[-1])} at step {step + 1}: stopped. Try a lower --lr.")
            bar.set_postfix(
                {
                    "loss": f"{float(losses[-1]):.3f}",
                    "lr": f"{scheduled.schedule.get_last_lr()[0]:.2g}",
                    "matched": f"{1 - float(metrics['health/images_without_match']):.0%}",
                    "std": f"{float(deviations[-1]):.2f}",
                    "img/s": f"{(step + 1) * args.batch_size / (time.perf_counter() - start):.0f}",
                }
            )

    train(method, scheduled, drawing(images, args, seed, device), args.steps, after)
    bar.close()
    return History(*(torch.stack(values).tolist() for values in (losses, deviations, ranks)))


def drawing(images: Sequence[Tensor], args: argparse.Namespace, seed: int, device: torch.device):
    """Gives the views of a step; every draw is a function of (seed, step)."""
    crop, recolour = byol_views(args.size, photometric=False, scale=(0.4, 1.0)), strong_colours()

    def draw(step: int) -> list[View]:
        seed_step(seed, step)
        return [recolour(view) for view in draw_views(crop, images, args.batch_size, device)]

    return draw


def draw_views(crop: MultiView, images: Sequence[Tensor], batch_size: int, device: torch.device) -> Iterator[View]:
    """Two crops each of a batch of images: different ones as long as there are enough."""
    if len(images) >= batch_size:
        chosen = torch.randperm(len(images))[:batch_size]
    else:
        chosen = torch.randint(len(images), (batch_size,))
    view1, view2 = default_collate([crop(images[int(i)]) for i in chosen])
    for view in (view1, view2):
        yield View(view.image.to(device, memory_format=torch.channels_last), *(part.to(device) for part in view[1:]))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser(__doc__, tuple(METHODS))
    args = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch_size", 2), ("size", 9), ("seeds", 1), ("images", 1), ("probe_images", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    if not args.lr > 0:
        parser.error(f"--lr: expected a positive number, got {args.lr}")
    return args


def training_images(args: argparse.Namespace) -> list[Tensor]:
    """Photos or scenes, in memory, uint8."""
    if args.data is None:
        return [draw_scene(0, index)[0] for index in tqdm(range(args.images), desc="drawing scenes", nrows=20)]
    photos = read_photos(args.data, args.images, side=2 * args.size, name="--data")
    if "instance" in args.method and len(photos) < args.batch_size:
        # One photo twice in a batch would be its own negative.
        if len(photos) < 2:
            raise ValueError(
                f"--data: {args.method} contrasts photos with each other and needs at least 2, got 1 readable photo in "
                f"{args.data}; --method pixpro and pixcontrast work on one"
            )
        args.batch_size = len(photos)
        print(f"--batch-size: lowered to {len(photos)}, the number of photos, because {args.method} contrasts them")
    return photos


class Probe(NamedTuple):
    """How a backbone is scored: what the score is called, from features to it, on what, and images (B, 3, H, W)."""

    measure: Measure
    score: Callable[[Callable[[Tensor], Tensor]], float]
    what: str
    images: Tensor


def make_probe(images: list[Tensor], args: argparse.Namespace) -> tuple[list[Tensor], Probe]:
    """The images that are left to train on, and the probe: with labels where there are some, else photos kept out."""
    if args.data is not None and args.probe_data is None:
        # So that the last batch of a small set stays as it is, few photos are trained on and scored on alike.
        apart = set(evenly(len(images), min(64, len(images) // 10))) if len(images) >= 2 * args.batch_size else set()
        kept = [square(images[i], 2 * args.size) for i in sorted(apart or range(len(images)))][:64]
        left = [image for i, image in enumerate(images) if i not in apart]
        how = "kept out of" if apart else "which are few, and also in"
        what = f"{len(kept)} photos of {args.data}, {how} the training"
        return left, Probe(
            PCK, lambda f: correspondence_accuracy(f, kept, distances=(1.0,))[1.0], what, torch.stack(kept)
        )
    if args.probe_data is not None:
        fit, test = (read_camvid(args.probe_data, split, "--probe-data") for split in ("train", "test"))
        classes, where = CAMVID_CLASSES, f"of {args.probe_data}"
    else:  # seeds 1 and 2: other scenes than those trained on
        fit, test = ([draw_scene(seed, i) for i in range(args.probe_images)] for seed in (1, 2))
        classes, where = len(CLASSES), "generated scenes"
    return images, Probe(
        MIOU,
        lambda features: linear_segmentation(features, fit, test, classes),
        f"{len(fit)} + {len(test)} {where}",
        torch.stack([image for image, _ in test[:32]]),
    )


def main(argv: Sequence[str] | None = None) -> list[Outcome]:
    """Trains, probes and writes the run folder; returns what it wrote."""
    args = arguments(argv)
    start = time.perf_counter()
    try:
        images, probe = make_probe(training_images(args), args)
    except ValueError as error:
        raise SystemExit(f"quickstart: error: {error}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    outcomes: list[Outcome] = []
    shown = images[min(3, len(images) - 1)]  # among the scenes, one with something in the middle
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        backbone = make_backbone().to(device)
        features = partial(frozen_features, backbone)
        fill_statistics(backbone, drawing(images, args, seed, device))
        untrained = probe.score(features)
        if seed == 0:  # the file and the figures show one seed; the report all of them
            maps = [features(shown[None])[0]]
        history = pretrain(backbone, images, args.method, args, seed)
        trained = probe.score(features)
        std, rank = health(features(probe.images[:32]))
        last = max(1, args.steps // 10)
        projected = [statistics.mean(values[-last:]) for values in (history.std, history.rank)]
        outcomes.append(Outcome(seed, untrained, trained, std, rank, *projected, history.loss, history.std))
        if seed == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            weights = {name: value.cpu().contiguous() for name, value in backbone.state_dict().items()}
            (args.out / "backbone.safetensors").write_bytes(save(weights))  # save_file lets no other user read it
            seed_step(seed)
            views = byol_views(args.size, photometric=False, scale=(0.3, 0.8))(shown)
            cells = features(views[0].image[None]).shape[-2:]
            maps.append(features(shown[None])[0])

    write_figures(args.out, outcomes, *views, cells, shown, *maps)
    facts = {
        "method": f"{args.method}, {args.steps} steps of {args.batch_size} images, views of {args.size} px",
        "trained on": f"{len(images)} " + (f"photos of {args.data}" if args.data else "generated scenes"),
        "probed on": probe.what,
        "device": f"{device}, {torch.get_num_threads()} threads",
        "time": f"{time.perf_counter() - start:.0f} s",
    }
    about = LOAD.format(path=args.out), probe.measure, LOSS[args.method]
    print("\n" + write_report(args.out / "report.md", outcomes, CHANNELS, facts, *about))
    print(f"Written to {args.out}: report.md, backbone.safetensors and six figures (.png)")
    return outcomes


if __name__ == "__main__":
    main()
