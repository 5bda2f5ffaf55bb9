"""What a reading of the probe costs, in training steps: processor time of both on drawn scenes, one core.

    OMP_NUM_THREADS=1 python benchmarks/probe_cost.py [--backbone resnet50] [--size 128] [--images 4]

A step of ``adapt.py`` is timed on some images and counted for 32. The reading is of 64 photos without labels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.io import write_jpeg

from examples.pretrain import adapt
from examples.pretrain.common.cli import make_run
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.preview.speed import on_device
from examples.pretrain.common.samples import read_squares
from examples.pretrain.common.scores import frozen, scores
from examples.pretrain.common.watch import form_of
from examples.quickstart.scenes import draw_scene

BATCH, PHOTOS, SPACING = 32, 64, 200


def processor_seconds(do: Callable[[], object], times: int = 1) -> float:
    """The least processor time of several calls."""
    taken = []
    for _ in range(times):
        begun = time.process_time()
        do()
        taken.append(time.process_time() - begun)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone", default="resnet50", help="Name of the backbone in torchvision or timm (%(default)s)."
    )
    parser.add_argument(
        "--size", type=int, default=128, help="Side of the views and of the photos in pixels (%(default)s)."
    )
    parser.add_argument("--images", type=int, default=4, help="Images of a timed step (%(default)s).")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        photos = Path(place, "photos")
        photos.mkdir()
        for index in range(2 * PHOTOS):
            write_jpeg(draw_scene(0, index, size=2 * args.size)[0], str(photos / f"{index:03}.jpg"))
        run = make_run(adapt.recipe(), [
            f"--data.folder={photos}", f"--out={place}/run", f"--backbone.name={args.backbone}", "--data.workers=0",
            "--backbone.init=random", f"--data.size={args.size}", f"--probe.images={PHOTOS}",
            "--trainer.accelerator=cpu"])  # fmt: skip
        run.data.trainer = run.trainer
        loader = run.data.source.loader(run.data.draw, 3, batch_size=args.images, rank=0, world_size=1, workers=0)
        batches, method = iter(loader), run.method.train()
        optimizer, _ = run.module.optimizer(method, BATCH, SPACING)

        def step() -> None:
            one, other = (on_device(run, index, view) for index, view in enumerate(next(batches)[:2]))
            optimizer.zero_grad()
            method(one, other).loss.backward()
            optimizer.step()
            method.target.update(method.encoder)

        form = form_of(run.config)
        sample = read_squares(run.data.source.held_out(), *form[:2])
        one_step = processor_seconds(step, times=4) * BATCH / args.images
        with frozen(backbone_of(method), form) as features:
            reading = processor_seconds(lambda: scores(features, sample))
    steps = reading / one_step
    print(
        f"{args.backbone}, {args.size} px: a step of {BATCH} images {one_step:.1f} s, a reading of {len(sample)} photos"
        f" {reading:.1f} s or {steps:.2f} steps; {steps / SPACING:.2%} at {SPACING} steps apart, 2 % at"
        f" {steps / 0.02:.0f}"
    )


if __name__ == "__main__":
    main()
