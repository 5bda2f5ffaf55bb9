"""Whether features find the same point again in a warped photo; needs no labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import cast

import torch
from torch import Tensor

from densessl._normalize import normalized
from densessl._tensors import check_tensor
from densessl.evaluation._batches import Features
from densessl.evaluation._processes import from_all
from densessl.evaluation._refuse import check_at_least, check_maps
from densessl.evaluation._together import dealt, in_batches, in_turn, summed
from densessl.features import map_to_tokens
from densessl.geometry import cell_centers, inside, warp

_TABLE = 1 << 24  # similarities held at once


def correspondence_accuracy(
    features: Features,
    photos: Sequence[Tensor],
    *,
    distances: Sequence[float] = (1.0, 2.0),
    photometric: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[float, float]:
    """Percentage of correct keypoints (PCK) between photos and warped copies of them.

    Each photo is warped by a homography drawn at random: turned by up to 30 degrees, cut to 60 to 100 % of its sides,
    in perspective. Every cell of the copy that shows part of the photo looks for the most similar cell of the photo.
    The answer is right within d if the distance between that cell's centre and the true place is at most d cells, along
    each axis in cells of that axis. Perfect features are within 0.71 cells, half a diagonal.

    In several processes (``torch.distributed``) the work is shared: pass the same photos in all, or each its own share,
    ``photos[rank::processes]``. All return the shares over all photos.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        photos: The photos, uint8 ``(3, H, W)`` each; sizes may differ.
        distances: Distances d, in cells of the feature map. Compare backbones of one stride only.
        photometric: What is done to the copies, uint8 ``(B, 3, H, W)``; None: nothing. Of several processes each has
            its own photos of a batch changed.
        batch_size: Number of images encoded at once.
        seed: Seed of the homographies.

    Returns:
        For each distance the share of cells within it, 0..1.

    Raises:
        ValueError: If there is no photo, or an argument has another shape or dtype.
    """
    check_at_least(batch_size, 1, "batch_size")
    if not (hasattr(photos, "__len__") and hasattr(photos, "__getitem__")):
        raise ValueError(f"photos: expected a sequence of images uint8 (3, H, W), got {type(photos).__name__}")
    several = isinstance(distances, Sequence) and not isinstance(distances, str) and len(distances) > 0
    if not several or not all(isinstance(distance, Real) and 0 < distance < math.inf for distance in distances):
        raise ValueError(f"distances: expected positive numbers of cells, at least one, got {distances!r}")
    if sum(from_all(len(photos))) == 0:
        raise ValueError("photos: expected at least one, got none")
    generator = torch.Generator().manual_seed(seed)
    right, asked = torch.zeros(len(distances), dtype=torch.float64), 0
    every = in_turn(_read(cast(Sequence[Tensor], dealt(photos))), lambda photo: tuple(photo.shape), batch_size)
    for batch in in_batches(every, lambda photo: photo[0], batch_size):
        # Drawn for the photos of all processes, so that the copies do not depend on their number.
        coords = _homographies(len(batch), generator)
        own = [place for place, (_, photo) in enumerate(batch) if photo is not None]
        if not own:
            continue
        photo, coords = torch.stack([photo for _, photo in batch if photo is not None]), coords[own]
        copies = warp(photo.float(), coords, (photo.shape[2], photo.shape[3])).round().to(torch.uint8)
        errors = _errors(features, photo, copies if photometric is None else photometric(copies), coords)
        right += torch.stack([(errors <= distance).sum() for distance in distances]).cpu()
        asked += len(errors)
    right, asked = summed(right), int(summed(torch.tensor(asked)))
    return {distance: float(share) / asked for distance, share in zip(distances, right, strict=True)}


@torch.no_grad()
def _errors(features: Features, photos: Tensor, copies: Tensor, coords: Tensor) -> Tensor:
    """Distance in cells from the answer to the truth, of all cells of the copies that show part of their photo."""
    sought, maps = features(copies), features(photos)
    check_maps(sought, len(copies))
    check_maps(maps, len(photos))
    h, w = maps.shape[2:]
    queries, keys = normalized(map_to_tokens(sought)), normalized(map_to_tokens(maps))
    rows = max(1, _TABLE // (h * w))
    answer = torch.stack(
        [
            torch.cat([(part @ key.mT).argmax(-1) for part in query.split(rows)])
            for query, key in zip(queries, keys, strict=True)
        ]
    )
    place = torch.stack([answer % w + 0.5, answer // w + 0.5], -1)
    coords = coords.to(maps.device)
    truth = cell_centers(coords, (h, w)) * torch.tensor([w, h], device=maps.device)
    return (place - truth).norm(dim=-1)[inside(coords, (h, w))]


def _read(photos: Sequence[Tensor]) -> Iterator[Tensor]:
    """In order; each photo is read once, when its turn comes."""
    for index in range(len(photos)):
        photo = photos[index]
        check_tensor(photo, f"photos[{index}]", "uint8 (3, H, W)")
        if photo.ndim != 3 or photo.dtype != torch.uint8:
            raise ValueError(f"photos[{index}]: expected uint8 (3, H, W), got {photo.dtype} {tuple(photo.shape)}")
        yield photo


def _homographies(count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 3), from a copy's unit square to its photo's."""
    from kornia.geometry.transform import get_perspective_transform

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]).expand(count, 4, 2)
    angle, side = uniform(-math.pi / 6, math.pi / 6), uniform(0.6, 1.0)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
    shown = (corners - 0.5) * side.view(-1, 1, 1) + uniform(-0.08, 0.08, 4, 2)
    place = 0.5 + uniform(-0.5, 0.5, 1, 2) * (1 - side).view(-1, 1, 1)
    return get_perspective_transform(corners.contiguous(), shown @ turn.mT + place)
