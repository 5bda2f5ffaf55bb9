"""How well clusters of features, found without labels, agree with the classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl._normalize import normalized
from densessl.evaluation._batches import Features, Labelled, encoded, own_share_once
from densessl.evaluation._held import Held
from densessl.evaluation._processes import from_all, from_first, place
from densessl.evaluation._refuse import check_at_least, check_probe
from densessl.evaluation._stored import StoredFeatures
from densessl.evaluation._together import joined, order, summed
from densessl.evaluation.matched import class_ious, overlap_of
from densessl.features import map_to_tokens


def cluster_segmentation(
    features: Features,
    test: Labelled | StoredFeatures,
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

    Each image is read and encoded once. The cells of all images are kept in half precision, and the labels in 16 bits:
    0.25 GB of each in memory and the others in a temporary file. Several processes (``torch.distributed``) share the
    images and hold a part each: pass the same images in all, or each its own share, ``test[rank::processes]``. All
    return the score over all images.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        test: Labelled images to cluster: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs of any sizes,
            batches of them, or a store of their features (``store_features``).
        classes: Number of classes, at least 2: labels run 0..classes-1; -1 and 255 are ignored.
        clusters: Number of clusters, at least ``classes``; None: as many as classes.
        cells: Greatest number of cells that k-means runs on, chosen at random.
        iterations: Number of iterations of k-means.
        batch_size: Number of images encoded at once.
        seed: Seed of the choice of cells and of k-means.

    Returns:
        Mean intersection over union, 0..1.

    Raises:
        ValueError: If there are fewer clusters than classes or fewer cells than clusters, or an argument has another
            shape.
        ImportError: If SciPy is missing: ``pip install 'densessl[evaluation]'``.
    """
    check_probe(classes, batch_size)
    check_at_least(cells, 1, "cells")
    check_at_least(iterations, 1, "iterations")
    clusters = classes if clusters is None else clusters
    check_at_least(clusters, 1, "clusters")
    if clusters < classes:
        raise ValueError(f"clusters: expected at least as many as the {classes} classes, got {clusters}")
    test = test if isinstance(test, StoredFeatures) else own_share_once(test, "test")
    together = not isinstance(test, StoredFeatures) or test.shared
    tokens, answers, sizes = Held(), Held(), []
    lengths: list[int] = []
    channels = 0
    for maps, labels in encoded(features, test, classes, batch_size, "test", own=True):
        tokens.append(normalized(map_to_tokens(maps)).to("cpu", torch.float16))
        answers.append(labels.to("cpu", torch.int16 if classes < 1 << 15 else torch.int32))
        sizes.append((maps.shape[2], maps.shape[3]))
        lengths += [maps.shape[2] * maps.shape[3]] * len(maps)
        channels = maps.shape[1]
    channels = max(from_all(channels) if together else [channels])
    if not channels:
        raise ValueError("test: expected (image, labels) pairs, got none")
    first, count = _numbered(lengths, test, batch_size)
    if count < clusters:
        raise ValueError(f"clusters: expected at most as many as there are cells, {count}, got {clusters}")
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:cells]
    sample = _sampled(tokens, first, chosen, channels)
    centers = _k_means(summed(sample) if together else sample, clusters, iterations, seed)
    if together:  # another machine may round otherwise
        centers = from_first(centers)
    overlap = torch.zeros(classes, clusters, dtype=torch.int64)
    for part, labels, size in zip(
        tokens, answers, sizes, strict=True
    ):  # at the labels' size, all together would be large
        nearest = torch.cdist(part.float(), centers.expand(len(part), -1, -1)).argmin(-1)
        maps = nearest.view(-1, 1, *size).double()  # which holds every index, and which interpolate takes
        predicted = F.interpolate(maps, labels.shape[1:], mode="nearest-exact")[:, 0].long()
        overlap += overlap_of(predicted, labels.long(), classes, clusters)
    if together:
        overlap = summed(overlap)
    merged = torch.zeros(classes, classes, dtype=torch.int64).index_add_(0, _names(overlap), overlap.mT)
    if not bool(merged.any()):
        raise ValueError("test: expected at least one labelled pixel, got none")
    return float(class_ious(merged.mT).nanmean())


def _numbered(lengths: list[int], test: Labelled | StoredFeatures, batch_size: int) -> tuple[list[int], int]:
    """The number of the first cell of each image of this process among the cells of all images, and their count.

    Args:
        lengths: Number of cells of each image of this process.
        test: The images, or a store of their features.
        batch_size: Number of images that are read at once.
    """
    if isinstance(test, StoredFeatures):  # its batches are dealt to the processes in turn
        rank, world = place() if test.shared else (0, 1)
        own = [at for at in range(len(test)) if at // batch_size % world == rank]
        cells = test.size[1] * test.size[2]
        return [at * cells for at in own], len(test) * cells
    every = [int(part) for part in joined([torch.tensor([length]) for length in lengths])]
    starts = torch.tensor([0, *every]).cumsum(0).tolist()
    mine = [start for start, (process, _) in zip(starts, order(len(lengths)), strict=False) if process == place()[0]]
    return mine, starts[-1]


def _sampled(tokens: Held, first: list[int], chosen: Tensor, channels: int) -> Tensor:
    """The rows of the chosen cells (N, C), 0 where another process holds the cell."""
    sample = torch.zeros(len(chosen), channels)
    for image, start in zip((image for part in tokens for image in part), first, strict=True):
        here = (chosen >= start) & (chosen < start + len(image))
        sample[here] = image[chosen[here] - start].float()
    return sample


def _k_means(sample: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    try:
        from scipy.cluster.vq import kmeans2
    except ImportError as error:
        raise ImportError("clustering needs SciPy: pip install 'densessl[evaluation]'") from error
    centers, _ = kmeans2(sample.numpy(), clusters, iter=iterations, minit="++", rng=seed)
    return torch.from_numpy(centers).float()


def _names(overlap: Tensor) -> Tensor:
    """The class of each cluster, (clusters,), from the pixels that each class shares with each cluster."""
    from scipy.optimize import linear_sum_assignment

    names = overlap.argmax(0)
    if overlap.shape[0] == overlap.shape[1]:
        union = overlap.sum(0) + overlap.sum(1, keepdim=True) - overlap
        owners, owned = linear_sum_assignment((overlap / union.clamp(min=1)).numpy(), maximize=True)
        names[torch.from_numpy(owned)] = torch.from_numpy(owners)
    return names
