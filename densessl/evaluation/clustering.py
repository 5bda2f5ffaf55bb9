"""How well clusters of features, found without labels, agree with the classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from densessl._normalize import normalized
from densessl.evaluation._common import IGNORED, Features, Labelled, check_labelled, check_probe, encoded, mean_iou
from densessl.evaluation._refuse import check_at_least
from densessl.features import map_to_tokens


def cluster_segmentation(
    features: Features,
    test: Labelled,
    classes: int,
    *,
    clusters: int | None = None,
    cells: int = 20_000,
    iterations: int = 50,
    batch_size: int = 16,
    seed: int = 0,
) -> float:
    """Clusters the unit features of all cells by k-means and names the clusters by the classes they lie on.

    With as many clusters as classes each class takes one cluster, so that the sum of their intersections over unions is
    greatest (Hungarian matching). With more (over-clustering) each cluster joins the class that it shares most pixels
    with. Both look at the test labels: the numbers say how pure the clusters are, not how well new images would be
    labelled.

    Args:
        features: images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        test: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs of one size.
        classes: labels run 0..classes-1; all others are ignored.
        clusters: how many, at least ``classes``; None: as many as classes.
        cells: k-means runs on at most so many, chosen at random.
        iterations: of k-means.
        batch_size: images encoded at once.
        seed: of the choice and of k-means.

    Returns:
        Mean intersection over union, 0..1.

    Raises:
        ValueError: if there are fewer clusters than classes or fewer cells than clusters, or on other shapes.
        ImportError: without SciPy, ``pip install 'densessl[evaluation]'``.
    """
    check_probe(classes, batch_size)
    check_at_least(cells, 1, "cells")
    check_at_least(iterations, 1, "iterations")
    clusters = classes if clusters is None else clusters
    if clusters < classes:
        raise ValueError(f"clusters: expected at least as many as the {classes} classes, got {clusters}")
    check_labelled(test, "test")
    tokens, answers, size = [], [], (0, 0)
    for maps, labels in encoded(features, test, classes, batch_size):
        tokens.append(normalized(map_to_tokens(maps)).cpu())
        answers.append(labels.cpu())
        size = (maps.shape[2], maps.shape[3])
    labels = torch.cat(answers)
    centers = _k_means(torch.cat(tokens).flatten(0, 1), clusters, cells, iterations, seed)
    nearest = torch.cat([torch.cdist(part, centers.expand(len(part), -1, -1)).argmin(-1) for part in tokens])
    maps = nearest.view(-1, 1, *size).double()  # which holds every index, and which interpolate takes
    predicted = F.interpolate(maps, labels.shape[1:], mode="nearest-exact")[:, 0].long()
    named = _names(predicted, labels, classes, clusters)[predicted]
    meter = mean_iou(classes)
    meter.update(named, labels)
    return float(meter.compute())


def _k_means(tokens: Tensor, clusters: int, cells: int, iterations: int, seed: int) -> Tensor:
    try:
        from scipy.cluster.vq import kmeans2
    except ImportError as error:
        raise ImportError("clustering needs SciPy: pip install 'densessl[evaluation]'") from error
    if len(tokens) < clusters:
        raise ValueError(f"clusters: expected at most as many as there are cells, {len(tokens)}, got {clusters}")
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:cells]
    centers, _ = kmeans2(tokens[chosen].numpy(), clusters, iter=iterations, minit="++", rng=seed)
    return torch.from_numpy(centers).to(tokens.dtype)


def _names(predicted: Tensor, labels: Tensor, classes: int, clusters: int) -> Tensor:
    """The class of each cluster, (clusters,)."""
    from scipy.optimize import linear_sum_assignment

    overlap = multiclass_confusion_matrix(predicted, labels, clusters, ignore_index=IGNORED)[:classes]
    names = overlap.argmax(0)
    if clusters == classes:
        union = overlap.sum(0) + overlap.sum(1, keepdim=True) - overlap
        owners, owned = linear_sum_assignment((overlap / union.clamp(min=1)).numpy(), maximize=True)
        names[torch.from_numpy(owned)] = torch.from_numpy(owners)
    return names
