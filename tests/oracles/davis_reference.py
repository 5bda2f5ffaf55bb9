"""J and F of DAVIS 2017 as loops over pixels, from the rules of its toolkit; masks are lists of rows of bool."""

import math

Mask = list[list[bool]]


def region_similarity(ours: Mask, theirs: Mask) -> float:
    """Pixels in both over pixels in either; 1 where both are empty."""
    common = sum(a and b for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True))
    union = sum(a or b for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True))
    return common / union if union else 1.0


def boundary(mask: Mask) -> list[tuple[int, int]]:
    """Pixels whose right, lower or lower right neighbour differs.

    In the last row only the right neighbour is asked, in the last column only the lower one, at the corner none.
    """
    height, width = len(mask), len(mask[0])
    found = []
    for y in range(height):
        for x in range(width):
            asked = []
            if x + 1 < width:
                asked.append((y, x + 1))
            if y + 1 < height:
                asked.append((y + 1, x))
            if x + 1 < width and y + 1 < height:
                asked.append((y + 1, x + 1))
            if any(mask[v][u] != mask[y][x] for v, u in asked):
                found.append((y, x))
    return found


def boundary_accuracy(ours: Mask, theirs: Mask) -> float:
    """Harmonic mean of the shares of each boundary that lies within the tolerance of the other."""
    radius = math.ceil(0.008 * math.sqrt(len(ours) ** 2 + len(ours[0]) ** 2))
    mine, other = boundary(ours), boundary(theirs)
    if not mine and not other:
        return 1.0
    if not mine or not other:
        return 0.0

    def share(asked: list[tuple[int, int]], there: list[tuple[int, int]]) -> float:
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in there) for y, x in asked]
        return sum(near) / len(near)

    precision, recall = share(mine, other), share(other, mine)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(frames: list[float]) -> tuple[float, float, float]:
    """Mean, share above one half, and the loss from the first to the last of four parts that share their ends."""
    count = len(frames)
    ends = [round(1 + part * (count - 1) / 4 + 1e-10) - 1 for part in range(5)]
    first, last = frames[ends[0] : ends[1] + 1], frames[ends[3] : ends[4] + 1]
    return (
        sum(frames) / count,
        sum(value > 0.5 for value in frames) / count,
        sum(first) / len(first) - sum(last) / len(last),
    )
