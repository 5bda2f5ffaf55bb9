"""The inverse of dense coords, found by search: where in a view a place of the source is seen."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl.geometry._points import sample_dense, unit_grid

_STEPS = 12  # in the last steps, each doubles the digits of Newton's method
_TOLERANCE = 0.02  # in pixels of the view: how near a place must come to the one that is searched for
_SPREADS = 4  # rounds in which empty cells of the table take a neighbour's guess


def inverse_dense(dense: Tensor, points: Tensor) -> Tensor:
    """Inverts dense coords at some points, from a table of first guesses on by Newton's method.

    If several places show the same point (folds), one of them is found.

    Args:
        dense: Dense coords ``(B, 2, H, W)``, from the view to its source.
        points: Points ``(B, N, 2)``, x and y in the source's unit square.

    Returns:
        Points ``(B, N, 2)``, x and y in the view's unit square; NaN where the view does not show the point, or it is
        unknown.
    """
    h, w = dense.shape[-2:]
    place = _first_guess(dense, points)
    dx, dy = (place.new_tensor(step) for step in ([0.5 / w, 0.0], [0.0, 0.5 / h]))

    def between(step: Tensor) -> Tensor:
        """Change of position across the pixel around the place, or across the half of it that is known."""
        after, before = (place + step).clamp(0, 1), (place - step).clamp(0, 1)
        seen, at = (sample_dense(dense, where) for where in (after, before))
        middle = sample_dense(dense, place)
        both = (seen - at) / ((after - before).sum(-1, keepdim=True))
        ahead = (seen - middle) / (after - place).sum(-1, keepdim=True)
        behind = (middle - at) / (place - before).sum(-1, keepdim=True)
        return torch.where(both.isnan(), torch.where(ahead.isnan(), behind, ahead), both)

    best = torch.full_like(place[..., 0], torch.inf)
    answer = torch.full_like(place, torch.nan)
    for _ in range(_STEPS):
        missing = points - sample_dense(dense, place)
        (a, c), (b, d) = between(dx).unbind(-1), between(dy).unbind(-1)
        determinant = a * d - b * c
        u, v = missing.unbind(-1)
        step = torch.stack([d * u - b * v, a * v - c * u], -1) / determinant[..., None]
        error = (step * step.new_tensor([w, h])).norm(dim=-1)
        better = error < best  # NaN compares as False
        answer, best = torch.where(better[..., None], place, answer), torch.where(better, error, best)
        place = torch.where(step.isfinite(), place + step, place).clamp(0, 1)
    return torch.where((best < _TOLERANCE)[..., None], answer, torch.nan)


def _first_guess(dense: Tensor, points: Tensor) -> Tensor:
    """Centre of a view pixel near each point, from a table over the part of the source that the view shows."""
    batch, _, h, w = dense.shape
    flat = dense.flatten(2).mT
    known = flat.isfinite().all(-1)
    low = torch.where(known[..., None], flat, torch.inf).amin(1, keepdim=True)
    high = torch.where(known[..., None], flat, -torch.inf).amax(1, keepdim=True)
    extent = (high - low).clamp(min=1e-12)

    def cell(where: Tensor) -> Tensor:
        share = torch.nan_to_num((where - low) / extent, nan=0.0, posinf=1.0, neginf=0.0).clamp(0, 1)
        column, row = (share[..., 0] * w).long().clamp(max=w - 1), (share[..., 1] * h).long().clamp(max=h - 1)
        return row * w + column

    number = torch.arange(h * w, device=dense.device).expand(batch, -1)
    table = torch.full_like(number, -1)
    # Takes the largest number of a cell's pixels: any would do, but it must always be the same one.
    table = table.scatter_reduce(1, cell(flat), torch.where(known, number, -1), "amax")
    for _ in range(_SPREADS):
        around = torch.nn.functional.max_pool2d(table.unflatten(1, (h, w)).double(), 3, stride=1, padding=1)
        table = torch.where(table < 0, around.flatten(1).long(), table)
    guess = table.gather(1, cell(points))
    x, y = unit_grid((h, w), dense)
    # A guess that is not known starts from the middle.
    guess = torch.where(guess < 0, (h // 2) * w + w // 2, guess)
    return torch.stack([x[guess], y[guess]], -1)
