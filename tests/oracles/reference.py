"""Slow references, written from the papers' equations: one loop per sum, Python floats (float64), no library code."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Box = tuple[float, float, float, float]
Size = tuple[int, int]
Cells = list[tuple[float, float, float]]  # x, y and diagonal of each cell, row-major
Rows = Sequence[Sequence[float]]


# --- where the cells lie, and Eq. 1 ----------------------------------------------------------------------------------


def box_cells(box: Box, size: Size, scale: tuple[float, float] = (1.0, 1.0)) -> Cells:
    """Cells of a crop x0 y0 x1 y1 (x0 > x1 where flipped), in units of ``scale`` (width, height)."""
    x0, y0, x1, y1 = box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]
    height, width = size
    bin_x, bin_y = (x1 - x0) / width, (y1 - y0) / height
    return [
        (x0 + (j + 0.5) * bin_x, y0 + (i + 0.5) * bin_y, math.hypot(bin_x, bin_y))
        for i in range(height)
        for j in range(width)
    ]


def homography_cells(matrix: Rows, size: Size, scale: tuple[float, float] = (1.0, 1.0)) -> Cells:
    """Cells of any projective view; the derivatives by central differences."""

    def point(x: float, y: float) -> tuple[float, float]:
        u, v, w = (row[0] * x + row[1] * y + row[2] for row in matrix)
        return u / w * scale[0], v / w * scale[1]

    height, width = size
    step = 1e-6
    cells = []
    for i in range(height):
        for j in range(width):
            x, y = (j + 0.5) / width, (i + 0.5) / height
            (ax, ay), (bx, by) = point(x + step, y), point(x - step, y)
            (cx, cy), (dx, dy) = point(x, y + step), point(x, y - step)
            along_x = math.hypot(ax - bx, ay - by) / (2 * step) / width
            along_y = math.hypot(cx - dx, cy - dy) / (2 * step) / height
            cells.append((*point(x, y), math.hypot(along_x, along_y)))
    return cells


UNITS: dict[str, Callable[[float, float], float]] = {
    "max": max,
    "min": min,
    "query": lambda query, key: query,
    "key": lambda query, key: key,
}


def distances(query: Cells, key: Cells, unit: str = "max") -> list[list[float]]:
    return [[math.hypot(ax - bx, ay - by) / UNITS[unit](ad, bd) for bx, by, bd in key] for ax, ay, ad in query]


def matches(
    query: Cells, key: Cells, threshold: float, unit: str = "max", source: tuple[float, float] = (1.0, 1.0)
) -> list[list[bool]]:
    """Closer than the threshold, and both inside the source image of that width and height."""

    def within(cell: tuple[float, float, float]) -> bool:
        return 0 <= cell[0] <= source[0] and 0 <= cell[1] <= source[1]

    table = distances(query, key, unit)
    return [
        [table[i][j] < threshold and within(query[i]) and within(key[j]) for j in range(len(key))]
        for i in range(len(query))
    ]


# --- losses and propagation ------------------------------------------------------------------------------------------


def tokens(features: Tensor) -> Tensor:
    """(B, C, h, w) as (B, N, C), cell by cell."""
    if features.ndim == 3:
        return features
    cells = [features[:, :, i, j] for i in range(features.shape[2]) for j in range(features.shape[3])]
    return torch.stack(cells, 1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of a vector with another, or with each row of a matrix."""
    return (a * b).sum(-1) / ((a * a).sum(-1).sqrt() * (b * b).sum(-1).sqrt())


def over_images(per_image: list[Tensor | None], reduction: str, no_match: str, zero: Tensor) -> Tensor:
    values = [zero if value is None else value for value in per_image]
    if reduction == "none":
        return torch.stack(values)
    left = values if no_match == "zero" else [value for value in per_image if value is not None]
    return sum(left, zero) / max(len(left), 1)


