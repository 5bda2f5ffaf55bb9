"""What a quickstart run leaves behind: figures and a short report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from densessl import DistanceMatcher, View
from densessl.plots import plot_correspondence, plot_pca, plot_similarity

COLLAPSED_BELOW = 0.3  # feature standard deviation times sqrt(C); a healthy one is near 1


# What the curve of the spread does, for readers who see it fall below the line.
DIP = (
    'The spread of the projections (right curve of loss.png) may fall below the dashed line, "collapsed below", and '
    "rise again: early on the views agree by all cells becoming alike, and only then are cells told apart. The "
    'quickstart stays there for some 60 steps. A collapse is a spread that stays there: the column "projected" '
    'is its mean over the last tenth of the steps, and "health" judges that one.'
)


class Measure(NamedTuple):
    """A score of frozen features.

    Attributes:
        name: As in a sentence.
        what: What it is, before and after being named.
    """

    name: str
    what: str


MIOU = Measure("mIoU", "Linear segmentation probe on frozen features (mIoU, test split)")
PCK = Measure("PCK", "Correspondence: how often the same point is found again in a warped photo (PCK within one cell)")


class Outcome(NamedTuple):
    """One pretraining seed.

    Attributes:
        seed: Seed of the initial weights and of all random draws.
        untrained: Score of the frozen features before training, batch norm's statistics filled.
        trained: Score of the frozen features after training.
        std: Standard deviation of the frozen unit features, times sqrt(C).
        projected_std: Standard deviation of the unit projections, times sqrt(C), over the last tenth of the steps.
        rank: Effective rank of the frozen features.
        losses: Loss of each step.
        deviations: ``projected_std`` of each step.
    """

    seed: int
    untrained: float
    trained: float
    std: float
    projected_std: float
    rank: float
    losses: list[float]
    deviations: list[float]

    @property
    def collapsed(self) -> bool:
        """Whether features or projections are the same everywhere."""
        return not min(self.std, self.projected_std) >= COLLAPSED_BELOW


def write_report(
    path: Path,
    outcomes: Sequence[Outcome],
    channels: int,
    facts: dict[str, str],
    load_line: str,
    measure: Measure = MIOU,
) -> str:
    """Writes report.md and returns its text."""
    lines = ["# Quickstart", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [
        f"{measure.what}, before and after pretraining:",
        "",
        f"| seed | untrained | trained | feature std x sqrt(C) | projected | effective rank of {channels} | health |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        health = "**collapsed**" if o.collapsed else "not collapsed"
        lines.append(
            f"| {o.seed} | {o.untrained:.3f} | {o.trained:.3f} | {o.std:.2f} | {o.projected_std:.2f} | {o.rank:.1f} "
            f"| {health} |"
        )
    before, after = [o.untrained for o in outcomes], [o.trained for o in outcomes]
    lines += ["", f"{measure.name} untrained {_spread(before)}, trained {_spread(after)}."]
    if statistics.mean(after) <= statistics.mean(before):
        lines.append("The trained features are NOT better than the untrained ones here.")
    if any(o.collapsed for o in outcomes):
        lines.append(
            f"At least one run collapsed: a feature standard deviation below {COLLAPSED_BELOW} / sqrt(C) means that "
            "all cells look alike."
        )
    lines += ["", DIP, "", "The backbone in torchvision:", "", "```python", load_line, "```", ""]
    text = "\n".join(lines)
    path.write_text(text, encoding="utf-8")
    return text


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f} over {len(values)} seeds)"


def write_figures(
    folder: Path,
    outcomes: Sequence[Outcome],
    view1: View,
    view2: View,
    cells: tuple[int, int],
    image: Tensor,
    features: Tensor,
):
    """Writes the four figures.

    Args:
        folder: Existing folder that the report is written to.
        outcomes: One outcome per seed.
        view1: A single view, before its colours were changed.
        view2: Another of the same image.
        cells: Size of the views' feature maps.
        image: The whole image, uint8 ``(3, H, W)``.
        features: Its feature map ``(C, h, w)``.
    """
    plot_losses(outcomes).savefig(folder / "loss.png")
    coords = view1.coords[None], view2.coords[None]
    mask = DistanceMatcher(0.7)(*coords, cells, source_size=view1.source_size[None])[0]
    plot_correspondence(view1.image, view2.image, mask, cells).savefig(folder / "correspondence.png")
    h, w = features.shape[1:]
    # Cells share a common direction (ReLU features are positive): without it, differences show.
    centred = features - features.mean((1, 2), keepdim=True)
    plot_similarity(centred, image, (h // 2) * w + w // 2).savefig(folder / "similarity.png")
    plot_pca(features, image).savefig(folder / "pca.png")


def plot_losses(outcomes: Sequence[Outcome]):
    """Loss and feature standard deviation over the steps, one line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, o in enumerate(outcomes):
        left.plot(o.losses, color=f"C{index}", alpha=0.25, linewidth=0.8)
        width = max(1, len(o.losses) // 25)
        smooth = np.convolve(o.losses, np.ones(width) / width, mode="valid")
        left.plot(np.arange(len(smooth)) + (width - 1) / 2, smooth, color=f"C{index}", label=f"seed {o.seed}")
        right.plot(o.deviations, color=f"C{index}", label=f"seed {o.seed}")
    right.axhline(COLLAPSED_BELOW, color="grey", linestyle="--", linewidth=0.8)
    right.text(
        0.99,
        COLLAPSED_BELOW,
        "collapsed below, if it stays there",
        color="grey",
        transform=right.get_yaxis_transform(),
        ha="right",
        va="bottom",
    )
    right.set_ylim(bottom=0)
    left.set(title="loss (thin: each step; thick: running mean)", xlabel="step")
    right.set(title="std of the projections x sqrt(C)", xlabel="step")
    left.legend()
    return figure


def health(features: Tensor) -> tuple[float, float]:
    """Feature standard deviation times sqrt(C), and effective rank, of maps ``(B, C, h, w)``."""
    from densessl.metrics import effective_rank, feature_std

    with torch.no_grad():
        return float(feature_std(features)) * features.shape[1] ** 0.5, float(effective_rank(features))
