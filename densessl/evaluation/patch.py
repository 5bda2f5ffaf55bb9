"""What single cells know of the classes: nearest neighbours and logistic regression, each with its best setting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from densessl.evaluation._batches import (
    IGNORED,
    Features,
    Labelled,
    batches,
    encode,
    nearest,
    own_share,
    pairs,
    resized,
)
from densessl.evaluation._disk import together
from densessl.evaluation._logistic import logistic_regression
from densessl.evaluation._nearest import Distance, nearest_keys
from densessl.evaluation._refuse import check_probe
from densessl.evaluation._together import joined, order, processes, rank, summed
from densessl.evaluation.matched import class_ious, overlap_of

_C = tuple(10.0 ** (-6 + 11 * step / 7) for step in range(8))


class PatchSettings(NamedTuple):
    """Settings of the classification of single cells.

    Attributes:
        source: Where the settings come from.
        size: Height and width that the images are resized to (bicubic), in pixels; None leaves them as they are.
        neighbors: Numbers of neighbours that are tried.
        distances: Distances that are tried.
        c: Inverse penalties of the logistic regression that are tried.
        iterations: Greatest number of iterations of L-BFGS.
        held_out: Share of the images to fit on by which settings are chosen, at least one image.
        pixels: Whether a neighbour votes for each pixel of the cell by its own pixel there; False: by the label that
            most of its pixels have. True needs maps of one size.
    """

    source: str
    size: tuple[int, int] | None = (224, 224)
    neighbors: tuple[int, ...] = (1, 3, 10, 30)
    distances: tuple[Distance, ...] = ("cosine", "L2")
    c: tuple[float, ...] = _C
    iterations: int = 1000
    held_out: float = 0.1
    pixels: bool = True


CAPI = PatchSettings("Darcet et al. 2025, CAPI, eval_segmentation.py")


class PatchScores(NamedTuple):
    """Mean intersections over unions, 0..1, and the settings that were chosen.

    Attributes:
        neighbors: The score of the nearest neighbours.
        logistic: The score of the logistic regression.
        chosen_neighbors: Number of neighbours that voted.
        chosen_distance: The distance by which the neighbours were found.
        chosen_c: The inverse penalty of the logistic regression.
    """

    neighbors: float
    logistic: float
    chosen_neighbors: int
    chosen_distance: Distance
    chosen_c: float


class _Keys(NamedTuple):
    """Features (N, C), labels (N,) and votes (N, P) or (N, 1) of cells."""

    rows: Tensor
    labels: Tensor
    votes: Tensor


class _Cells(NamedTuple):
    """The cells of one image, and the labels of their pixels (N, P)."""

    keys: _Keys
    pixels: Tensor


@torch.no_grad()
def patch_probe(
    features: Features,
    fit: Labelled,
    test: Labelled,
    classes: int,
    protocol: PatchSettings = CAPI,
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> PatchScores:
    """Classifies single cells by their nearest neighbours and by logistic regression.

    A cell's label is the one that most of its pixels have. Features are standardised for each channel. Each setting is
    fitted without the held-out images and scored on them; the best one, the first of several, is fitted on all and
    tested. In several processes (``torch.distributed``) the work is shared: pass the same images in all, or
    each its own share, ``fit[rank::processes]``. All return the scores over all images.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        fit: Labelled images to fit on, at least two: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs of any
            sizes, or batches of them; labels are 0..classes-1, or -1 or 255 where ignored.
        test: Labelled images to report on, in the same form.
        classes: Number of classes, at least 2.
        protocol: CAPI or settings of your own.
        batch_size: Number of images encoded at once.
        seed: Seed of the choice of the held-out images.

    Returns:
        Mean intersections over unions of the pixels, over the classes that occur in labels or predictions.

    Raises:
        ValueError: If the protocol is unknown, an argument has another shape or dtype, labels are out of range,
            features are not finite, ``fit`` has under two images or no label, or fewer labelled cells than neighbours.
        ImportError: If SciPy is missing: ``pip install 'densessl[evaluation]'``.
    """
    if not isinstance(protocol, PatchSettings):
        raise ValueError(f"protocol: expected CAPI or a PatchSettings, got {protocol!r}")
    check_probe(classes, batch_size)
    fit, test = own_share(fit, "fit"), own_share(test, "test")
    images = list(_cells(features, fit, classes, protocol, batch_size, "fit"))
    if not images:
        raise ValueError("fit: expected (image, labels) pairs, got none")
    held = _held_out(len(images), protocol.held_out, seed)
    scale = _moments([image.keys.rows for image, out in zip(images, held, strict=True) if not out], images[0].keys.rows)
    for number, image in enumerate(images):  # one by one, so that the features are not held twice
        images[number] = _scaled(image, scale)
    train = [image.keys for image, out in zip(images, held, strict=True) if not out]
    rest = [image for image, out in zip(images, held, strict=True) if out]

    like = images[0].keys
    keys, own = _all_and_own(train, like)
    if max(protocol.neighbors) > len(keys.rows):
        raise ValueError(
            f"fit: expected at least as many labelled cells as neighbors, {max(protocol.neighbors)}, "
            f"without the held-out images, got {len(keys.rows)}"
        )
    by_neighbors = _tried_neighbors(rest, keys, classes, protocol)
    neighbors, distance = max(by_neighbors, key=by_neighbors.__getitem__)
    by_c = {}
    for c in protocol.c:
        weight = logistic_regression(own.rows, own.labels, classes, c, protocol.iterations)
        by_c[c] = _mean(_sum([_linear(image, weight, classes) for image in rest], classes))
    c = max(by_c, key=by_c.__getitem__)

    del keys, own, train, rest  # before the larger ones are made
    keys, own = _all_and_own([image.keys for image in images], like)
    weight = logistic_regression(own.rows, own.labels, classes, c, protocol.iterations)
    votes, linear = [], []
    for image in _cells(features, test, classes, protocol, batch_size, "test"):
        image = _scaled(image, scale)
        if image.keys.votes.shape[1] != like.votes.shape[1]:
            raise ValueError(
                f"test: expected cells of {like.votes.shape[1]} pixels as those of fit, got {image.pixels.shape[1]}"
            )
        found = nearest_keys(image.keys.rows, keys.rows, neighbors, distance)
        votes.append(_overlap(_vote(keys.votes, found, classes), image, classes))
        linear.append(_linear(image, weight, classes))
    overlap = _sum(votes, classes)
    if not bool(overlap.any()):
        raise ValueError("test: expected at least one labelled pixel, got none")
    return PatchScores(_mean(overlap), _mean(_sum(linear, classes)), neighbors, distance, c)


def _cells(
    features: Features, labelled: Labelled, classes: int, protocol: PatchSettings, batch_size: int, name: str
) -> Iterator[_Cells]:
    """The cells of one image after the other."""
    size = protocol.size
    whole = (pair if size is None else resized(*pair, size, "bicubic") for pair in pairs(labelled, classes, name))
    pixels = None
    for images, answers in batches(whole, batch_size):
        for values, labels in zip(encode(features, images), answers, strict=True):
            h, w = values.shape[1:]
            # As many pixels in each cell; at CAPI's size each side is a multiple already.
            tall, wide = -(-labels.shape[0] // h), -(-labels.shape[1] // w)
            if protocol.pixels and pixels not in (None, (tall, wide)):
                raise ValueError(
                    f"protocol.pixels: expected cells of one size, got {(tall, wide)} after {pixels} pixels"
                )
            pixels = (tall, wide)
            split = nearest(labels, (h * tall, w * wide)).view(h, tall, w, wide).movedim(2, 1).reshape(h * w, -1)
            split = split.to(values.device)
            counts = torch.zeros(h * w, classes + 1, device=split.device)
            counts.scatter_add_(1, split.masked_fill(split == IGNORED, classes), torch.ones_like(split).float())
            common = counts.argmax(1)  # of several equally frequent labels the first, ignored ones last
            label = common.masked_fill(common == classes, IGNORED)
            split = split.to(torch.int16)
            votes = split if protocol.pixels else label[:, None].to(torch.int16)
            yield _Cells(_Keys(values.flatten(1).mT, label, votes), split)


def _scaled(image: _Cells, scale: tuple[Tensor, Tensor]) -> _Cells:
    """The image's cells with standardised channels."""
    return image._replace(keys=image.keys._replace(rows=(image.keys.rows - scale[0]) / scale[1]))