def pixpro_loss(query: Tensor, key: Tensor, mask: Tensor, reduction: str = "mean", no_match: str = "zero") -> Tensor:
    """Eq. 5, one direction: minus the mean cosine of the positive pairs; differentiable."""
    query, key = tokens(query), tokens(key)
    per_image: list[Tensor | None] = []
    for b in range(len(query)):
        found = [cosine(query[b, i], key[b, j]) for i, j in mask[b].nonzero().tolist()]
        per_image.append(-sum(found) / len(found) if found else None)
    return over_images(per_image, reduction, no_match, 0 * (query.sum() + key.sum()))


def pixcontrast_loss(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    temperature: float,
    reduction: str = "mean",
    no_match: str = "zero",
    valid_k: Tensor | None = None,
    ignore: Tensor | None = None,
) -> Tensor:
    """Eq. 2, one direction: the sum over positives stands inside the logarithm; invalid keys are as if not there.

    Ignored pairs stand in neither sum, except for those that are positive.
    """
    query, key = tokens(query), tokens(key)
    per_image: list[Tensor | None] = []
    for b in range(len(query)):
        per_cell = []
        for i in range(query.shape[1]):
            there = [j for j in range(key.shape[1]) if valid_k is None or valid_k[b, j]]
            if any(mask[b, i, j] for j in there):
                terms = (cosine(query[b, i], key[b]) / temperature).exp()
                positives = sum(terms[j] for j in there if mask[b, i, j])
                every = [j for j in there if ignore is None or mask[b, i, j] or not ignore[b, i, j]]
                per_cell.append(-(positives / sum(terms[j] for j in every)).log())
        per_image.append(sum(per_cell) / len(per_cell) if per_cell else None)
    return over_images(per_image, reduction, no_match, 0 * (query.sum() + key.sum()))


def prototype_loss(
    query: Tensor,
    key: Tensor,
    valid: Tensor,
    center: Tensor,
    temperatures: tuple[float, float] = (0.1, 0.04),
    reduction: str = "mean",
    no_match: str = "zero",
) -> Tensor:
    """iBOT: cross entropy of the shares of prototypes, over the cells that count. Scores (B, K, h, w) or (B, N, K)."""

    def shares(scores: Tensor, temperature: float) -> Tensor:
        powers = ((scores - scores.max()) / temperature).exp()
        return powers / powers.sum()

    per_image: list[Tensor | None] = []
    for s, t, counts in zip(tokens(query), tokens(key), valid.flatten(1).tolist(), strict=True):
        terms = [
            -(shares(t[i] - center, temperatures[1]) * shares(s[i], temperatures[0]).log()).sum()
            for i in range(len(s))
            if counts[i]
        ]
        per_image.append(sum(terms) / len(terms) if terms else None)
    return over_images(per_image, reduction, no_match, 0 * query[0].sum())


