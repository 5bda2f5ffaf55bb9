"""What the rows of compare.py say: a table, and the study's primary endpoint."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import t as student

from benchmarks.studies.arms import ARMS
from benchmarks.studies.bootstrap import Overlaps, bootstrap, load_overlaps
from benchmarks.studies.rows import encoder_of
from benchmarks.studies.tuning import chosen_lr, val_scores

SCORES = ("linear", "neighbors", "pck", "pck_colour")
LEVEL = 0.01  # in mIoU: two arms whose means are no further apart count as level


def report(rows: Sequence[dict[str, str]]) -> str:
    """Markdown: mean and standard deviation over seeds of every score, per labelled set, step, arm and rate."""
    rows = [row for row in rows if row["split"] == "test"]
    lines = [
        "| set | method | steps | lr | seeds | linear | neighbours | PCK | PCK, colours | std |",
        "|---" * 10 + "|",
    ]
    order = list(ARMS)
    keys = sorted({(row["set"], int(row["step"]), order.index(row["arm"]), float(row["lr"])) for row in rows})
    for of_set, step, number, lr in keys:
        key = (of_set, step, order[number], lr)
        own = [r for r in rows if (r["set"], int(r["step"]), r["arm"], float(r["lr"])) == key]
        cells = [of_set, ARMS[order[number]].title, str(step), f"{lr:g}", str(len(own))]
        for score in SCORES:
            values = [float(row[score]) for row in own]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        stds = [float(row["std"]) for row in own if row["std"]]
        lines.append("| " + " | ".join([*cells, f"{statistics.mean(stds):.2f}" if stds else ""]) + " |")
    return "\n".join(lines)


def final_rows(rows: Sequence[dict[str, str]], arm: str, steps: int) -> list[dict[str, str]]:
    """The arm's rows on the test sets after so many steps, at one rate.

    Where there are several rates, that is the one which tuning chose; none if tuning chose another one.
    """
    own = [row for row in rows if (row["arm"], row["split"], row["step"]) == (arm, "test", str(steps))]
    rates = {float(row["lr"]) for row in own}
    if len(rates) > 1:
        rates = {chosen_lr(rows, arm, steps)} if val_scores(rows, arm, steps) else set()
    return [row for row in own if float(row["lr"]) in rates]


def seed_means(rows: Sequence[dict[str, str]], sets: int) -> dict[int, float]:
    """Mean of the sets' linear mIoU for each seed of an arm; seeds that are not scored on all sets are left out.

    Args:
        rows: Rows of one arm, of one rate.
        sets: Number of labelled sets.
    """
    seeds = sorted({int(row["seed"]) for row in rows})
    own = {seed: [float(row["linear"]) for row in rows if int(row["seed"]) == seed] for seed in seeds}
    return {seed: statistics.mean(values) for seed, values in own.items() if len(values) == sets}


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


def over_images(
    first: Sequence[dict[str, str]], second: Sequence[dict[str, str]], seeds: Sequence[int], folder: Path
) -> str:
    """The bootstrap interval over test images, as text; empty where two arms have no images to compare.

    That is so if the overlaps of a run are not in the folder, or are those of other images.

    Args:
        first: Rows of one arm.
        second: Rows of the other arm.
        seeds: Seeds that both have, scored on all sets.
        folder: Where the overlaps lie.
    """
    sets = sorted({row["set"] for row in first})
    held: list[list[Overlaps]] = []
    for own in (first, second):
        files = [encoder_of(folder, own[0] | {"seed": seed}) for seed in seeds]
        held.append([overlaps for file in files if (overlaps := load_overlaps(file, sets)) is not None])
    shapes = {tuple(overlaps[name].shape for name in sets) for arm in held for overlaps in arm}
    if not seeds or any(len(arm) < len(seeds) for arm in held) or len(shapes) > 1:
        return ""
    low, high = bootstrap(*held)
    return f"{low:+.3f} to {high:+.3f}"


def endpoints(rows: Sequence[dict[str, str]], steps: int, folder: Path) -> str:
    """Markdown: the study's primary endpoint at the full length; empty as long as one of its arms has no whole seed.

    PixPro is compared with the instance arm whose mean is higher, and PixPro + InfoNCE with InfoNCE. The interval that
    the verdict hangs on is that over seeds; the one over test images stands beside it.
    """
    own = {arm: final_rows(rows, arm, steps) for arm in ("pixpro", "byol", "infonce", "pixpro+infonce")}
    sets = len({row["set"] for of_arm in own.values() for row in of_arm})
    means = {arm: seed_means(of_arm, sets) for arm, of_arm in own.items()}
    if not all(means.values()):
        return ""
    better = max(("byol", "infonce"), key=lambda arm: statistics.mean(means[arm].values()))
    lines = ["| linear mIoU, mean of the sets | seeds | difference | 95 % over seeds | 95 % over images | |"]
    lines.append("|---" * 6 + "|")
    for first, second in (("pixpro", better), ("pixpro+infonce", "infonce")):
        seeds = sorted(means[first].keys() & means[second].keys())
        if not seeds:
            continue
        mean, half, count = paired(means[first], means[second])
        title = f"{ARMS[first].title} - {ARMS[second].title}"
        interval = f"{mean - half:+.3f} to {mean + half:+.3f}"
        images = over_images(own[first], own[second], seeds, folder)
        lines.append(f"| {title} | {count} | {mean:+.3f} | {interval} | {images} | {verdict(mean, half)} |")
    return "\n".join(lines)
