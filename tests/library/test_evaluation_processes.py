"""Two gloo processes give what one gives, whether each passes its half of the images or all of them."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")

from densessl.evaluation import (
    CAPI,
    DAVIS,
    DINOV3,
    HUMMINGBIRD,
    HUMMINGBIRD_OPEN,
    LEOPART,
    LEOPART_CLUSTERS,
    SPAIR,
    KeypointPair,
    in_context_segmentation,
    keypoint_correspondence,
    linear_segmentation,
    overcluster_segmentation,
    patch_probe,
    video_segmentation,
)

CLASSES = 3


def labelled(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Noisy colours of classes, in two sizes."""
    generator, found = torch.Generator().manual_seed(seed), []
    for index in range(count):
        size = (16, 24) if index % 3 else (24, 16)
        labels = torch.randint(0, CLASSES, (size[0] // 8, size[1] // 8), generator=generator)
        labels = labels.repeat_interleave(8, 0).repeat_interleave(8, 1)
        noise = torch.randint(0, 90, (3, *size), generator=generator)
        found.append(((labels * 60 + noise).to(torch.uint8), labels))
    return found


def features(images: Tensor) -> Tensor:
    pooled = F.avg_pool2d(images.float(), 4) / 50 - 2
    return torch.cat([pooled, pooled.square()], 1)


def video(seed: int) -> tuple[Tensor, Tensor]:
    pairs = [labelled(2, seed)[1] for _ in range(5)]
    frames, masks = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return frames, masks


def pair(seed: int) -> KeypointPair:
    generator = torch.Generator().manual_seed(seed)
    source = labelled(2, seed)[1][0]
    points = torch.rand(4 + seed, 2, generator=generator) * 16
    return KeypointPair(source, source.flip(2), points, torch.tensor([24.0, 0]) + points * torch.tensor([-1, 1]), 20.0)


def scores(part: slice) -> dict[str, object]:
    """Every protocol on this part of the images."""
    fit, test = labelled(9, 0)[part], labelled(5, 1)[part]
    sums = [tuple(torch.stack(parts) for parts in zip(one, one, strict=True)) for one in test]  # batches of two
    patch = CAPI._replace(size=None, pixels=False, neighbors=(1, 3), c=(0.1, 10.0))
    leopart = LEOPART._replace(size=16, grid=8, batch_size=4, epochs=3, drop=2)
    dinov3 = DINOV3._replace(size=16, stride=10, batch_size=3, steps=6, warmup=2)
    clusters = LEOPART_CLUSTERS._replace(size=(16, 24), grid=6, components=4, restarts=2, iterations=9, sample=8)
    some = HUMMINGBIRD._replace(cells=9 * 7, neighbors=5)
    videos = [video(seed) for seed in range(3)][part]
    return {
        "in context": in_context_segmentation(features, fit, test, CLASSES, some, batch_size=2, seed=3),
        "in context, open": in_context_segmentation(features, sums, sums, CLASSES, HUMMINGBIRD_OPEN, batch_size=4),
        "fast": linear_segmentation(features, fit, test, CLASSES, steps=15, batch_size=4),
        "leopart": linear_segmentation(features, fit, test, CLASSES, leopart),
        "dinov3": linear_segmentation(features, fit, test, CLASSES, dinov3),
        "patch": patch_probe(features, fit, test, CLASSES, patch),
        "patch, batches": patch_probe(features, fit, sums, CLASSES, patch),
        "clusters": overcluster_segmentation(features, test, CLASSES, clusters=(3, 8), seeds=2, protocol=clusters),
        "videos": video_segmentation(features, iter(videos), DAVIS._replace(side=None, radius=3))[:7],
        "keypoints": keypoint_correspondence(features, [pair(s) for s in range(5)][part], SPAIR._replace(size=None))[
            :2
        ],
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    made = scores(slice(rank, None, 2)), scores(slice(None))
    Path(folder, str(rank)).write_bytes(pickle.dumps(made))
    dist.destroy_process_group()


def flat(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in flat(part)]
    if isinstance(value, tuple):
        return [number for part in value for number in flat(part)]
    return [float(len(value)) if isinstance(value, str) else float(value)]


def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    one = scores(slice(None))
    for rank in range(2):
        for shared in pickle.loads((tmp_path / str(rank)).read_bytes()):
            for name, expected in one.items():
                # Sums over the processes are rounded in another order.
                assert flat(shared[name]) == pytest.approx(flat(expected), abs=1e-6), name
                assert all(number >= 0 for number in flat(expected)[:1])
