"""The protocols of the command line: what each needs, and how it is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from densessl.evaluation._common import Features
from densessl.evaluation._processes import place
from densessl.evaluation.clustering import cluster_segmentation
from densessl.evaluation.correspondence import correspondence_accuracy
from densessl.evaluation.in_context import FAST, HUMMINGBIRD, HUMMINGBIRD_OPEN, InContext, in_context_segmentation
from densessl.evaluation.linear import linear_segmentation
from densessl.evaluation.neighbors import nearest_neighbor_segmentation
from densessl.evaluation.tokens import outlier_tokens, position_share

Scores = dict[str, float]


class Job(NamedTuple):
    """What a protocol works on.

    Attributes:
        features: of the backbone.
        fit: what it learns from or remembers; None where it needs nothing of the kind.
        test: what it is scored on.
        classes: how many there are; 0 where there are none.
        seed: of everything that it draws.
        batch_size: images encoded at once.
    """

    features: Features
    fit: Any
    test: Any
    classes: int
    seed: int
    batch_size: int


class Protocol(NamedTuple):
    """A protocol of the command line.

    Attributes:
        kind: of the data: "labelled", "photos" (which the images of labelled data are, too), "videos" or "pairs".
        side: height and width that images are resized to, in pixels; None where the protocol does it.
        fits: whether it needs the split that probes learn from.
        stored: whether features are computed beforehand, into a store; otherwise the protocol computes them.
        run: makes the scores.
        source: where the settings come from.
        settings: those that the scores depend on.
    """

    kind: str
    side: int | None
    fits: bool
    stored: bool
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

    settings = protocol._asdict()
    return Protocol("labelled", 512, True, True, run, settings.pop("source"), settings)


def _neighbors(job: Job) -> Scores:
    score = nearest_neighbor_segmentation(
        job.features, job.fit, job.test, job.classes, batch_size=job.batch_size, seed=job.seed
    )
    return {"mIoU": score}


def _linear(job: Job) -> Scores:
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
    maps = torch.cat([job.features(torch.stack(photos[at : at + 16])).float().cpu() for at in range(0, count, 16)])
    scores = {"outliers": float(outlier_tokens(maps).float().mean())}
    return scores | ({"position R2": position_share(maps)} if count > 1 else {})


_OWN = "densessl: fast settings, for comparisons of one's own"
PROTOCOLS = {
    "hummingbird": _in_context(HUMMINGBIRD),
    "hummingbird-open": _in_context(HUMMINGBIRD_OPEN),
    "in-context-fast": _in_context(FAST),
    "neighbors": Protocol("labelled", 448, True, True, _neighbors, _OWN, {"neighbors": 30, "temperature": 0.07}),
    "linear-fast": Protocol("labelled", 448, True, True, _linear, _OWN, {"steps": 200, "lr": 0.02}),
    "clusters": Protocol("labelled", 448, False, True, _clusters, _OWN, {"clusters": "as many as classes"}),
    "correspondence": Protocol("photos", 448, False, False, _correspondence, _OWN, {"distances": [1, 2]}),
    "tokens": Protocol("photos", 448, False, False, _tokens, _OWN, {"k": 10, "images": 256}),
}
"""The protocols by their names on the command line."""


def share_of(data: Any) -> Any:
    """The samples that are this process's where several share the work and each passes its own."""
    rank, world = place()
    return [data[index] for index in range(rank, len(data), world)] if world > 1 else data
