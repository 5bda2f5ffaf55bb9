"""Runs protocols on a data set, whose features are computed once for all of them."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from densessl.evaluation._batches import Features
from densessl.evaluation._processes import place
from densessl.evaluation._protocols import Job, Protocol
from densessl.evaluation._sources import ImagesAlone, Source, limited
from densessl.evaluation.data import resized
from densessl.evaluation.data.voc import voc
from densessl.evaluation.store import StoredFeatures, store_features


class Jobs:
    """A data set at one size, its features computed when a protocol first asks for them.

    Args:
        source: Name, source and folder of the data.
        size: Height and width in pixels of the images that the backbone gets.
        chosen: The options of the command line.
        features: The features of the backbone.
        patch: Width of a patch of the backbone, in pixels.
    """

    def __init__(
        self,
        source: tuple[str, Source, str],
        size: tuple[int, int],
        chosen: argparse.Namespace,
        features: Features,
        patch: int,
    ) -> None:
        self.name, self.source, self.folder = source
        self.size, self.chosen, self.features, self.patch = size, chosen, features, patch
        self.stores: dict[str, StoredFeatures] = {}
        self.opened: dict[str, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> Jobs:
        self.stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def run(self, name: str, protocol: Protocol) -> tuple[dict[str, float], list[int]]:
        """The scores, and the number of samples of the splits; a bar counts the images that the protocol reads."""
        test = self._samples(self.chosen.test or self.source.test)
        fit = self._samples(self.chosen.fit or self.source.fit) if protocol.fits else None
        counts = [len(part) for part in (fit, test) if part is not None]
        classes = int(getattr(self._opened(self.chosen.test or self.source.test), "classes", 0))
        job = Job(self.features, fit, test, classes, self.size, self.patch, self.chosen.seed, self.chosen.batch_size)
        if protocol.feed == "stored":
            job = job._replace(
                fit=self._stored(self.chosen.fit or self.source.fit) if protocol.fits else None,
                test=self._stored(self.chosen.test or self.source.test),
            )
        elif protocol.feed == "resized":
            job = job._replace(test=ImagesAlone(test, self.size))
        # How often a protocol reads an image that it crops or warps itself is its own affair: such bars have no end.
        bar = self._bar(f"{name} on {self.name}", sum(counts) if protocol.feed == "stored" else None)

        def counted(images: Tensor) -> Tensor:
            maps = self.features(images)
            bar.update(len(images))
            return maps

        for store in self.stores.values():
            store.seen = bar.update
        with bar:
            return protocol.run(job._replace(features=counted)), counts

    def images(self, count: int) -> ImagesAlone | None:
        """At most so many images of the split that probes learn from, at this size; None for videos and pairs."""
        if self.source.kind not in ("labelled", "photos"):
            return None
        split = self.chosen.fit or self.source.fit or self.chosen.test or self.source.test
        return ImagesAlone(limited(self._samples(split), count), self.size)

    def _bar(self, words: str, total: int | None) -> Any:
        """A progress bar of the first process, which counts the images of that process."""
        from tqdm import tqdm

        # Some containers say that their terminal has no rows. tqdm would show nothing there.
        return tqdm(total=total, desc=words, unit=" images", disable=place()[0] != 0, nrows=20)

    def _opened(self, split: str) -> Any:
        if split not in self.opened:
            if self.name == "voc" and split == "trainaug":
                self.opened[split] = voc(self.folder, split, sbd=self.chosen.sbd)
            else:
                self.opened[split] = self.source.open(self.folder, split)
        return self.opened[split]

    def _samples(self, split: str) -> Any:
        return limited(self._opened(split), self.chosen.limit)

    def _stored(self, split: str) -> StoredFeatures:
        if split not in self.stores:
            samples = self._samples(split)
            data = resized(samples, self.size)
            bar = self._bar(f"features of {self.name}{split and ' '}{split}", len(data))

            def counted(images: Tensor) -> Tensor:
                maps = self.features(images)
                bar.update(min(len(images) * place()[1], len(data) - bar.n))
                return maps

            with bar:
                made = store_features(
                    counted,
                    data,
                    self.chosen.store or tempfile.gettempdir(),
                    batch_size=self.chosen.batch_size,
                    shared=place()[1] > 1,
                    held_bytes=int(self.chosen.held_gb * 1e9),
                )
            self.stores[split] = self.stack.enter_context(made)
        return self.stores[split]
