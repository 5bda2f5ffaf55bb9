"""When the features of a run count as collapsed."""

STD, RANK = "health/std_times_sqrt_c", "health/effective_rank"
STD_BELOW, RANK_BELOW = 0.3, 10.0


def collapsed(std: float, rank: float) -> bool:
    """Whether features are both close to one direction and in few others.

    Neither number says it alone: NeCo's projections lie close to one direction and differ in some twenty others
    (docs/results.md), and PixPro's are well spread but use few directions.

    Args:
        std: Standard deviation of the unit features times sqrt(C); NaN counts as collapsed.
        rank: Effective rank; NaN where it was not measured, and the standard deviation alone decides.
    """
    return not std >= STD_BELOW and not rank >= RANK_BELOW
