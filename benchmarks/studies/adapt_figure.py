"""The figure of the page Adapt a pretrained backbone: each recipe's difference to the start, a point for every seed.

python benchmarks/studies/adapt_figure.py docs/assets/adapt-rows.csv docs/assets/adapt.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.studies.adapt import RECIPES, SCORES
from benchmarks.studies.rows import read_rows

NAMES = {"linear": "linear mIoU", "neighbors": "neighbours, mIoU", "pck": "PCK, 1 cell"}
COLOURS = {"camvid": "#0072b2", "nuclei": "#d55e00"}  # told apart by the colour-blind too
LEFT_OUT = ("start", "random")


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draws the figure.

    Args:
        rows: Rows of adapt.py.
        path: File of the figure.
    """
    rows = [row for row in rows if row["split"] == "test"]
    start = {row["set"]: row for row in rows if row["arm"] == "start"}
    shown = [name for name in RECIPES if name not in LEFT_OUT and any(row["arm"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(SCORES), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, score in zip(axes, SCORES, strict=True):
        axis.axvline(0, color="#555555", linewidth=1)
        for place, name in enumerate(shown):
            for shift, of_set in zip((0.15, -0.15), sorted(start), strict=False):
                points = [
                    float(row[score]) - float(start[of_set][score])
                    for row in rows
                    if (row["arm"], row["set"]) == (name, of_set)
                ]
                marks = {"color": COLOURS[of_set], "marker": "o" if of_set == "camvid" else "s", "s": 22}
                axis.scatter(points, [-place + shift] * len(points), label=of_set if place == 0 else None, **marks)
        axis.set_xlabel(f"{NAMES[score]}, less the start's")
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
    axes[0].set_yticks([-place for place in range(len(shown))], [RECIPES[name].title for name in shown])
    axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(read_rows(Path(sys.argv[1])), Path(sys.argv[2]))