def _held_out(images: int, share: float, seed: int) -> list[bool]:
    """Which of this process's images are held out, drawn from those of all processes."""
    places = order(images)
    if len(places) < 2:
        raise ValueError(f"fit: expected at least 2 images, one of them to choose the settings by, got {len(places)}")
    count = max(1, int(len(places) * share))
    chosen = set(torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    return [number in chosen for number, (process, _) in enumerate(places) if process == rank()]


def _moments(parts: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all processes' rows; 1 where a channel is constant."""
    channels = like.shape[1]
    zero = torch.zeros(channels, dtype=torch.float64, device=like.device)
    count = summed(torch.tensor(float(sum(map(len, parts))), dtype=torch.float64, device=like.device))
    mean = summed(sum((part.double().sum(0) for part in parts), zero)) / count
    square = summed(sum(((part.double() - mean).square().sum(0) for part in parts), zero)) / count
    std = torch.where(square.sqrt() > 1e-12 * mean.abs(), square.sqrt(), 1.0)
    return mean.to(like.dtype), std.to(like.dtype)


def _all_and_own(images: list[_Keys], like: _Keys) -> tuple[_Keys, _Keys]:
    """The labelled cells of all processes, and those of this one, which are the same where it is alone."""
    keys = _all_known(images, like)
    return keys, (keys if processes() == 1 else _known(images, like))


def _known(images: list[_Keys], like: _Keys) -> _Keys:
    """The labelled cells of this process's images; ``like`` has the form of an image's."""
    kept = [_Keys(*(part[image.labels != IGNORED] for part in image)) for image in [*images, _none(like)]]
    return _Keys(*(torch.cat(parts) for parts in zip(*kept, strict=True)))


def _all_known(images: list[_Keys], like: _Keys) -> _Keys:
    """The labelled cells of all processes' images, in the order of all images."""
    columns = []
    for number, none in enumerate(_none(like)):
        parts = joined([image[number][image.labels != IGNORED] for image in images])
        parts.append(none)
        columns.append(together(parts))
    return _Keys(*columns)


def _none(like: _Keys) -> _Keys:
    return _Keys(*(part[:0] for part in like))


def _tried_neighbors(
    images: list[_Cells], keys: _Keys, classes: int, protocol: PatchSettings
) -> dict[tuple[int, Distance], float]:
    """The score of each number of neighbours and distance; one search of the most serves all numbers."""
    scores = {}
    most = max(protocol.neighbors)
    for distance in protocol.distances:
        found = [nearest_keys(image.keys.rows, keys.rows, most, distance) for image in images]
        for count in protocol.neighbors:
            votes = [_vote(keys.votes, index[:, :count], classes) for index in found]
            overlaps = [_overlap(vote, image, classes) for vote, image in zip(votes, images, strict=True)]
            scores[count, distance] = _mean(_sum(overlaps, classes))
    return {key: scores[key] for key in ((k, d) for k in protocol.neighbors for d in protocol.distances)}


def _vote(votes: Tensor, found: Tensor, classes: int) -> Tensor:
    """The most frequent label of the neighbours at each pixel, the first of several; ``classes`` if that is ignored."""
    counts = torch.zeros(len(found), votes.shape[1], classes + 1, dtype=torch.int16, device=votes.device)
    one = torch.ones((), dtype=torch.int16, device=votes.device).expand(len(found), votes.shape[1], 1)
    for neighbor in found.unbind(1):
        labels = votes[neighbor].long()
        counts.scatter_add_(2, labels.masked_fill(labels == IGNORED, classes)[..., None], one)
    return counts.argmax(2)


def _linear(image: _Cells, weight: Tensor, classes: int) -> Tensor:
    """Overlap of the logistic regression's answers with the labels."""
    return _overlap((image.keys.rows.double() @ weight[:-1] + weight[-1]).argmax(1)[:, None], image, classes)


def _overlap(predicted: Tensor, image: _Cells, classes: int) -> Tensor:
    """Pixels of each class by answer (classes, classes + 1); the last answer is no class."""
    return overlap_of(predicted.expand(image.pixels.shape), image.pixels.long(), classes, classes + 1).cpu()


def _sum(overlaps: list[Tensor], classes: int) -> Tensor:
    """Sum over the images of all processes."""
    return summed(sum(overlaps, torch.zeros(classes, classes + 1, dtype=torch.int64)))


def _mean(overlap: Tensor) -> float:
    """Mean over the classes that occur in labels or answers; 0 if there is none."""
    return float(class_ious(overlap).nanmean().nan_to_num())
