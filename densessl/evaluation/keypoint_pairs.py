"""Keypoints of one image found in another, over a set of image pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from densessl._tensors import check_tensor
from densessl.evaluation._batches import Features, encode, iter_of
from densessl.evaluation._together import dealt, joined
from densessl.evaluation.keypoints import KeypointAccuracy, keypoint_accuracy


class KeypointPair(NamedTuple):
    """Two images that show the same kind of object, and points of one in the other.

    Attributes:
        source: The source image, uint8 ``(3, H, W)``.
        target: The target image, uint8 ``(3, H', W')``; its size may differ.
        source_points: Points in the source image, floating point ``(P, 2)``, x and y in pixels, NaN where not
            annotated.
        target_points: The same points in the target image. A point counts where both are annotated.
        extent: Length that counts as 1, in pixels of the target image, greater than 0: of SPair-71k the longer side of
            the target object's box.
    """

    source: Tensor
    target: Tensor
    source_points: Tensor
    target_points: Tensor
    extent: float


class KeypointSettings(NamedTuple):
    """Settings of the search for keypoints.

    Attributes:
        source: Where the settings come from.
        size: Height and width that both images are resized to, in pixels; None leaves them as they are.
        alpha: Greatest distance that is still right, as a share of the extent.
    """

    source: str
    size: tuple[int, int] | None = (512, 512)
    alpha: float = 0.1


SPAIR = KeypointSettings("Min et al. 2019, SPair-71k: PCK at 0.1 of the target's box; both images resized to one size")


@torch.no_grad()
def keypoint_correspondence(
    features: Features, pairs: Iterable[KeypointPair], protocol: KeypointSettings = SPAIR
) -> KeypointAccuracy:
    """Percentage of correct keypoints (PCK) over pairs of images.

    The source's features are sampled bilinearly at each point; the answer is the centre of the target's cell with the
    most similar feature (cosine). Distances are in pixels of the target image as it was given. In several processes
    (``torch.distributed``) the work is shared: pass the same pairs in all, or each its own share. All return the
    accuracy over all pairs.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        pairs: ``KeypointPair``, or tuples in its order.
        protocol: SPAIR or settings of your own.

    Returns:
        The accuracy per image pair and per point; ``images`` holds that of each pair.

    Raises:
        ValueError: If the protocol is unknown, an argument has another shape or dtype, points lie beyond their image,
            features are not finite, or no pair of points is annotated.
    """
    if not isinstance(protocol, KeypointSettings):
        raise ValueError(f"protocol: expected SPAIR or a KeypointSettings, got {protocol!r}")
    counts = []
    for index, pair in enumerate(iter_of(dealt(pairs))):
        name = f"pairs[{index}]"
        if not isinstance(pair, (tuple, list)) or len(pair) != len(KeypointPair._fields):
            raise ValueError(f"{name}: expected a KeypointPair, got {type(pair).__name__}")
        counts.append(_counts(features, KeypointPair(*pair), protocol, name))
    found = joined(counts)
    right, known = torch.cat(found).unbind(1) if found else torch.zeros(2, 1)
    if not bool(known.any()):
        raise ValueError("pairs: expected at least one pair of annotated points, got none")
    images = right / known  # 0 / 0 is NaN: no point is annotated
    return KeypointAccuracy(float(images.nanmean()), float(right.sum() / known.sum()), images)


def _counts(features: Features, pair: KeypointPair, protocol: KeypointSettings, name: str) -> Tensor:
    """How many of the pair's points are found, and how many are annotated, (1, 2)."""
    points = []
    for image, places, part in (
        (pair.source, pair.source_points, "source"),
        (pair.target, pair.target_points, "target"),
    ):
        check_tensor(image, f"{name}.{part}", "uint8 (3, H, W)")
        check_tensor(places, f"{name}.{part}_points", "floating point (P, 2)")
        if image.ndim != 3 or image.dtype != torch.uint8 or image.shape[0] != 3:
            raise ValueError(f"{name}.{part}: expected uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}")
        if places.ndim != 2 or places.shape != (len(pair.source_points), 2) or not places.is_floating_point():
            raise ValueError(
                f"{name}.{part}_points: expected floating point (P, 2) = {(len(pair.source_points), 2)}, "
                f"got {places.dtype} {tuple(places.shape)}"
            )
        sides = places.new_tensor([image.shape[2], image.shape[1]])
        if bool(((places < 0) | (places > sides)).any()):
            raise ValueError(f"{name}.{part}_points: expected points within an image of {sides.int().tolist()} pixels")
        points.append((places / sides)[None])
    if not pair.extent > 0:
        raise ValueError(f"{name}.extent: expected pixels greater than 0, got {pair.extent}")
    known = ~(points[0].isnan() | points[1].isnan()).any(2)
    annotated = int(known.sum())
    if annotated == 0:
        return torch.zeros(1, 2, dtype=torch.float64)
    extent = pair.extent / torch.tensor([[pair.target.shape[2], pair.target.shape[1]]], dtype=torch.float64)
    score = keypoint_accuracy(
        _map(features, pair.source, protocol),
        _map(features, pair.target, protocol),
        points[0],
        points[1],
        extent=extent,
        alpha=protocol.alpha,
    )
    return torch.tensor([[round(score.per_point * annotated), annotated]], dtype=torch.float64)


def _map(features: Features, image: Tensor, protocol: KeypointSettings) -> Tensor:
    if protocol.size is not None and tuple(image.shape[1:]) != tuple(protocol.size):
        image = V.resize(image, list(protocol.size), InterpolationMode.BILINEAR, antialias=True)
    return encode(features, image[None])
