"""The figure of the study: scores over training steps, each arm's mean and standard deviation over seeds.

python benchmarks/studies/compare_figure.py runs/study/rows.csv docs/assets/study.png
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.studies.arms import ARMS
from benchmarks.studies.rows import read_rows

NAMES = {"linear": "linear probe, mIoU", "neighbors": "nearest neighbours, mIoU", "pck": "PCK within one cell"}
# Okabe and Ito's colours, which the colour-blind tell apart, with a marker for each as a second sign.
LOOKS = {
    "byol": ("#56b4e9", "v"), "infonce": ("#0072b2", "^"), "pixcontrast": ("#009e73", "o"), "pixpro": ("#d55e00", "s"),
    "pixpro+infonce": ("#cc79a7", "D"), "pixpro+byol": ("#e69f00", "P"), "densecl": ("#000000", "X"),
}  # fmt: skip


def draw(rows: Sequence[dict[str, str]], path: Path, split: str = "test") -> None:
    """Draws a panel for each labelled set and score; learning rate 0 is a dashed line, as it has no steps.

    Args:
        rows: Rows of compare.py.
        path: File of the figure.
        split: Split whose rows are drawn.
    """
    rows = [row for row in rows if row["split"] == split]
    sets = sorted({row["set"] for row in rows})
    size = (4.0 * len(NAMES), 3.2 * len(sets))
    figure, axes = plt.subplots(len(sets), len(NAMES), figsize=size, sharex=True, layout="constrained", squeeze=False)
    for line, of_set in zip(axes, sets, strict=True):
        for axis, score in zip(line, NAMES, strict=True):
            own = [row for row in rows if row["set"] == of_set]
            still = [float(row[score]) for row in own if row["arm"] == "rate-0"]
            if still:
                axis.axhline(statistics.mean(still), color="#555555", linestyle="--", label=ARMS["rate-0"].title)
            for arm, (colour, marker) in LOOKS.items():
                steps = sorted({int(row["step"]) for row in own if row["arm"] == arm})
                values = [
                    [float(row[score]) for row in own if (row["arm"], row["step"]) == (arm, str(step))]
                    for step in steps
                ]
                if steps:
                    means = [statistics.mean(of_step) for of_step in values]
                    spread = [statistics.stdev(of_step) if len(of_step) > 1 else 0 for of_step in values]
                    marks = {"color": colour, "marker": marker, "markersize": 5, "capsize": 2, "linewidth": 1.3}
                    axis.errorbar(steps, means, spread, label=ARMS[arm].title, **marks)
            axis.set_title(f"{of_set}: {NAMES[score]}", fontsize=10)
            axis.grid(color="#dddddd")
            axis.set_axisbelow(True)
    for axis in axes[-1]:
        axis.set_xlabel("training steps of 64 photos")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("compare_figure.py: expected two paths, the rows and the figure: runs/study/rows.csv study.png")
    draw(read_rows(Path(sys.argv[1])), Path(sys.argv[2]))
