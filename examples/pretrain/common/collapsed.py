"""When the features of a run count as collapsed."""

import torch
from torch import Tensor

STD, RANK = "health/std_times_sqrt_c", "health/effective_rank"
STD_BELOW, RANK_BELOW = 0.3, 10.0
STD_FLOOR = 0.1


def collapsed(std: float, rank: float) -> bool:
    """Whether nearly all features point in one direction.

    Below a deviation of 0.1 they do. Between 0.1 and 0.3 the effective rank decides: NeCo's features lie close to one
    direction and still differ in some twenty others (docs/results.md), while PixPro's are well spread in few. The rank
    alone decides nothing, since a little noise around one direction has a high rank.

    Args:
        std: Standard deviation of the unit features times sqrt(C); NaN counts as collapsed.
        rank: Effective rank; NaN where it was not measured, and the standard deviation alone decides.
    """
    return not std >= STD_FLOOR or (not std >= STD_BELOW and not rank >= RANK_BELOW)


def bounds_crossed(std: float, rank: float) -> tuple[float, float | None]:
    """The bounds that a collapsed reading is below: of the deviation, and of the rank where that decided as well."""
    if std >= STD_FLOOR and rank == rank:
        return STD_BELOW, RANK_BELOW
    return (STD_BELOW if std >= STD_FLOOR else STD_FLOOR), None


def worst(stds: Tensor, ranks: Tensor) -> Tensor:
    """Index of the reading to judge a run by: the lowest deviation among those that collapsed, or else among all.

    Args:
        stds: Standard deviations times sqrt(C), ``(N,)``.
        ranks: Effective ranks, ``(N,)``.
    """
    down = ~(stds >= STD_FLOOR) | (~(stds >= STD_BELOW) & ~(ranks >= RANK_BELOW))
    # Deviations of unit features are at most 1, so every reading that collapsed comes before every other.
    return torch.where(down, stds.nan_to_num() - 2, stds).argmin()
