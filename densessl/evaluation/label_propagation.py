"""Carries the labels of a video's first frame through the others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl.evaluation._refuse import check_at_least, check_finite, check_floating, check_positive
from densessl.evaluation._search import candidates


@torch.no_grad()
def propagate_labels(
    features: Tensor,
    first: Tensor,
    *,
    neighbors: int = 5,
    radius: int = 12,
    frames: int = 7,
    temperature: float = 0.1,
) -> Tensor:
    """Carries the class shares of the first frame through a video, frame by frame.

    Each cell takes the mean of the shares of the most similar cells of its context, which is the first frame and the
    last few, weighted by ``exp(cos / temperature)``. The most similar are taken over all frames of the context
    together. Source and defaults: the video evaluation of DINO (Caron et al. 2021), ``eval_video_segmentation.py``.
    Memory is bounded by the window of ``2 * radius + 1`` cells.

    Args:
        features: Feature maps of one video, in order, floating point ``(T, C, h, w)``.
        first: Class shares of the first frame, floating point ``(K, h, w)``.
        neighbors: Number of cells that vote, at least 1, over all frames together.
        radius: How many rows and how many columns away a cell may at most be to be looked at; 0 looks at all.
        frames: How many of the last frames are context besides the first one; 0 or more.
        temperature: Temperature of the weights, greater than 0.

    Returns:
        ``(T - 1, K, h, w)``, the class shares of all frames but the first.

    Raises:
        ValueError: If an argument has another shape, values are not finite, or a setting is out of range.
    """
    check_floating(features, ("T", "C", "h", "w"), "features")
    check_floating(first, ("K", "h", "w"), "first")
    if features.shape[2:] != first.shape[1:]:
        raise ValueError(f"first: expected (K, h, w) of size {tuple(features.shape[2:])}, got {tuple(first.shape)}")
    check_at_least(neighbors, 1, "neighbors")
    check_at_least(radius, 0, "radius")
    check_at_least(frames, 0, "frames")
    check_positive(temperature, "temperature")
    check_finite(features, "features")
    check_finite(first, "first")
    count, _, h, w = features.shape
    if radius == 0 and neighbors > h * w:
        raise ValueError(f"neighbors: expected at most as many as there are cells, {h * w}, got {neighbors}")
    shares = torch.empty(count, *first.shape, device=first.device)
    shares[0] = first
    # The frames of the context are normalised once and kept channels last, as the products read them.
    units: dict[int, Tensor] = {0: _unit(features[0])}
    for time in range(1, count):
        context = [0, *range(max(1, time - frames), time)]
        target = _unit(features[time])
        units = {index: units[index] for index in context}
        for top, left, bottom, right in _tiles(h, w, radius, len(context)):
            shares[time, :, top:bottom, left:right] = _carried(
                target[top:bottom, left:right],
                list(units.values()),
                shares[context],
                (top, left),
                neighbors,
                radius or max(h, w),
                temperature,
            )
        units[time] = target
    return shares[1:].to(first.dtype)


def _unit(features: Tensor) -> Tensor:
    """Unit features (h, w, C) of a frame (C, h, w)."""
    return F.normalize(features.float(), dim=0).movedim(0, -1).contiguous()


def _tiles(h: int, w: int, radius: int, context: int) -> list[tuple[int, int, int, int]]:
    """Tiles of target cells, as (top, left, bottom, right); near the radius the least work is done in vain."""
    side = min(max(radius, 4), 12)
    if radius == 0:
        rows, columns = 1, max(1, min(w, (1 << 23) // (context * h * w)))
    else:
        rows, columns = side, side
    return [
        (top, left, min(top + rows, h), min(left + columns, w))
        for top in range(0, h, rows)
        for left in range(0, w, columns)
    ]


def _carried(
    target: Tensor,
    units: list[Tensor],
    shares: Tensor,
    corner: tuple[int, int],
    neighbors: int,
    radius: int,
    temperature: float,
) -> Tensor:
    """Class shares (K, rows, columns) of one tile of target cells (rows, columns, C)."""
    rows, columns, channels = target.shape
    h, w = units[0].shape[:2]
    top, bottom = max(0, corner[0] - radius), min(h, corner[0] + rows + radius)
    left, right = max(0, corner[1] - radius), min(w, corner[1] + columns + radius)
    flat = target.reshape(-1, channels)
    similar = torch.stack([flat @ unit[top:bottom, left:right].reshape(-1, channels).mT for unit in units], 1)
    near_y = _near(corner[0], rows, top, bottom, radius, target.device)
    near_x = _near(corner[1], columns, left, right, radius, target.device)
    near = near_y[:, None, :, None] & near_x[None, :, None, :]
    similar = similar.masked_fill_(~near.flatten(2).flatten(0, 1).unsqueeze(1), -torch.inf).flatten(1)
    neighbors = min(neighbors, similar.shape[1])
    scores, places = candidates(similar, neighbors)
    best, chosen = scores.topk(neighbors, dim=1)
    place = places.gather(1, chosen)
    weights = (best / temperature).softmax(1)
    sources = shares[:, :, top:bottom, left:right].movedim(1, -1).reshape(-1, shares.shape[1])
    return (weights.unsqueeze(1) @ sources[place]).squeeze(1).mT.reshape(-1, rows, columns)


def _near(start: int, count: int, low: int, high: int, radius: int, device: torch.device) -> Tensor:
    """Which of the rows low..high-1 are within the radius of each of the rows from start on, bool."""
    rows, sources = torch.arange(start, start + count, device=device), torch.arange(low, high, device=device)
    return (rows[:, None] - sources).abs() <= radius
