"""Whether features find the annotated points of one image in another."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._tensors import check_tensor
from densessl.evaluation._refuse import check_finite, check_floating, check_positive

_TABLE = 1 << 24  # similarities held at once
_SLACK = 1e-5  # of the distance that is still right: points at just that distance in pixels are, however it is rounded


class KeypointAccuracy(NamedTuple):
    """Percentage of correct keypoints (PCK), each as a share 0..1.

    Attributes:
        per_image: Mean over the images of each image's own share; images without annotated points do not count.
        per_point: Share over the points of all images together.
        images: ``(B,)``, the share of each image, NaN where no point is annotated.
    """

    per_image: float
    per_point: float
    images: Tensor


@torch.no_grad()
def keypoint_accuracy(
    source_map: Tensor,
    target_map: Tensor,
    source_points: Tensor,
    target_points: Tensor,
    *,
    extent: Tensor | float,
    alpha: float = 0.1,
) -> KeypointAccuracy:
    """Percentage of correct keypoints (PCK) of given pairs of points.

    The source's features are sampled bilinearly at each point; the answer is the centre of the target's cell with the
    most similar feature (cosine). It is right if its distance from the target's point is at most ``alpha * extent``.
    This is how SPair-71k is scored, where the extent is the longer side of the target object's box.

    Args:
        source_map: Feature maps of the source images, floating point ``(B, C, h, w)``.
        target_map: Feature maps of the target images, floating point ``(B, C, h', w')``; their size may differ.
        source_points: Points in the source images, floating point ``(B, P, 2)``, x and y in the unit square of the
            image, NaN where not annotated.
        target_points: The same points in the target images. A pair counts where both are annotated.
        extent: Length that counts as 1, in units of the image's sides, greater than 0: a number, ``(B,)``, or ``(B,
            2)`` for x and y. Where distances are pixels of an image that is not square, pass ``(B, 2)``: the length in
            pixels over the image's width and over its height.
        alpha: Greatest share of the extent that is still right, greater than 0.

    Returns:
        The accuracy per image and per point.

    Raises:
        ValueError: If an argument has another shape, points lie beyond the unit square, or no pair of points is
            annotated.
    """
    for value, name in ((source_map, "source_map"), (target_map, "target_map")):
        check_floating(value, ("B", "C", "h", "w"), name)
        check_finite(value, name)
    if source_map.shape[:2] != target_map.shape[:2]:
        raise ValueError(f"target_map: expected (B, C) = {tuple(source_map.shape[:2])}, got {tuple(target_map.shape)}")
    batch = len(source_map)
    for value, name in ((source_points, "source_points"), (target_points, "target_points")):
        check_tensor(value, name, "floating point (B, P, 2)")
        if value.ndim != 3 or not value.is_floating_point() or value.shape != (batch, source_points.shape[1], 2):
            raise ValueError(f"{name}: expected floating point (B, P, 2), got {value.dtype} {tuple(value.shape)}")
        outside = (value < 0) | (value > 1)
        if bool(outside.any()):
            raise ValueError(f"{name}: expected points in the unit square 0..1, got {float(value[outside][0])}")
    check_positive(alpha, "alpha")
    if not isinstance(extent, (Tensor, Real)):
        raise ValueError(f"extent: expected numbers greater than 0, one, (B,) or (B, 2), got {type(extent).__name__}")
    scale = torch.as_tensor(extent, dtype=torch.float64, device=target_map.device)
    if tuple(scale.shape) not in ((), (batch,), (batch, 2)) or not bool((scale > 0).all()):
        raise ValueError(f"extent: expected numbers greater than 0, one, (B,) or (B, 2), got {tuple(scale.shape)}")
    scale = scale.view(batch, 1, -1) if scale.ndim else scale
    source, target = source_points.to(target_map.device).float(), target_points.to(target_map.device).double()
    known = ~(source.isnan() | target.isnan()).any(2)
    if not bool(known.any()):
        raise ValueError("source_points: expected at least one pair of annotated points, got none")
    error = ((_found(source_map, target_map, source.nan_to_num(0.5)) - target) / scale).norm(dim=2)
    right = (error <= alpha * (1 + _SLACK)) & known
    images = right.sum(1) / known.sum(1)  # 0 / 0 is NaN: no point is annotated
    return KeypointAccuracy(float(images.nanmean()), float(right.sum() / known.sum()), images)


def _found(source_map: Tensor, target_map: Tensor, points: Tensor) -> Tensor:
    """Centres (B, P, 2) of the target's cells that are most similar to the source's points, in the unit square."""
    h, w = target_map.shape[2:]
    found = torch.empty_like(points, dtype=torch.float64)
    rows = max(1, _TABLE // (h * w))
    for image in range(len(points)):
        keys = F.normalize(target_map[image].float().flatten(1), dim=0)
        for start in range(0, points.shape[1], rows):
            grid = points[image, start : start + rows] * 2 - 1
            sampled = F.grid_sample(
                source_map[image : image + 1].float(), grid[None, None], padding_mode="border", align_corners=False
            )[0, :, 0]
            answer = (F.normalize(sampled, dim=0).mT @ keys).argmax(1)
            found[image, start : start + rows] = torch.stack(
                [(answer % w + 0.5).double() / w, (answer // w + 0.5).double() / h], 1
            )
    return found
