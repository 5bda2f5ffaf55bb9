"""The protocols of the command line: what each needs, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from densessl.evaluation._batches import Features
from densessl.evaluation.clustering import cluster_segmentation
from densessl.evaluation.correspondence import correspondence_accuracy
from densessl.evaluation.in_context import FAST, HUMMINGBIRD, HUMMINGBIRD_OPEN, InContext, in_context_segmentation
from densessl.evaluation.keypoint_pairs import SPAIR, keypoint_correspondence
from densessl.evaluation.linear import DINOV3, LEOPART, LinearProbe, linear_segmentation
from densessl.evaluation.neighbors import nearest_neighbor_segmentation
from densessl.evaluation.overclustering import LEOPART_CLUSTERS, overcluster_segmentation
from densessl.evaluation.patch import CAPI, patch_probe
from densessl.evaluation.store import shared_features
from densessl.evaluation.tokens import outlier_tokens, position_share
from densessl.evaluation.video import DAVIS, video_segmentation

Scores = dict[str, float]


class Job(NamedTuple):
    """What a protocol works on.

    Attributes:
        features: The features of the backbone.
        fit: What the protocol learns from or remembers; None where it needs nothing of the kind.
        test: What it is scored on.
        classes: Number of classes; 0 where there are none.
        size: Height and width in pixels of the images that the backbone gets.
        patch: Number of pixels of which the width of images has to be a multiple.
        seed: Seed of everything that the protocol draws.
        batch_size: Number of images encoded at once.
    """

    features: Features
    fit: Any
    test: Any
    classes: int
    size: tuple[int, int]
    patch: int
    seed: int
    batch_size: int


class Protocol(NamedTuple):
    """A protocol of the command line.

    Attributes:
        kind: Kind of the data: "labelled", "photos" (which the images of labelled data are, too), "videos" or "pairs".
        side: Side of the images that the backbone gets, in pixels; rounded down to whole patches of a vision
            transformer.
        fits: Whether the protocol needs the split that probes learn from.
        feed: "stored": it gets features that were computed beforehand; "resized": images at one size, without labels;
            "plain": samples as they are, which it crops and resizes itself.
        run: Makes the scores of a job.
        source: Where the settings come from.
        settings: Those settings that the scores depend on.
    """

    kind: str
    side: int
    fits: bool
    feed: Literal["stored", "resized", "plain"]
    run: Callable[[Job], Scores]
    source: str
    settings: dict[str, Any]


def _in_context(protocol: InContext) -> Protocol:
    def run(job: Job) -> Scores:
        return {
            "mIoU": in_context_segmentation(
                job.features, job.fit, job.test, job.classes, protocol, batch_size=job.batch_size, seed=job.seed
            )
        }

    return Protocol("labelled", 512, True, "stored", run, protocol.source, _settings(protocol))


def _linear(protocol: LinearProbe) -> Protocol:
    def run(job: Job) -> Scores:
        side = _square(job.size)
        sized = protocol._replace(size=side, stride=protocol.stride * side // protocol.size)
        score = linear_segmentation(
            job.features, job.fit, job.test, job.classes, sized, batch_size=job.batch_size, seed=job.seed
        )
        return {"mIoU": score}

    return Protocol("labelled", protocol.size, True, "plain", run, protocol.source, _settings(protocol))


def _square(size: tuple[int, int]) -> int:
    if size[0] != size[1]:
        raise ValueError(f"--size: the linear protocols take squares, got {size[0]}x{size[1]}")
    return size[0]


def _capi(job: Job) -> Scores:
    found = patch_probe(
        job.features,
        job.fit,
        job.test,
        job.classes,
        CAPI._replace(size=job.size),
        batch_size=job.batch_size,
        seed=job.seed,
    )
    return {
        "kNN mIoU": found.neighbors,
        "logistic mIoU": found.logistic,
        "neighbors": found.chosen_neighbors,
        "C": found.chosen_c,
    }


def _overcluster(job: Job) -> Scores:
    protocol = LEOPART_CLUSTERS._replace(size=job.size)
    found = overcluster_segmentation(job.features, job.test, job.classes, protocol=protocol, batch_size=job.batch_size)
    return {f"K={clusters} mIoU": score.mean for clusters, score in found.items()}


def _videos(job: Job) -> Scores:
    # Frames keep their form; the longer side has to be a multiple of the patches as well.
    multiple = DAVIS.multiple if DAVIS.multiple % job.patch == 0 else job.patch
    found = video_segmentation(job.features, job.test, DAVIS._replace(side=job.size[0], multiple=multiple))
    return {"J&F": found.j_and_f, "J": found.j, "F": found.f}


def _keypoints(job: Job) -> Scores:
    found = keypoint_correspondence(job.features, job.test, SPAIR._replace(size=job.size))
    return {"PCK per image": found.per_image, "PCK per point": found.per_point}


def _neighbors(job: Job) -> Scores:
    score = nearest_neighbor_segmentation(
        job.features, job.fit, job.test, job.classes, batch_size=job.batch_size, seed=job.seed
    )
    return {"mIoU": score}


def _linear_fast(job: Job) -> Scores:
    score = linear_segmentation(job.features, job.fit, job.test, job.classes, batch_size=job.batch_size, seed=job.seed)
    return {"mIoU": score}


def _clusters(job: Job) -> Scores:
    score = cluster_segmentation(job.features, job.test, job.classes, batch_size=job.batch_size, seed=job.seed)
    return {"mIoU": score}


def _correspondence(job: Job) -> Scores:
    found = correspondence_accuracy(job.features, job.test, batch_size=job.batch_size, seed=job.seed)
    return {f"PCK within {distance:g} cells": share for distance, share in found.items()}


def _tokens(job: Job) -> Scores:
    count = min(len(job.test), 256)  # maps of more images would fill the memory
    photos = [job.test[index] for index in range(count)]
    features = shared_features(job.features)
    maps = torch.cat([features(torch.stack(photos[at : at + 16])).float().cpu() for at in range(0, count, 16)])
    scores = {"outliers": float(outlier_tokens(maps).float().mean())}
    return scores | ({"position R2": position_share(maps)} if count > 1 else {})


def _settings(protocol: Any) -> dict[str, Any]:
    """Without the source, and without the size, which the command line may change."""
    return {name: value for name, value in protocol._asdict().items() if name not in ("source", "size", "side")}


_OWN = "densessl: fast settings, for comparisons of one's own"
_OVER = {"clusters": ["classes", 300, 500], "seeds": 5} | _settings(LEOPART_CLUSTERS)
PROTOCOLS = {
    "hummingbird": _in_context(HUMMINGBIRD),
    "hummingbird-open": _in_context(HUMMINGBIRD_OPEN),
    "in-context-fast": _in_context(FAST),
    "leopart": _linear(LEOPART),
    "dinov3": _linear(DINOV3),
    "capi": Protocol("labelled", 224, True, "plain", _capi, CAPI.source, _settings(CAPI)),
    "overcluster": Protocol("labelled", 448, False, "plain", _overcluster, LEOPART_CLUSTERS.source, _OVER),
    "davis": Protocol("videos", 480, False, "plain", _videos, DAVIS.source, _settings(DAVIS)),
    "spair": Protocol("pairs", 512, False, "plain", _keypoints, SPAIR.source, _settings(SPAIR)),
    "neighbors": Protocol("labelled", 448, True, "stored", _neighbors, _OWN, {"neighbors": 30, "temperature": 0.07}),
    "linear-fast": Protocol("labelled", 448, True, "stored", _linear_fast, _OWN, {"steps": 200, "lr": 0.02}),
    "clusters": Protocol("labelled", 448, False, "stored", _clusters, _OWN, {"clusters": "as many as classes"}),
    "correspondence": Protocol("photos", 448, False, "resized", _correspondence, _OWN, {"distances": [1, 2]}),
    "tokens": Protocol("photos", 448, False, "resized", _tokens, _OWN, {"k": 10, "images": 256}),
}
"""The protocols by their names on the command line."""
