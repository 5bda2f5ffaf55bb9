"""What the rows of compare.py say: a table, and the study's primary endpoint."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t as student

from benchmarks.studies.arms import ARMS
from benchmarks.studies.bootstrap import Overlaps, bootstrap, load_overlaps

SCORES = ("linear", "neighbors", "pck", "pck_colour")
LEVEL = 0.01  # in mIoU: two arms whose means are no further apart count as level


def report(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: mean and standard deviation over seeds of every score, per labelled set, arm and step."""
    rows = [row for row in rows if row["split"] == "test"]
    lines = [
        "| set | method | steps | lr | seeds | linear | neighbours | PCK | PCK, colours | std |",
        "|---" * 10 + "|",
    ]
    order = list(ARMS)
    keys = sorted({(row["set"], int(row["step"]), order.index(row["arm"])) for row in rows})
    for of_set, step, number in keys:
        arm = order[number]
        own = [r for r in rows if (r["set"], int(r["step"]), r["arm"]) == (of_set, step, arm)]
        cells = [of_set, ARMS[arm].title, str(step), f"{float(own[0]['lr']):g}", str(len(own))]
        for score in SCORES:
            values = [float(row[score]) for row in own]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        stds = [float(row["std"]) for row in own if row["std"]]
        lines.append("| " + " | ".join([*cells, f"{statistics.mean(stds):.2f}" if stds else ""]) + " |")
    return "\n".join(lines)


def seed_means(rows: Sequence[dict[str, str]], arm: str, steps: int) -> dict[int, float]:
    """Mean of the test sets' linear mIoU for each seed of an arm after so many steps."""
    own = [row for row in rows if (row["arm"], row["split"], row["step"]) == (arm, "test", str(steps))]
    seeds = sorted({int(row["seed"]) for row in own})
    return {seed: statistics.mean(float(row["linear"]) for row in own if int(row["seed"]) == seed) for seed in seeds}


def paired(first: dict[int, float], second: dict[int, float]) -> tuple[float, float, int]:
    """Mean of the differences over common seeds, half of its 95 % t interval, and the number of pairs.

    The half is infinite with one pair: nothing is known about the spread then.
    """
    gains = [first[seed] - second[seed] for seed in first if seed in second]
    count = len(gains)
    half = student.ppf(0.975, count - 1) * statistics.stdev(gains) / count**0.5 if count > 1 else float("inf")
    return statistics.mean(gains), float(half), count


def verdict(mean: float, half: float) -> str:
    """``level`` within 0.01; else ``ahead`` or ``behind`` if the interval leaves out 0, or ``undecided``."""
    if abs(mean) <= LEVEL:
        return "level"
    if abs(mean) <= half:
        return "undecided"
    return "ahead" if mean > 0 else "behind"


def over_images(rows: Sequence[dict[str, str]], first: str, second: str, steps: int, folder: Path) -> str:
    """The bootstrap interval over test images, as text; empty where the overlaps of a run are not in the folder."""
    held: list[list[Overlaps]] = []
    seeds = seed_means(rows, first, steps).keys() & seed_means(rows, second, steps).keys()
    for arm in (first, second):
        own = [row for row in rows if (row["arm"], row["split"], row["step"]) == (arm, "test", str(steps))]
        sets = sorted({row["set"] for row in own})
        lrs = {int(row["seed"]): float(row["lr"]) for row in own}
        files = [folder / f"{arm}-lr{lrs[seed]:g}-seed{seed}-{steps}.safetensors" for seed in sorted(seeds)]
        found = [load_overlaps(file, sets) for file in files]
        if not found or any(overlaps is None for overlaps in found):
            return ""
        held.append([overlaps for overlaps in found if overlaps is not None])
    low, high = bootstrap(*held)
    return f"{low:+.3f} to {high:+.3f}"


def endpoints(rows: Sequence[dict[str, str]], steps: int, folder: Path) -> str:
    """Markdown: the study's primary endpoint at the full length; empty as long as its arms have no rows.

    PixPro is compared with the instance arm whose mean is higher, and PixPro + InfoNCE with InfoNCE. The interval that
    the verdict hangs on is that over seeds; the one over test images stands beside it.
    """
    means = {arm: seed_means(rows, arm, steps) for arm in ("pixpro", "byol", "infonce", "pixpro+infonce")}
    if not all(means.values()):
        return ""
    better = max(("byol", "infonce"), key=lambda arm: statistics.mean(means[arm].values()))
    lines = ["| linear mIoU, mean of the sets | seeds | difference | 95 % over seeds | 95 % over images | |"]
    lines.append("|---" * 6 + "|")
    for first, second in (("pixpro", better), ("pixpro+infonce", "infonce")):
        mean, half, count = paired(means[first], means[second])
        title = f"{ARMS[first].title} - {ARMS[second].title}"
        interval = f"{mean - half:+.3f} to {mean + half:+.3f}"
        images = over_images(rows, first, second, steps, folder)
        lines.append(f"| {title} | {count} | {mean:+.3f} | {interval} | {images} | {verdict(mean, half)} |")
    return "\n".join(lines)
