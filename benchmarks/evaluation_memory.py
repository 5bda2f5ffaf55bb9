"""Peak memory of the protocols on labelled images: 1,000 made-up images of 512 px, 384 channels at stride 16.

    python -m benchmarks.evaluation_memory [--images 1000] [--side 512] [--channels 384]

Each protocol runs in a process of its own, which starts at the memory of the imports; the peak is that of the whole
process, pages of files included. The in-context protocols and nearest neighbours read stores, as the command has it,
and HUMMINGBIRD pairs as well. Fewer steps, iterations, seeds and settings than published are run: the memory does not
grow with them.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from densessl.evaluation import (
    CAPI,
    DINOV3,
    FAST,
    HUMMINGBIRD,
    HUMMINGBIRD_OPEN,
    LEOPART,
    LEOPART_CLUSTERS,
    InContext,
    OverclusterSettings,
    cluster_segmentation,
    in_context_segmentation,
    linear_segmentation,
    nearest_neighbor_segmentation,
    overcluster_segmentation,
    patch_probe,
    store_features,
)

CLASSES = 21


class FakeImages(Dataset):
    """Images and labels that are made when they are read.

    Args:
        count: Number of images.
        side: Side of the images in pixels.
        seed: Seed of all images.
    """

    def __init__(self, count: int, side: int, seed: int) -> None:
        self.count, self.side, self.seed = count, side, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * self.count + index)
        cells = torch.randint(0, CLASSES, (8, 8), generator=generator)
        labels = cells.repeat_interleave(self.side // 8, 0).repeat_interleave(self.side // 8, 1)
        return (labels * 10 + torch.arange(3).view(3, 1, 1)).to(torch.uint8), labels


def fake_features(channels: int) -> Callable[[Tensor], Tensor]:
    """Maps at stride 16, whose channels are random mixtures of the colours."""
    weight = torch.randn(channels, 4, 1, 1, generator=torch.Generator().manual_seed(0))

    def features(images: Tensor) -> Tensor:
        cells = F.avg_pool2d(images.float(), 16) / 100 - 1
        place = torch.linspace(-1, 1, cells.shape[3]).expand_as(cells[:, :1])
        return F.conv2d(torch.cat([cells, place], 1), weight)

    return features


Probe = Callable[[Callable[[Tensor], Tensor], FakeImages, FakeImages], object]


def stored(probe: Callable) -> Probe:
    """A probe on the stores of the images' features."""

    def run(features: Callable[[Tensor], Tensor], fit: FakeImages, test: FakeImages) -> object:
        with store_features(features, fit) as known, store_features(features, test) as asked:
            return probe(features, known, asked)

    return run


def in_context(protocol: InContext) -> Probe:
    """In-context segmentation on stores."""
    return stored(lambda f, known, asked: in_context_segmentation(f, known, asked, CLASSES, protocol))


def few_clusters(side: int) -> OverclusterSettings:
    """Over-clustering of images of this side with few iterations."""
    return LEOPART_CLUSTERS._replace(size=(side, side), iterations=2, restarts=1)


FEW = CAPI._replace(c=(1.0,), iterations=3, neighbors=(1, 30), distances=("cosine",), held_out=0.001)
PROBES: dict[str, Probe] = {
    "store alone": stored(lambda features, known, asked: None),
    "in_context_segmentation, FAST": in_context(FAST),
    "in_context_segmentation, HUMMINGBIRD": in_context(HUMMINGBIRD),
    "in_context_segmentation, HUMMINGBIRD_OPEN": in_context(HUMMINGBIRD_OPEN),
    "in_context_segmentation, HUMMINGBIRD, pairs": lambda f, fit, test: in_context_segmentation(f, fit, test, CLASSES),
    "nearest_neighbor_segmentation": stored(
        lambda f, known, asked: nearest_neighbor_segmentation(f, known, asked, CLASSES)
    ),
    "cluster_segmentation": lambda f, fit, test: cluster_segmentation(f, fit, CLASSES, iterations=3),
    "linear_segmentation, FAST": lambda f, fit, test: linear_segmentation(f, fit, test, CLASSES, steps=3),
    "linear_segmentation, LEOPART": lambda f, fit, test: linear_segmentation(
        f, fit, test, CLASSES, LEOPART._replace(epochs=None, steps=2, size=fit.side * 7 // 8)
    ),
    "linear_segmentation, DINOV3": lambda f, fit, test: linear_segmentation(
        f, fit, test, CLASSES, DINOV3._replace(steps=2, warmup=1, size=fit.side, stride=fit.side * 2 // 3)
    ),
    "patch_probe": lambda f, fit, test: patch_probe(f, fit, test, CLASSES, FEW),
    "overcluster_segmentation": lambda f, fit, test: overcluster_segmentation(
        f, fit, CLASSES, clusters=(CLASSES, 500), seeds=1, protocol=few_clusters(fit.side * 7 // 8)
    ),
}


def peak_mb() -> float:
    """Greatest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(name: str, images: int, asked: int, side: int, channels: int) -> tuple[float, float, float]:
    """Memory before and at the peak of a probe, in MB, and its seconds, those of its stores included."""
    features, before, start = fake_features(channels), peak_mb(), time.perf_counter()
    PROBES[name](features, FakeImages(images, side, 0), FakeImages(asked, side, 1))
    return before, peak_mb(), time.perf_counter() - start


def main() -> None:
    """Measures every probe and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--images", type=int, default=1000, help="Images to learn from, to cluster or to remember (%(default)s)."
    )
    parser.add_argument("--asked", type=int, default=16, help="Images to score (%(default)s).")
    parser.add_argument("--side", type=int, default=512, help="Side of the images in pixels (%(default)s).")
    parser.add_argument("--channels", type=int, default=384, help="Channels of the feature maps (%(default)s).")
    parser.add_argument(
        "--only", choices=PROBES, help="Measure this probe alone, in this process (all, each in its own)."
    )
    chosen = parser.parse_args()
    sizes = (chosen.images, chosen.asked, chosen.side, chosen.channels)
    if chosen.only is not None:
        print("| {} | {:.0f} | {:.0f} | {:.0f} |".format(chosen.only, *measure(chosen.only, *sizes)))
        return
    cells = (chosen.side // 16) ** 2
    whole = chosen.images * cells * chosen.channels * 4 / 1e6
    print(f"{chosen.images} maps of {cells} cells and {chosen.channels} channels: {whole:.0f} MB in float32")
    print("| probe | before, MB | peak, MB | seconds |\n|---|---|---|---|", flush=True)
    options = [f"--{name}={value}" for name, value in zip(("images", "asked", "side", "channels"), sizes, strict=True)]
    for name in PROBES:
        subprocess.run([sys.executable, "-m", "benchmarks.evaluation_memory", *options, "--only", name], check=True)


if __name__ == "__main__":
    main()
