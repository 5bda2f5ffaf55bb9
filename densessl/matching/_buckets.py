"""Positive pairs from buckets: cells of any two maps that lie close together, without a homography to invert.

A grid of square buckets is laid over the centres of one map, about one bucket per cell. A cell of the other map looks
into the buckets that its disc touches. The radius of the disc is the threshold times the cell's own diagonal. A few
very large cells, such as those across the edges of objects, therefore widen only their own search. Pairs that are
measured in the query cell's diagonal are searched from the query's side, those measured in the key cell's from the
key's side. The matcher's distance decides whether two cells do match, so exactly the pairs of the dense mask are found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densessl.geometry import Unit, offset_distance
from densessl.matching._windows import Cells, runs_of_blocks

_SMALLEST = 1e-15  # squares of smaller lengths would vanish in float32, and the distance with them
_SIDE_LIMIT = 2048  # buckets along one axis; more would cost memory and find nothing sooner


def pairs_in_buckets(query: Cells, key: Cells, threshold: float, unit: Unit, block: int) -> Tensor:
    """The pairs that are closer than the threshold.

    Args:
        query: Query cells.
        key: Key cells.
        threshold: Largest distance, in cell diagonals.
        unit: Which diagonal counts, as in ``cell_distance``.
        block: How many pairs are looked at together.

    Returns:
        Image, query cell and key cell of each pair, int64 ``(3, P)``; no pair twice, in no order.
    """
    found = []
    if unit != "key":
        image, near, far = _search(query, key, threshold, unit, block, from_query=True)
        found.append(torch.stack([image, near, far]))
    if unit != "query":
        image, near, far = _search(key, query, threshold, unit, block, from_query=False)
        found.append(torch.stack([image, far, near]))
    return torch.cat(found, 1)


def _search(
    seekers: Cells, targets: Cells, threshold: float, unit: Unit, block: int, from_query: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, seeker and target of the pairs that are measured in the seeker's diagonal."""
    n_seekers, n_targets = seekers.allowed.shape[1], targets.allowed.shape[1]
    low, high, side, across = _layout(targets)

    def bucket(position: Tensor, axis: int, image: Tensor) -> Tensor:
        """Column or row of a bucket; the same rounding for both maps, so that order is kept."""
        place = ((position - low[image, axis]) / side[image]).floor()
        return place.clamp(0, across - 1).long()

    # The targets sorted by bucket, so that those of neighbouring buckets in one row follow each other.
    held = targets.allowed.flatten().nonzero()[:, 0]
    image = held // n_targets
    x, y = targets.centers.flatten(0, 1)[held].double().unbind(1)
    number = (image * across + bucket(y, 1, image)) * across + bucket(x, 0, image)
    order = number.argsort()
    held = held[order]
    counts = torch.zeros(len(targets.allowed) * across * across + 1, dtype=torch.int64, device=held.device)
    starts = counts.index_add_(0, number + 1, torch.ones_like(number)).cumsum(0)

    # Pairs every seeker with every row of buckets that its disc touches.
    cells = seekers.allowed.flatten().nonzero()[:, 0]
    image = cells // n_seekers
    diagonal = seekers.diagonal.flatten()[cells]
    if unit == "min":
        # A pair counts for the seeker only if the target's cell is as large as its own.
        largest = torch.where(targets.allowed, targets.diagonal, 0.0).amax(1)
        diagonal = torch.minimum(diagonal, largest[image])
    radius = (diagonal.double() * (threshold * (1 + 1e-5))).clamp(min=_SMALLEST)  # distances are rounded
    x, y = seekers.centers.flatten(0, 1)[cells].double().unbind(1)
    (left, above), (right, below) = low[image].unbind(1), high[image].unbind(1)
    near = (x + radius >= left) & (x - radius <= right) & (y + radius >= above) & (y - radius <= below)
    cells, image, radius, x, y = (part[near] for part in (cells, image, radius, x, y))
    top = bucket(y - radius, 1, image)
    height = bucket(y + radius, 1, image) - top + 1
    owner = torch.repeat_interleave(height)
    step = torch.arange(len(owner), device=owner.device) - (height.cumsum(0) - height)[owner]
    row = (image * across + top)[owner] + step
    first = starts[row * across + bucket(x - radius, 0, image)[owner]]
    length = starts[row * across + bucket(x + radius, 0, image)[owner] + 1] - first
    filled = length.nonzero()[:, 0]
    owner, first, length = cells[owner[filled]], first[filled], length[filled]

    ends = length.cumsum(0)
    centers, diagonals = seekers.centers.flatten(0, 1), seekers.diagonal.flatten()
    other_centers, other_diagonals = targets.centers.flatten(0, 1), targets.diagonal.flatten()
    found = [(cells[:0], cells[:0])]
    for begin, end, before, total in runs_of_blocks(ends, block):
        part = torch.arange(begin, end, device=ends.device)
        part = torch.repeat_interleave(part, length[begin:end], output_size=total)
        place = torch.arange(before, before + total, device=ends.device) - (ends - length)[part]
        own, other = owner[part], held[first[part] + place]
        offset, mine, others = centers[own] - other_centers[other], diagonals[own], other_diagonals[other]
        pair = (mine, others) if from_query else (others, mine)
        distance = offset_distance(offset[:, 0], offset[:, 1], *pair, unit=unit)
        hit = ((distance < threshold) & _is_mine(mine, others, unit, from_query)).nonzero()[:, 0]
        found.append((own[hit], other[hit]))
    own, other = (torch.cat(side) for side in zip(*found, strict=True))
    return own // n_seekers, own % n_seekers, other % n_targets


def _is_mine(mine: Tensor, others: Tensor, unit: Unit, from_query: bool) -> Tensor:
    """Which pairs are measured in the seeker's diagonal; where both are equal, the query's side has them."""
    if unit in ("query", "key"):
        return torch.ones_like(mine, dtype=torch.bool)
    ahead, behind = (mine, others) if unit == "max" else (others, mine)
    return ahead >= behind if from_query else ahead > behind


def _layout(targets: Cells) -> tuple[Tensor, Tensor, Tensor, int]:
    """Two corners ``(B, 2)`` and side ``(B,)`` of the buckets of every image, and their number along one axis.

    The corners of an image without a target are infinite: nothing lies near them.
    """
    known = targets.allowed[..., None]
    centers = targets.centers.double()
    low = torch.where(known, centers, torch.inf).amin(1)
    high = torch.where(known, centers, -torch.inf).amax(1)
    across = min(_SIDE_LIMIT, max(1, round(targets.allowed.shape[1] ** 0.5)))
    extent = (high - low).amax(1)
    # An image without a target, or with all targets in one place, still needs a side to divide by.
    usable = extent.isfinite() & (extent > 0)
    return low, high, torch.where(usable, extent / across, 1.0), across
