"""A normal run of PixPro and a collapsed one: loss, feature standard deviation and effective rank, step by step.

    python benchmarks/studies/collapse.py --out runs/collapse

The quickstart's scenes, encoder and views; the PixPro term alone, under LARS. The second run differs in one thing: it
lacks the pixel propagation module. Writes collapse.csv and collapse.png.
"""

import argparse
import csv
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.pretrain.common.optimizers import SquareRootLARS
from examples.pretrain.pixpro import PixPro
from examples.quickstart.loop import train as train_method
from examples.quickstart.quickstart import CHANNELS, PROJECTED, drawing, make_backbone
from examples.quickstart.report import COLLAPSED_BELOW
from examples.quickstart.scenes import draw_scene

RUNS = {"with PPM": True, "without PPM": False}


class Curves(NamedTuple):
    """What a run reads in each step: the loss, the projections' std times sqrt(C), and their effective rank."""

    loss: list[float]
    std: list[float]
    rank: list[float]


class NoPropagation(nn.Module):
    """Stands in for the pixel propagation module and changes nothing."""

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        return features


def train(propagate: bool, images: Sequence[Tensor], args: argparse.Namespace) -> Curves:
    """One run."""
    torch.manual_seed(args.seed)
    method = PixPro(make_backbone(), CHANNELS, hidden_dim=512, dim=PROJECTED, pixel_distances=True)
    if not propagate:
        method.ppm = NoPropagation()
    curves = Curves([], [], [])

    def after(step: int, result) -> None:
        metrics = result.metrics()
        curves.loss.append(result.loss.item())
        curves.std.append(metrics["health/std_times_sqrt_c"].item())
        curves.rank.append(metrics["health/effective_rank"].item())

    draw = drawing(images, args, args.seed, torch.device("cpu"))
    train_method(method, SquareRootLARS(1.0)(method, 1024, args.steps), draw, args.steps, after)
    return curves


def write_csv(path: Path, histories: dict[str, Curves]) -> None:
    """One row a step; three columns a run."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"{name}: {column}" for name in histories for column in Curves._fields)])
        columns = [column for history in histories.values() for column in history]
        for step, row in enumerate(zip(*columns, strict=True)):
            writer.writerow([step, *(f"{value:.4f}" for value in row)])


def plot(histories: dict[str, Curves]):
    """Loss and standard deviation of all runs."""
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
    parser.add_argument("--steps", type=int, default=300, help="Steps of a run (%(default)s).")
    parser.add_argument("--images", type=int, default=500, help="Scenes to train on (%(default)s).")
    parser.add_argument("--batch-size", type=int, default=32, help="Images of a step (%(default)s).")
    parser.add_argument("--size", type=int, default=64, help="Side of the views in pixels (%(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of networks, scenes and views (%(default)s).")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/collapse"), help="Folder of the plot and its values (%(default)s)."
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)  # sums in one order: the same numbers wherever it runs beside other work
    print(f"torch {torch.__version__}, {platform.machine()}, one thread")
    images = [draw_scene(0, index)[0] for index in range(args.images)]
    histories = {}
    print("| run | loss: first | lowest | last | std x sqrt(C): first | lowest | last | rank: last | seconds |")
    print("|---" * 9 + "|")
    for name, propagate in RUNS.items():
        start = time.perf_counter()
        loss, std, rank = histories[name] = train(propagate, images, args)
        numbers = [f"{values[0]:.2f} | {min(values):.2f} | {values[-1]:.2f}" for values in (loss, std)]
        print(f"| {name} | {' | '.join(numbers)} | {rank[-1]:.1f} | {time.perf_counter() - start:.0f} |", flush=True)
    write_csv(args.out / "collapse.csv", histories)
    plot(histories).savefig(args.out / "collapse.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