def nt_xent(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss over the 2B vectors: each against its partner and the 2B - 2 others."""
    vectors, count = torch.cat([query, key]), len(query)
    total = torch.zeros((), dtype=vectors.dtype)
    for i in range(2 * count):
        terms = {k: (cosine(vectors[i], vectors[k]) / temperature).exp() for k in range(2 * count) if k != i}
        total = total - (terms[(i + count) % (2 * count)] / sum(terms.values())).log()
    return total / (2 * count)


def propagate(
    x: Tensor,
    g: Callable[[Tensor], Tensor],
    gamma: float,
    normalize_values: bool,
    offset: float = 0.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Eqs. 3 and 4 on (B, C, h, w); g takes one cell's (C,). The code's value is L2-normalised, the paper's is not.

    Where valid (B, N) is given, the sum is over those cells alone.
    """
    cells = tokens(x)
    out = []
    for b in range(len(cells)):
        for i in range(cells.shape[1]):
            total = 0 * g(cells[b, i])
            for j in range(cells.shape[1]):
                if valid is not None and not valid[b, j]:
                    continue
                weight = (cosine(cells[b, i], cells[b, j]).clamp(min=0) + offset) ** gamma
                value = g(cells[b, j])
                total = total + weight * (value / value.norm() if normalize_values else value)
            out.append(total)
    return torch.stack(out).unflatten(0, (x.shape[0], x.shape[2], x.shape[3])).permute(0, 3, 1, 2)


# --- optimiser -------------------------------------------------------------------------------------------------------


class LoopLARS:
    """The published rule, tensor by tensor: decay, ratio (not for tensors of one dimension), momentum."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float, decay: Callable[[Tensor], float], trust: float
    ) -> None:
        self.params, self.lr, self.momentum, self.decay, self.trust = params, lr, momentum, decay, trust
        self.velocity = [torch.zeros_like(p) for p in params]

    def step(self) -> None:
        for p, velocity in zip(self.params, self.velocity, strict=True):
            if p.grad is None:
                continue
            d = p.grad + self.decay(p) * p.detach()
            if p.ndim > 1:
                size, length = math.sqrt(float((p.detach() ** 2).sum())), math.sqrt(float((d**2).sum()))
                if size > 0 and length > 0:
                    d = d * (self.trust * size / (length + 1e-8))
            velocity.copy_(self.momentum * velocity + d)
            p.data = p.data - self.lr * velocity


# --- nearest pairs ---------------------------------------------------------------------------------------------------


def nearest(
    cost: Rows, allowed: Sequence[Sequence[bool]], keep: int | None, mutual: bool
) -> list[tuple[int, int, bool]]:
    """Pairs of one image; the first of equals wins; unused slots are (0, 0, False)."""
    rows, columns = len(cost), len(cost[0])

    def usable(i: int, j: int) -> bool:
        return allowed[i][j] and math.isfinite(cost[i][j])

    found: list[tuple[int, int] | None] = []
    for i in range(rows):
        partner = min((j for j in range(columns) if usable(i, j)), key=lambda j: (cost[i][j], j), default=None)
        if partner is not None and mutual:
            back = min((k for k in range(rows) if usable(k, partner)), key=lambda k: (cost[k][partner], k))
            partner = partner if back == i else None
        found.append(None if partner is None else (i, partner))
    if keep is not None:
        good = sorted((pair for pair in found if pair is not None), key=lambda pair: cost[pair[0]][pair[1]])
        found = [*good, *[None] * rows][:keep]
    return [(0, 0, False) if pair is None else (*pair, True) for pair in found]


# --- meters ----------------------------------------------------------------------------------------------------------


def feature_std(features: Tensor) -> float:
    cells = tokens(features).flatten(0, 1).tolist()
    unit = [[value / math.sqrt(sum(v * v for v in cell)) for value in cell] for cell in cells]
    total = 0.0
    for channel in zip(*unit, strict=True):
        mean = sum(channel) / len(channel)
        total += math.sqrt(sum((value - mean) ** 2 for value in channel) / len(channel))
    return total / len(unit[0])


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of the matrix of unit features."""
    cells = tokens(features).flatten(0, 1)
    values = torch.linalg.svdvals(torch.stack([cell / cell.norm() for cell in cells])).tolist()
    share = [value / sum(values) for value in values]
    return math.exp(-sum(p * math.log(p) for p in share if p > 0))


def pair_similarity(query: Tensor, key: Tensor, mask: Tensor) -> tuple[float, float]:
    query, key = tokens(query), tokens(key)
    sums = {True: [0.0, 0], False: [0.0, 0]}
    for b in range(len(query)):
        for i in range(query.shape[1]):
            for j in range(key.shape[1]):
                entry = sums[bool(mask[b, i, j])]
                entry[0] += float(cosine(query[b, i], key[b, j]))
                entry[1] += 1
    return tuple(total / count if count else math.nan for total, count in (sums[True], sums[False]))


def propagation_entropy(features: Tensor, gamma: float, offset: float = 0.0) -> float:
    cells = tokens(features)
    n = cells.shape[1]
    total = 0.0
    for b in range(len(cells)):
        for i in range(n):
            weights = [(max(float(cosine(cells[b, i], cells[b, j])), 0.0) + offset) ** gamma for j in range(n)]
            share = [weight / sum(weights) for weight in weights]
            total -= sum(p * math.log(p) for p in share if p > 0)
    return total / (len(cells) * n) / math.log(n)
