"""How well labels carry over to the nearest cells in feature space, without any training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._normalize import normalized
from densessl.evaluation._batches import (
    Features,
    Labelled,
    check_readable,
    encoded,
    image_count,
    own_share,
    own_share_once,
)
from densessl.evaluation._processes import from_all, total
from densessl.evaluation._refuse import check_at_least, check_positive, check_probe
from densessl.evaluation._stored import StoredFeatures
from densessl.evaluation._together import in_batches, in_turn, joined
from densessl.evaluation.matched import class_ious, overlap_of
from densessl.evaluation.retrieval import retrieve_shares
from densessl.evaluation.shares import class_shares
from densessl.features import map_to_tokens, tokens_to_map


def nearest_neighbor_segmentation(
    features: Features,
    memory: Labelled | StoredFeatures,
    test: Labelled | StoredFeatures,
    classes: int,
    *,
    neighbors: int = 30,
    temperature: float = 0.07,
    cells: int = 50_000,
    batch_size: int = 16,
    seed: int = 0,
) -> float:
    """Labels each cell by its nearest cells in a memory of labelled ones (in-context segmentation).

    A cell of the memory holds the share of each class among its labelled pixels. A test cell takes the mean of the
    shares of its nearest neighbours, weighted by ``softmax(cos / temperature)`` over them; the result is upsampled
    bilinearly to the labels.

    In several processes (``torch.distributed``) the work is shared: pass the same images in all, or each its own share,
    ``memory[rank::processes]``. All return the score over all images.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        memory: Labelled images that the memory is made of: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs
            of any sizes, or batches of them; or a store of their features (``store_features``).
        test: Labelled images to report on, in the same form.
        classes: Number of classes, at least 2: labels run 0..classes-1; -1 and 255 are ignored.
        neighbors: Number of nearest cells that vote, at least 1.
        temperature: Temperature of the softmax, greater than 0.
        cells: Greatest number of cells in the memory, chosen at random.
        batch_size: Number of images encoded at once.
        seed: Seed of the choice of cells.

    Returns:
        Mean intersection over union on the test split, 0..1.

    Raises:
        ValueError: If a split is empty, the memory holds no labelled cell, a feature is not finite, a setting is out of
            range, or an argument has another shape or dtype.
    """
    check_probe(classes, batch_size)
    check_at_least(neighbors, 1, "neighbors")
    check_positive(temperature, "temperature")
    check_at_least(cells, 1, "cells")
    memory = memory if isinstance(memory, StoredFeatures) else own_share(memory, "memory")
    test = test if isinstance(test, StoredFeatures) else own_share_once(test, "test")
    keys, shares = _memory(features, memory, classes, cells, batch_size, seed)
    overlap = torch.zeros(classes, classes, dtype=torch.int64)
    for maps, labels in encoded(features, test, classes, batch_size, "test", own=True):
        # Not lightly's knn_predict: it takes one label per key and returns a ranking, which cannot be upsampled.
        votes = retrieve_shares(
            map_to_tokens(maps).flatten(0, 1),
            keys,
            shares,
            neighbors=min(neighbors, len(keys)),
            temperature=temperature,
        )
        scores = tokens_to_map(votes.unflatten(0, (len(maps), -1)), (maps.shape[2], maps.shape[3]))
        predicted = F.interpolate(scores, labels.shape[1:], mode="bilinear", align_corners=False).argmax(1)
        overlap += overlap_of(predicted, labels, classes, classes).cpu()
    if not isinstance(test, StoredFeatures) or test.shared:
        overlap = total(overlap)
    if not bool(overlap.any()):
        raise ValueError("test: expected (image, labels) pairs with at least one labelled pixel, got none")
    return float(class_ious(overlap).nanmean())


def _memory(
    features: Features, memory: Labelled | StoredFeatures, classes: int, cells: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Unit features (M, C) and class shares (M, classes) of at most ``cells`` labelled cells."""
    check_readable(memory, "memory")
    together = not isinstance(memory, StoredFeatures)
    images = sum(from_all(image_count(memory))) if together else image_count(memory)
    if images == 0:
        raise ValueError("memory: expected (image, labels) pairs, got none")
    number, left, generator = images, cells, torch.Generator().manual_seed(seed)
    keys, shares = [], []
    single = _cells(features, memory, classes, batch_size)
    turns = in_turn(single, _facts, batch_size)
    every = turns if together else ((_facts(image), image) for image in single)
    for batch in in_batches(every, lambda image: image[0][0], batch_size):
        # Each batch may take its images' part of what is left: a memory of all cells of all images may not fit.
        allowed = -(-left * len(batch) // images)
        counts = [count for (_, count), _ in batch]
        chosen, start = torch.randperm(sum(counts), generator=generator)[:allowed], 0
        for (_, count), image in batch:
            if image is not None:
                here = chosen[(chosen >= start) & (chosen < start + count)] - start
                here = here.to(image.rows.device)
                keys.append(normalized(image.rows[here]))
                shares.append(image.shares[here])
            start += count
        left, images = left - len(chosen), images - len(batch)
    if together:
        keys, shares = joined(keys), joined(shares)
    if not sum(len(part) for part in keys):
        raise ValueError(f"memory: expected labels in 0..{classes - 1}, got none in {number} images")
    return torch.cat(keys), torch.cat(shares)


class _Cells(NamedTuple):
    """The size of an image in pixels, and the features (N, C) and class shares (N, classes) of its labelled cells."""

    size: tuple[int, int]
    rows: Tensor
    shares: Tensor


def _facts(image: _Cells) -> tuple[tuple[int, int], int]:
    return image.size, len(image.rows)


def _cells(features: Features, memory: Labelled | StoredFeatures, classes: int, batch_size: int) -> Iterator[_Cells]:
    """The labelled cells of one image after the other."""
    for maps, labels in encoded(features, memory, classes, batch_size, "memory"):
        shares = class_shares(labels, classes, (maps.shape[2], maps.shape[3]))
        for rows, share in zip(map_to_tokens(maps), shares, strict=True):
            known = share.sum(-1) > 0
            yield _Cells((labels.shape[1], labels.shape[2]), rows[known], share[known])
