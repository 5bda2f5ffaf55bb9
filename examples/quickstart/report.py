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
from examples.pretrain.common.collapsed import RANK_BELOW, STD_FLOOR, collapsed
from examples.pretrain.common.collapsed import STD_BELOW as COLLAPSED_BELOW

# Colour and line of each seed, after Okabe and Ito: told apart by those who see no red or green, and in grey.
SEEDS = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
JUDGED_FROM = 100  # steps: the quickstart spends some 60 below the line and rises again


# What the curve of the spread does, for readers who see it fall below the line.
DIP = (
    "Early in training all cells become similar; later they separate again. In the quickstart this dip lasts about 60 "
    "steps. A run that stays below the dashed line of loss.png can have collapsed. The table also judges the backbone."
)
STD = (
    "std is the standard deviation of the projected unit features times sqrt(C), as the progress bar and loss.png show "
    "it, and rank their effective rank: in how many directions they differ. Both are means over the last tenth of the "
    "steps. An std near 1 is healthy. The columns of the backbone are the same two numbers for its frozen features. A "
    f"run counts as collapsed if one of the two stds is below {STD_FLOOR}, or below {COLLAPSED_BELOW} with the rank "
    f"beside it below {RANK_BELOW:g}."
)
# Why the loss of a method is above 0, by the quickstart's names.
LOSS = {
    "pixpro": "The loss is twice minus a cosine in each direction, from -4 to 4; above 0 the matched cells are unlike.",
    "pixcontrast": "The loss is above 0 because it is InfoNCE between cells, which is never below 0.",
    "pixpro+instance": (
        "The loss is above 0 where the InfoNCE of the instance term, which is never below 0, is larger than the term "
        "of PixPro is negative (minus a cosine, at best -4). A positive loss is therefore no fault."
    ),
}
# What to see in each figure.
FIGURES = {
    "loss": "The loss should fall. std should end above the dashed line.",
    "correspondence": (
        "Two views of one image. Lines join cells that show the same place; the training makes their features alike."
    ),
    "similarity-untrained": "How alike all cells are to the framed one before the training, with seed 0.",
    "similarity": "The same after the training. Bright cells should be the same object or the same kind of texture.",
    "pca-untrained": "Equal colours mean alike features: before the training, with seed 0.",
    "pca": (
        "The same after the training; the colours of the two figures do not compare. The colours are the three main "
        'directions in which the features differ; "3 components hold 39%" means that they show 39 % of all '
        "differences, and the picture leaves out the rest."
    ),
}


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
        std: Standard deviation of the backbone's frozen unit features, times sqrt(C).
        rank: Effective rank of the frozen features.
        projected_std: As ``std``, of the projected unit features; mean over the last tenth of the steps.
        projected_rank: Effective rank of the projected features; mean over the last tenth of the steps.
        losses: Loss of each step.
        deviations: ``projected_std`` of each step.
    """

    seed: int
    untrained: float
    trained: float
    std: float
    rank: float
    projected_std: float
    projected_rank: float
    losses: list[float]
    deviations: list[float]

    @property
    def projections_alike(self) -> bool:
        """Whether the projected features are almost the same everywhere."""
        return collapsed(self.projected_std, self.projected_rank)

    @property
    def below(self) -> bool:
        """Whether the projected features or the backbone's are almost the same everywhere."""
        return self.projections_alike or collapsed(self.std, self.rank)

    @property
    def collapsed(self) -> bool:
        """Whether they still are after enough steps to have left the dip behind."""
        return self.below and self.long

    @property
    def long(self) -> bool:
        """Whether the run is long enough to be judged."""
        return len(self.losses) >= JUDGED_FROM

    @property
    def health(self) -> str:
        """The verdict, as in the table."""
        if not self.long:
            return "too short to judge"
        return "**collapsed**" if self.collapsed else "not collapsed"


