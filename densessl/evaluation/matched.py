"""Names clusters by classes and scores them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from densessl._tensors import check_tensor
from densessl.evaluation._refuse import check_at_least, known_labels


def matched_iou(
    predicted: Tensor,
    labels: Tensor,
    classes: int,
    clusters: int,
    *,
    rule: Literal["hungarian", "iou", "precision"] = "hungarian",
    unmatched: Literal["own", 0] = "own",
) -> float:
    """Mean intersection over union after each cluster was given a class.

    The mean is over all classes; a class that no cluster took, or that occurs nowhere, counts as 0. Source: the
    over-clustering evaluation of Leopart (Ziegler and Asano 2022) and NeCo; the published rows use "precision".

    Args:
        predicted: Cluster of each pixel, int64, 0..clusters-1, of any shape.
        labels: Class of each pixel, int64 of the same shape, 0..classes-1, or -1 or 255 for ignored pixels, which do
            not count.
        classes: Number of classes, at least 1.
        clusters: Number of clusters, at least 1.
        rule: "hungarian" gives each class at most one cluster, so that the sum of the intersections over unions is
            greatest. "iou" and "precision" give each cluster the class with which it has the greatest intersection
            over union, or of which it has the most pixels.
        unmatched: What becomes of clusters that the Hungarian matching left over. "own" leaves them to no class; 0
            sends them to class 0, as the published code does.

    Returns:
        0..1.

    Raises:
        ValueError: If an argument has another shape or dtype, a value is out of range, or no pixel is labelled.
        ImportError: If SciPy is missing: ``pip install 'densessl[evaluation]'``.
    """
    check_at_least(classes, 1, "classes")
    check_at_least(clusters, 1, "clusters")
    if rule not in ("hungarian", "iou", "precision"):
        raise ValueError(f'rule: expected "hungarian", "iou" or "precision", got {rule!r}')
    if unmatched not in ("own", 0):
        raise ValueError(f'unmatched: expected "own" or 0, got {unmatched!r}')
    return iou_of_overlap(overlap_of(predicted, labels, classes, clusters), rule=rule, unmatched=unmatched)


def overlap_of(predicted: Tensor, labels: Tensor, classes: int, clusters: int) -> Tensor:
    """Pixels that each class shares with each cluster, int64 (classes, clusters); they may be summed over images."""
    check_tensor(predicted, "predicted", "int64")
    check_tensor(labels, "labels", "int64")
    if predicted.dtype != torch.int64 or predicted.shape != labels.shape:
        raise ValueError(
            f"predicted: expected int64 {tuple(labels.shape)} as the labels, "
            f"got {predicted.dtype} {tuple(predicted.shape)}"
        )
    known = known_labels(labels, classes, "labels")
    kept = predicted[known]
    if kept.numel() and (int(kept.min()) < 0 or int(kept.max()) >= clusters):
        raise ValueError(f"predicted: expected 0..{clusters - 1}, got {int(kept.min())}..{int(kept.max())}")
    return torch.bincount(labels[known] * clusters + kept, minlength=classes * clusters).view(classes, clusters)


def iou_of_overlap(overlap: Tensor, *, rule: str, unmatched: str | int) -> float:
    """Mean intersection over union of the overlap (classes, clusters), after the clusters were given classes."""
    if not bool(overlap.any()):
        raise ValueError("labels: expected at least one labelled pixel, got none")
    overlap = overlap.cpu().double()
    classes = len(overlap)
    of_class, of_cluster = overlap.sum(1), overlap.sum(0)
    iou = overlap / (of_class[:, None] + of_cluster - overlap).clamp(min=1)
    if rule == "hungarian":
        names = _one_to_one(iou, -1 if unmatched == "own" else 0)
    else:
        names = (iou if rule == "iou" else overlap).argmax(0)
    merged = torch.zeros(classes + 1, classes, dtype=torch.float64)  # the last row takes what belongs to no class
    merged.index_add_(0, torch.where(names < 0, classes, names), overlap.mT)
    hits = merged[:classes].diagonal()
    return float((hits / (merged[:classes].sum(1) + of_class - hits).clamp(min=1)).mean())


def class_ious(overlap: Tensor) -> Tensor:
    """Intersection over union of each class with the cluster of its number, (classes,), NaN where neither occurs.

    Clusters beyond the classes belong to none.
    """
    overlap = overlap.double()
    hits = overlap.diagonal()
    return hits / (overlap.sum(1) + overlap[:, : len(overlap)].sum(0) - hits)


def _one_to_one(iou: Tensor, rest: int) -> Tensor:
    """The class of each cluster, (clusters,); ``rest`` for those left over."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Hungarian matching needs SciPy: pip install 'densessl[evaluation]'") from error
    names = torch.full((iou.shape[1],), rest)
    owners, owned = linear_sum_assignment(iou.numpy(), maximize=True)
    names[torch.from_numpy(owned)] = torch.from_numpy(owners)
    return names
