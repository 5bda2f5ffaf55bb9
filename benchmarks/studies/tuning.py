"""The choice of a learning rate on val splits, from the rows of compare.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def val_scores(rows: Sequence[dict[str, str]], arm: str, steps: int, sets: int = 1) -> dict[float, float]:
    """Mean of the linear scores on the val sets at the full length, for each learning rate scored on all of them."""
    done = [r for r in rows if r["arm"] == arm and r["split"] == "val" and r["step"] in (str(steps), "0")]
    own = {lr: [float(r["linear"]) for r in done if float(r["lr"]) == lr] for lr in {float(r["lr"]) for r in done}}
    return {lr: statistics.mean(values) for lr, values in own.items() if len(values) >= sets}


def chosen_lr(rows: Sequence[dict[str, str]], arm: str, steps: int) -> float:
    """The learning rate with the best mean of the linear scores on the val sets, at the full length.

    Rates that are scored on fewer sets than others, because tuning was stopped, are left out.

    Raises:
        ValueError: If no rate was tried.
    """
    scored, sets = val_scores(rows, arm, steps), 2
    while more := val_scores(rows, arm, steps, sets):
        scored, sets = more, sets + 1
    if not scored:
        raise ValueError(f"--stage: expected rows of --stage tune for {arm} first, or --lr")
    return max(sorted(scored), key=scored.__getitem__)


def next_lr(scored: dict[float, float], lrs: Sequence[float]) -> float | None:
    """The learning rate that tuning tries next; None where both neighbours of the best one are worse.

    The search begins with the middle rates and climbs from the best one so far: rates beyond a worse one are not tried.

    Args:
        scored: Score of each rate tried so far; rates that are not in ``lrs`` are left out.
        lrs: Rates to choose from, in rising order.
    """
    for lr in lrs[(len(lrs) - 1) // 2 : len(lrs) // 2 + 1]:
        if lr not in scored:
            return lr
    best = max((lr for lr in lrs if lr in scored), key=scored.__getitem__)
    place = lrs.index(best)
    return next((lr for lr in lrs[max(place - 1, 0) : place + 2] if lr not in scored), None)