def write_report(
    path: Path,
    outcomes: Sequence[Outcome],
    channels: int,
    facts: dict[str, str],
    load_line: str,
    measure: Measure = MIOU,
    about_loss: str = "",
) -> str:
    """Writes report.md and returns its text; ``about_loss`` says why the loss is positive, where it is."""
    lines = ["# Quickstart", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [
        f"{measure.what}, before and after pretraining:",
        "",
        f"| seed | untrained | trained | std | rank | std, backbone | rank of {channels}, backbone | health |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        lines.append(
            f"| {o.seed} | {o.untrained:.3f} | {o.trained:.3f} | {o.projected_std:.2f} | {o.projected_rank:.1f} "
            f"| {o.std:.2f} | {o.rank:.1f} | {o.health} |"
        )
    before, after = [o.untrained for o in outcomes], [o.trained for o in outcomes]
    lines += ["", f"{measure.name} untrained {_spread(before)}, trained {_spread(after)}."]
    if statistics.mean(after) <= statistics.mean(before):
        lines.append("The trained features are NOT better than the untrained ones here.")
    if any(o.below for o in outcomes):
        whose = "projected" if any(o.projections_alike for o in outcomes) else "backbone's"
        lines.append(
            f"In at least one run the {whose} features had nearly all drawn together at the end. In a run of under "
            f"{JUDGED_FROM} steps this is normal; in a longer one it means collapse."
        )
    lines += ["", STD, "", DIP, ""]
    if about_loss and any(o.losses[-1] > 0 for o in outcomes):
        lines += [about_loss, ""]
    for name, what in FIGURES.items():
        lines += [f"![{name}]({name}.png)", "", f"{name}.png: {what}", ""]
    lines += ["The backbone in torchvision:", "", "```python", load_line, "```", ""]
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
    untrained: Tensor,
    features: Tensor,
) -> None:
    """Writes the figures.

    Args:
        folder: Existing folder that the report is written to.
        outcomes: One outcome per seed.
        view1: A single view, before its colours were changed.
        view2: Another of the same image.
        cells: Size of the views' feature maps.
        image: The whole image, uint8 ``(3, H, W)``.
        untrained: Its feature map ``(C, h, w)`` before the training.
        features: Its feature map after the training.
    """
    plot_losses(outcomes).savefig(folder / "loss.png")
    coords = view1.coords[None], view2.coords[None]
    mask = DistanceMatcher(0.7)(*coords, cells, source_size=view1.source_size[None])[0]
    plot_correspondence(view1.image, view2.image, mask, cells).savefig(folder / "correspondence.png")
    h, w = features.shape[1:]
    for of, suffix in ((untrained, "-untrained"), (features, "")):
        # Cells share a common direction (ReLU features are positive): without it, differences show.
        centred = of - of.mean((1, 2), keepdim=True)
        plot_similarity(centred, image, (h // 2) * w + w // 2).savefig(folder / f"similarity{suffix}.png")
        plot_pca(of, image).savefig(folder / f"pca{suffix}.png")


def plot_losses(outcomes: Sequence[Outcome]):
    """Loss and feature standard deviation over the steps, one line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    smoothed = False
    for index, o in enumerate(outcomes):
        width, (colour, line) = max(1, len(o.losses) // 25), SEEDS[index % len(SEEDS)]
        curve = np.convolve(o.losses, np.ones(width) / width, mode="valid")
        if width > 1:
            left.plot(o.losses, color=colour, alpha=0.25, linewidth=0.8)
            smoothed = True
        left.plot(np.arange(len(curve)) + (width - 1) / 2, curve, line, color=colour, label=f"seed {o.seed}")
        right.plot(o.deviations, line, color=colour, label=f"seed {o.seed}")
    label = f"may have collapsed below {COLLAPSED_BELOW}, if it stays there"
    limit = right.axhline(COLLAPSED_BELOW, color="grey", linestyle="--", linewidth=0.8, label=label)
    right.set_ylim(0, 1.05)  # of unit features it is at most 1: the figures of two runs compare
    left.set(title="loss (thin: each step; thick: running mean)" if smoothed else "loss of each step")
    left.set(xlabel="step", ylabel="loss (no unit)")
    right.set(title="std of the projected unit features", xlabel="step", ylabel="std x sqrt(C) (no unit)")
    left.legend()
    right.legend(handles=[limit])
    return figure


def health(features: Tensor) -> tuple[float, float]:
    """Feature standard deviation times sqrt(C), and effective rank, of maps ``(B, C, h, w)``."""
    from densessl.metrics import effective_rank, feature_std

    with torch.no_grad():
        return float(feature_std(features)) * features.shape[1] ** 0.5, float(effective_rank(features))
