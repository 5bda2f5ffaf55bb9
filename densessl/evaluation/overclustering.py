"""How pure more clusters than classes are, by the published settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl.evaluation._batches import Features, Labelled, batches, encode, own_share, pairs, resized
from densessl.evaluation._kmeans import assigned, k_means
from densessl.evaluation._refuse import check_at_least
from densessl.evaluation._together import order, rank, summed
from densessl.evaluation.matched import iou_of_overlap, overlap_of


class OverclusterSettings(NamedTuple):
    """Settings of the over-clustering.

    Attributes:
        source: Where the settings come from.
        size: Height and width that the images are resized to, in pixels; None leaves them as they are.
        grid: Number of cells along each side on which features and labels are compared.
        components: Number of components of the principal component analysis; fewer channels stay as they are.
        iterations: Greatest number of iterations of k-means.
        restarts: Number of times that k-means is run; that with the least sum of squared distances counts.
        sample: Greatest number of cells for each cluster that k-means runs on, drawn at random.
        rule: How clusters get a class where there are more clusters than classes, as of ``matched_iou``.
    """

    source: str
    size: tuple[int, int] | None = (448, 448)
    grid: int = 100
    components: int = 50
    iterations: int = 50
    restarts: int = 5
    sample: int = 256
    rule: Literal["iou", "precision"] = "precision"


LEOPART_CLUSTERS = OverclusterSettings("Ziegler and Asano 2022, Leopart, its k-means by faiss")


class ClusterScore(NamedTuple):
    """Mean intersection over union, 0..1, of one number of clusters.

    Attributes:
        mean: Mean over the seeds.
        std: Standard deviation over the seeds, of a sample; 0 of a single seed.
        seeds: The score of each seed.
    """

    mean: float
    std: float
    seeds: tuple[float, ...]


@torch.no_grad()
def overcluster_segmentation(
    features: Features,
    test: Labelled,
    classes: int,
    *,
    clusters: Sequence[int] | None = None,
    seeds: int = 5,
    protocol: OverclusterSettings = LEOPART_CLUSTERS,
    batch_size: int = 16,
) -> dict[int, ClusterScore]:
    """Clusters the cells of all images without labels, names the clusters by the classes they lie on, and scores them.

    Features are upsampled bilinearly to the grid, standardised for each channel over all cells, and projected onto
    their principal components. As many clusters as classes are matched one to one (Hungarian); of more, each takes a
    class by the protocol's rule. Both look at the test labels. The images are encoded twice, so that only projected
    maps are held. In several processes (``torch.distributed``) the work is shared: pass the same images in all, or
    each its own share, ``test[rank::processes]``. All return the scores over all images.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        test: Labelled images to cluster: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs of any sizes, or
            batches of them; labels are 0..classes-1, or -1 or 255 where ignored.
        classes: Number of classes, at least 2.
        clusters: Numbers of clusters, each at least ``classes``; None: ``(classes, 300, 500)``.
        seeds: Number of seeds of k-means, at least 1; they are 0..seeds-1.
        protocol: LEOPART_CLUSTERS or settings of your own.
        batch_size: Number of images encoded at once.

    Returns:
        For each number of clusters the mean intersection over union over all classes; an absent class counts as 0.

    Raises:
        ValueError: If the protocol is unknown, there are fewer clusters than classes or fewer cells than clusters, no
            cell is labelled, an argument has another shape or dtype, labels are out of range, or features are not
            finite.
        ImportError: If SciPy is missing: ``pip install 'densessl[evaluation]'``.
    """
    if not isinstance(protocol, OverclusterSettings):
        raise ValueError(f"protocol: expected LEOPART_CLUSTERS or an OverclusterSettings, got {protocol!r}")
    numbers = (classes, 300, 500) if clusters is None else tuple(clusters)
    check_at_least(classes, 2, "classes")
    check_at_least(seeds, 1, "seeds")
    check_at_least(batch_size, 1, "batch_size")
    for number in numbers:
        check_at_least(number, 1, "clusters")
    if not numbers or min(numbers) < classes:
        raise ValueError(f"clusters: expected numbers of at least the {classes} classes, got {numbers}")
    test = own_share(test, "test")

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        size = protocol.size
        whole = (pair if size is None else resized(*pair, size) for pair in pairs(test, classes, "test"))
        return ((encode(features, images), labels) for images, labels in batches(whole, batch_size))

    mean, projection, images = _principal((maps for maps, _ in read()), protocol)
    cells = images * protocol.grid**2
    if max(numbers) > cells:
        raise ValueError(f"clusters: expected at most as many as there are cells, {cells}, got {max(numbers)}")
    small, answers = [], []
    for maps, labels in read():
        reduced = torch.einsum("bchw,ck->bkhw", maps.double() - mean.view(-1, 1, 1), projection).float()
        small += list(reduced)
        # The published code takes the label of the pixel at each cell's upper left corner.
        coarse = F.interpolate(labels[:, None].double(), (protocol.grid, protocol.grid), mode="nearest")[:, 0]
        answers += list(coarse.to(maps.device, torch.int16))
    found = {
        (k, seed): _centers(small, projection, cells, k, seed, protocol)
        for k in dict.fromkeys(numbers)
        for seed in range(seeds)
    }
    overlaps = {key: torch.zeros(classes, key[0], dtype=torch.int64) for key in found}
    for reduced, answer in zip(small, answers, strict=True):
        rows = _upsampled(reduced, protocol.grid)
        for key, centers in found.items():
            nearest, _ = assigned(rows, centers)
            overlaps[key] += overlap_of(nearest, answer.flatten().long(), classes, key[0]).cpu()
    scores: dict[int, list[float]] = {}
    for (k, _), overlap in overlaps.items():
        total = summed(overlap)
        if not bool(total.any()):
            raise ValueError("test: expected at least one labelled cell, got none")
        rule = "hungarian" if k == classes else protocol.rule
        scores.setdefault(k, []).append(iou_of_overlap(total, rule=rule, unmatched="own"))
    return {k: _score(values) for k, values in scores.items()}


def _score(values: list[float]) -> ClusterScore:
    spread = torch.tensor(values, dtype=torch.float64)
    return ClusterScore(float(spread.mean()), float(spread.std()) if len(values) > 1 else 0.0, tuple(values))


def _principal(maps: Iterator[Tensor], protocol: OverclusterSettings) -> tuple[Tensor, Tensor, int]:
    """Mean (C,), projection (C, components) of the standardised channels, and the number of images.

    The moments of the upsampled maps are computed on the maps as they are: upsampling is a linear map along each side,
    so that its rows' products can be taken beforehand.
    """
    total, products, images = torch.zeros(()), torch.zeros(()), 0
    for part in maps:
        h, w = part.shape[2:]
        down, across = _upsampling(h, protocol.grid, part), _upsampling(w, protocol.grid, part)
        values = part.double()
        total = total.to(part.device) + torch.einsum("bchw,h,w->c", values, down.sum(0), across.sum(0))
        spread = torch.einsum("bchw,hy,wx->bcyx", values, down.mT @ down, across.mT @ across)
        products = products.to(part.device) + values.movedim(1, 0).flatten(1) @ spread.movedim(1, 0).flatten(1).mT
        images += len(part)
    if images == 0:
        raise ValueError("test: expected images with labels, got none")
    images = int(summed(torch.tensor(images)))
    total, products = summed(total), summed(products)
    count = images * protocol.grid**2
    mean = total / count
    covariance = products / count - mean[:, None] * mean
    scale = covariance.diagonal().clamp(min=0).sqrt() + 1e-5
    vectors = torch.linalg.eigh(covariance / scale[:, None] / scale).eigenvectors.flip(1)
    return mean, vectors[:, : protocol.components] / scale[:, None], images


def _upsampling(length: int, grid: int, like: Tensor) -> Tensor:
    """The matrix (grid, length) of bilinear upsampling along one side, float64."""
    eye = torch.eye(length, dtype=torch.float64, device=like.device)
    return F.interpolate(eye[None], grid, mode="linear", align_corners=False)[0].mT


def _upsampled(reduced: Tensor, grid: int) -> Tensor:
    """Rows (grid * grid, components) of a map (components, h, w)."""
    full = F.interpolate(reduced[None], (grid, grid), mode="bilinear", align_corners=False)[0]
    return full.flatten(1).mT.contiguous()


def _centers(
    small: list[Tensor], like: Tensor, cells: int, clusters: int, seed: int, protocol: OverclusterSettings
) -> Tensor:
    """k-means on cells drawn from all images; every process draws the same cells and finds the same centres."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(cells, generator=generator)[: protocol.sample * clusters]
    image, cell = chosen // protocol.grid**2, chosen % protocol.grid**2
    rows = torch.zeros(len(chosen), like.shape[1], device=like.device)
    for number, (process, place) in enumerate(order(len(small))):
        if process == rank():
            wanted = (image == number).nonzero()[:, 0].to(rows.device)
            rows[wanted] = _upsampled(small[place], protocol.grid)[cell.to(rows.device)[wanted]]
    return k_means(summed(rows), clusters, protocol.iterations, protocol.restarts, generator)
