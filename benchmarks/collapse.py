"""A normal run of PixPro and a collapsed one: loss and feature standard deviation, step by step.

    python benchmarks/collapse.py --out runs/collapse

The quickstart's scenes, encoder and views; the PixPro term alone, under LARS. The second run differs in one thing: it
lacks the pixel propagation module. Writes collapse.csv and collapse.png.
"""

import argparse
import csv
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from quickstart import PROJECTED, Encoder, History, draw_views, make_backbone, seed_step, strong_colours
from report import COLLAPSED_BELOW
from scenes import draw_scene

from densessl import EMA, LARS, PPM, DistanceMatcher, PixProLoss, byol_views, param_groups
from densessl.metrics import feature_std

RUNS = {"with PPM": True, "without PPM": False}


def train(propagate: bool, images: Sequence[Tensor], steps: int, batch_size: int, seed: int) -> History:
    """One run: loss and feature standard deviation times sqrt(C) of each step."""
    torch.manual_seed(seed)
    encoder = Encoder(make_backbone()).train()
    ppm = PPM(nn.Conv2d(PROJECTED, PROJECTED, 1)) if propagate else nn.Identity()
    target = EMA(encoder, partial(cosine_schedule, max_steps=steps + 1, start_value=0.99, end_value=1.0)).train()
    optimizer = LARS(param_groups(nn.ModuleList([encoder, ppm]), weight_decay=1e-5), lr=1.0)
    schedule = CosineWarmupScheduler(optimizer, warmup_epochs=max(1, steps // 20), max_epochs=steps + 1)
    crop, recolour = byol_views(64, photometric=False, scale=(0.4, 1.0)), strong_colours()
    match, pixpro = DistanceMatcher(0.7), PixProLoss()

    history = History([], [])
    for step in range(steps):
        seed_step(seed, step)
        view1, view2 = (recolour(v) for v in draw_views(crop, images, batch_size, torch.device("cpu")))
        z1, z2 = encoder(view1.image)[0], encoder(view2.image)[0]
        target.update(encoder)
        t1, t2 = target(view1.image)[0], target(view2.image)[0]
        mask = match(view1.coords, view2.coords, z1.shape[-2:], source_size=view1.source_size)
        loss = 2 * (pixpro(ppm(z1), t2, mask) + pixpro(ppm(z2), t1, mask.mT))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.loss.append(loss.item())
        history.std.append(feature_std(z1).item() * PROJECTED**0.5)
    return history


def write_csv(path: Path, histories: dict[str, History]) -> None:
    """One row a step; two columns a run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{name}: {column}" for name in histories for column in History._fields)])
        columns = [column for history in histories.values() for column in history]
        for step, row in enumerate(zip(*columns, strict=True)):
            writer.writerow([step, *(f"{value:.4f}" for value in row)])


def plot(histories: dict[str, History]):
    """Both curves of all runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, history), color in zip(histories.items(), ("#2a6f97", "#d1495b"), strict=True):
        left.plot(history.loss, color=color, linewidth=1, label=name)
        right.plot(history.std, color=color, linewidth=1.4, label=name)
    left.axhline(-4, color="grey", linestyle=":", linewidth=0.8)
    right.axhline(COLLAPSED_BELOW, color="grey", linestyle="--", linewidth=0.8)
    where = right.get_yaxis_transform()
    right.text(0.99, COLLAPSED_BELOW, "collapsed below", color="grey", transform=where, ha="right", va="bottom")
    left.set(title="loss, in [-4, 4]", xlabel="step")
    right.set(title="std of the projections x sqrt(C)", xlabel="step", ylim=(0, None))
    left.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="per run (%(default)s)")
    parser.add_argument("--images", type=int, default=500, help="scenes to train on (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"), help="(%(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)  # sums in one order: the same numbers wherever it runs beside other work
    print(f"torch {torch.__version__}, {platform.machine()}, one thread")
    images = [draw_scene(0, index)[0] for index in range(args.images)]
    histories = {}
    print("| run | loss: first | lowest | last | std x sqrt(C): first | lowest | last | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name, propagate in RUNS.items():
        start = time.perf_counter()
        loss, std = histories[name] = train(propagate, images, args.steps, args.batch_size, args.seed)
        numbers = [f"{values[0]:.2f} | {min(values):.2f} | {values[-1]:.2f}" for values in (loss, std)]
        print(f"| {name} | {' | '.join(numbers)} | {time.perf_counter() - start:.0f} |", flush=True)
    write_csv(args.out / "collapse.csv", histories)
    plot(histories).savefig(args.out / "collapse.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
