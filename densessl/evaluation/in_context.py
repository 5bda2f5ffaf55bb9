"""In-context segmentation by its published settings."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from densessl.evaluation._batches import Features, Labelled, encoded, image_count, own_share
from densessl.evaluation._disk import Growing, Rows
from densessl.evaluation._held import HELD
from densessl.evaluation._processes import from_all, from_first, place, total
from densessl.evaluation._refuse import check_at_least, check_positive, check_probe
from densessl.evaluation._stored import StoredFeatures
from densessl.evaluation._together import in_turn, joined, processes
from densessl.evaluation.matched import iou_of_overlap, overlap_of
from densessl.evaluation.retrieval import rare_first_cells, read_shares
from densessl.evaluation.shares import class_shares
from densessl.features import map_to_tokens, tokens_to_map


class InContext(NamedTuple):
    """Settings of the in-context segmentation.

    Attributes:
        source: Where the settings come from.
        neighbors: Number of cells that vote, at least 1.
        temperature: Temperature of the softmax over the cells that vote, greater than 0.
        cells: Greatest number of cells that the memory holds.
        ignored: What becomes of ignored pixels in the memory, as of ``class_shares``.
        matched: Whether predicted classes are matched to the classes before they are scored.
        normalize_query: Whether the memory is searched by the cosine.
    """

    source: str
    neighbors: int = 30
    temperature: float = 0.02
    cells: int = 10_240_000
    ignored: Literal["exclude", 0] = "exclude"
    matched: bool = False
    normalize_query: bool = True


HUMMINGBIRD = InContext("Balazevic et al. 2023, Towards In-context Scene Understanding")
HUMMINGBIRD_OPEN = InContext("open-hummingbird-eval 2.0.0", ignored=0, matched=True, normalize_query=False)
FAST = InContext("densessl: a small memory, for comparisons of one's own", cells=50_000)


@torch.no_grad()
def in_context_segmentation(
    features: Features,
    memory: Labelled | StoredFeatures,
    test: Labelled | StoredFeatures,
    classes: int,
    protocol: InContext = HUMMINGBIRD,
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> float:
    """Labels each cell by the most similar cells of a memory of labelled ones.

    Resizing and normalising the images, and augmented passes over the memory's images, are the caller's. In several
    processes (``torch.distributed``) the work is shared: pass the same images in all, or each its own share,
    ``memory[rank::processes]``. All return the score over all images.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        memory: Labelled images that the memory is made of: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs
            of any sizes, or batches of them; or a store of their features (``store_features``). One process keeps what
            is beyond 0.25 GB in a temporary file, several need a store for that.
        test: Labelled images to report on, in the same form. Of a store that several processes share each scores its
            part.
        classes: Number of classes, at least 2: labels run 0..classes-1; -1 and 255 are ignored.
        protocol: HUMMINGBIRD, HUMMINGBIRD_OPEN, FAST or settings of your own.
        batch_size: Number of images encoded at once.
        seed: Seed of the choice of cells.

    Returns:
        Mean intersection over union over all classes, 0..1; a class that occurs nowhere counts as 0.

    Raises:
        ValueError: If the protocol is unknown, an argument has another shape or dtype, labels are out of range,
            features are not finite, the memory is smaller than the number of neighbours, or the memory has no label.
    """
    if not isinstance(protocol, InContext):
        raise ValueError(f"protocol: expected HUMMINGBIRD, HUMMINGBIRD_OPEN, FAST or an InContext, got {protocol!r}")
    check_probe(classes, batch_size)
    check_at_least(protocol.neighbors, 1, "protocol.neighbors")
    check_positive(protocol.temperature, "protocol.temperature")
    memory = memory if isinstance(memory, StoredFeatures) else own_share(memory, "memory")
    test = test if isinstance(test, StoredFeatures) else own_share(test, "test")
    with tempfile.TemporaryDirectory(prefix="densessl-memory-") as folder:
        keys, shares = _memory(features, memory, classes, protocol, batch_size, seed, Path(folder))
        if protocol.neighbors > len(keys):
            raise ValueError(
                f"protocol.neighbors: expected at most as many as the memory has cells, {len(keys)}, "
                f"got {protocol.neighbors}"
            )
        overlap = torch.zeros(classes, classes, dtype=torch.int64)
        for maps, labels in encoded(features, test, classes, batch_size, "test", own=True):
            read = read_shares(
                map_to_tokens(maps).flatten(0, 1),
                keys,
                shares,
                neighbors=protocol.neighbors,
                temperature=protocol.temperature,
                normalize_query=protocol.normalize_query,
            )
            scores = tokens_to_map(read.unflatten(0, (len(maps), -1)), (maps.shape[2], maps.shape[3]))
            for score, answer in zip(scores, labels, strict=True):  # one at a time: scores at full size are large
                full = F.interpolate(score[None], answer.shape, mode="bilinear", align_corners=False)
                overlap += overlap_of(full.argmax(1)[0], answer, classes, classes).cpu()
    if not isinstance(test, StoredFeatures) or test.shared:
        overlap = total(overlap)
    if not bool(overlap.any()):
        raise ValueError("test: expected (image, labels) pairs with at least one labelled pixel, got none")
    if protocol.matched:
        return iou_of_overlap(overlap, rule="hungarian", unmatched="own")
    hits = overlap.diagonal().double()
    return float((hits / (overlap.sum(0) + overlap.sum(1) - hits).clamp(min=1)).mean())


def _memory(
    features: Features,
    memory: Labelled | StoredFeatures,
    classes: int,
    protocol: InContext,
    batch_size: int,
    seed: int,
    folder: Path,
) -> tuple[Tensor | Rows, Tensor | Rows]:
    """Unit features (M, C) and class shares (M, classes); each image keeps as many cells, rare classes first."""
    together, labelled = not isinstance(memory, StoredFeatures), False
    images = sum(from_all(image_count(memory))) if together else image_count(memory)
    if images == 0:
        raise ValueError("memory: expected (image, labels) pairs, got none")
    count = protocol.cells // images
    if count < 1:
        raise ValueError(f"protocol.cells: expected at least one for each of {images} images, got {protocol.cells}")
    maps = encoded(features, memory, classes, batch_size, "memory")
    single = ((one, answer) for part, labels in maps for one, answer in zip(part, labels, strict=True))
    chosen = _chosen(single, classes, protocol, count, torch.Generator().manual_seed(seed), batch_size, together)
    if not isinstance(memory, StoredFeatures) or _bytes(memory, count, classes) <= memory.held_bytes:
        # Several processes hold what they exchange.
        most = HELD if together and processes() == 1 else sys.maxsize
        keys, shares = Growing(folder / "keys", most), Growing(folder / "shares", most)
        parts: list[tuple[Tensor, Tensor]] = []
        for key, share, known in chosen:
            labelled = labelled or known
            if together and processes() > 1:
                parts.append((key, share))
            else:
                keys.append(key)
                shares.append(share)
        if together and processes() > 1:
            labelled = any(from_all(labelled))
            for rows, number in ((keys, 0), (shares, 1)):
                for part in joined([pair[number] for pair in parts]):
                    rows.append(part)
        _need_labels(labelled, images, classes)
        return keys.finished(), shares.finished()
    # In files that one process writes and all read.
    kept, votes = memory.scratch((memory.size[0],)), memory.scratch((classes,))
    if place()[0] == 0 or not memory.shared:
        for key, share, known in chosen:
            kept.append(key)
            votes.append(share)
            labelled = labelled or known
    if memory.shared:
        kept.length, votes.length, labelled = from_first((len(kept), len(votes), labelled))
    _need_labels(labelled, images, classes)
    return kept, votes


def _chosen(
    maps: Iterator[tuple[Tensor, Tensor]],
    classes: int,
    protocol: InContext,
    count: int,
    generator: torch.Generator,
    batch_size: int,
    together: bool,
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Unit features and class shares of the cells that each image of this process keeps, and whether it has a label.

    Where processes work together, all of them draw the random numbers of all images in the order of all images.
    """
    turns = in_turn(maps, _cells, batch_size)
    every = turns if together else ((_cells(pair), pair) for pair in maps)
    for cells, pair in every:
        if pair is None:
            torch.rand(cells if count < cells else 0, generator=generator)
            continue
        one, labels = pair
        share = class_shares(labels[None], classes, (one.shape[1], one.shape[2]), ignored=protocol.ignored)[0]
        unit = F.normalize(one.flatten(1), dim=0).mT
        if count < cells:
            kept = rare_first_cells(share[None], count, generator)[0]
            unit, share = unit[kept], share[kept]
        known = share.sum(1) > 0
        yield unit[known], share[known], bool((labels >= 0).any())


def _cells(pair: tuple[Tensor, Tensor]) -> int:
    return pair[0].shape[1] * pair[0].shape[2]


def _bytes(memory: StoredFeatures, count: int, classes: int) -> int:
    channels, h, w = memory.size
    return 4 * len(memory) * min(count, h * w) * (channels + classes)


def _need_labels(labelled: bool, images: int, classes: int) -> None:
    if not labelled:
        raise ValueError(f"memory: expected labels in 0..{classes - 1}, got none in {images} images")
