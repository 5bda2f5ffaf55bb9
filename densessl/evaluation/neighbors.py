"""How well labels carry over to the nearest cells in feature space, without any training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._normalize import normalized
from densessl.evaluation._batches import Features, Labelled, encoded, image_count
from densessl.evaluation._refuse import check_at_least, check_positive, check_probe
from densessl.evaluation._stored import StoredFeatures
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

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        memory: Labelled images that the memory is made of: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs
            of any sizes, or batches of them.
        test: Labelled images to report on, in the same form.
        classes: Number of classes, at least 2: labels run 0..classes-1; all others are ignored.
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
    keys, shares = _memory(features, memory, classes, cells, batch_size, seed)
    overlap = torch.zeros(classes, classes, dtype=torch.int64)
    for maps, labels in encoded(features, test, classes, batch_size, "test"):
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
    if not bool(overlap.any()):
        raise ValueError("test: expected (image, labels) pairs with at least one labelled pixel, got none")
    return float(class_ious(overlap).nanmean())


def _memory(
    features: Features, memory: Labelled | StoredFeatures, classes: int, cells: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Unit features (M, C) and class shares (M, classes) of at most ``cells`` labelled cells."""
    generator = torch.Generator().manual_seed(seed)
    keys, shares, left, images = [], [], cells, image_count(memory)
    if images == 0:
        raise ValueError("memory: expected (image, labels) pairs, got none")
    for maps, labels in encoded(features, memory, classes, batch_size, "memory"):
        # Each batch may take its images' part of what is left: a memory of all cells of all images may not fit.
        allowed = -(-left * len(maps) // images)
        share = class_shares(labels, classes, (maps.shape[2], maps.shape[3])).flatten(0, 1)
        known = share.sum(-1).nonzero()[:, 0]
        chosen = known[torch.randperm(len(known), generator=generator)[:allowed].to(known.device)]
        keys.append(normalized(map_to_tokens(maps).flatten(0, 1)[chosen]))
        shares.append(share[chosen])
        left, images = left - len(chosen), images - len(maps)
    if not sum(len(part) for part in keys):
        raise ValueError(f"memory: expected labels in 0..{classes - 1}, got none in {image_count(memory)} images")
    return torch.cat(keys), torch.cat(shares)
