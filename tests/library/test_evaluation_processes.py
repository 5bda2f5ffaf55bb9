"""Two gloo processes give what one gives: probes on halves and on all images, stores, the command.

One start of two processes serves all tests, since each process needs seconds to import torch.
"""

import json
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from evaluating import camvid_folder, resnet_file, run, scores_of
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
    alone,
    cluster_segmentation,
    correspondence_accuracy,
    in_context_segmentation,
    keypoint_correspondence,
    linear_overlaps,
    linear_segmentation,
    nearest_neighbor_segmentation,
    overcluster_segmentation,
    patch_probe,
    shared_features,
    store_features,
    video_segmentation,
)
from densessl.evaluation._together import summed

CLASSES = 3
PROTOCOLS = "in-context-fast,neighbors,correspondence,tokens,clusters"
SIZES = ((24, 16), (16, 24), (16, 24))


def labelled(count: int, seed: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[tuple[Tensor, Tensor]]:
    """Noisy colours of classes."""
    generator, found = torch.Generator().manual_seed(seed), []
    for index in range(count):
        size = sizes[index % len(sizes)]
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


KNOWN, ASKED = labelled(7, 2, SIZES[1:]), labelled(5, 3, SIZES[1:])


def scores(part: slice) -> dict[str, object]:
    """Every protocol on this part of the images."""
    fit, test = labelled(9, 0)[part], labelled(5, 1)[part]
    sums = [tuple(torch.stack(parts) for parts in zip(one, one, strict=True)) for one in test]  # batches of two
    patch = CAPI._replace(size=None, pixels=False, neighbors=(1, 3), c=(0.1, 10.0))
    leopart = LEOPART._replace(size=16, grid=8, batch_size=4, epochs=3, drop=2)
    dinov3 = DINOV3._replace(size=16, stride=10, batch_size=3, steps=6, warmup=2)
    clusters = LEOPART_CLUSTERS._replace(size=(16, 24), grid=6, components=4, restarts=2, iterations=9, sample=8)
    some = HUMMINGBIRD._replace(cells=9 * 7, neighbors=5)
    videos, photos = [video(seed) for seed in range(3)][part], [image for image, _ in fit]
    return {
        "in context": in_context_segmentation(features, fit, test, CLASSES, some, batch_size=2, seed=3),
        "in context, open": in_context_segmentation(features, sums, sums, CLASSES, HUMMINGBIRD_OPEN, batch_size=4),
        "neighbors": nearest_neighbor_segmentation(features, fit, test, CLASSES, cells=99, neighbors=5, batch_size=4),
        "neighbors, batches": nearest_neighbor_segmentation(features, sums, sums, CLASSES, batch_size=3),
        "k-means": cluster_segmentation(features, test, CLASSES, clusters=5, cells=66, batch_size=2),
        "correspondence": correspondence_accuracy(features, photos, distances=(0.8, 1.6), batch_size=2),
        "fast": linear_segmentation(features, fit, test, CLASSES, steps=15, batch_size=4),
        "overlaps": summed_overlaps(fit, test),
        "overlaps, fewer images than processes": summed_overlaps(labelled(9, 0), labelled(5, 1)[:1]),
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


def summed_overlaps(fit, test) -> tuple[float, ...]:
    """The sum over the images of all processes, which are dealt in shares."""
    return tuple(summed(linear_overlaps(features, fit, test, CLASSES, steps=5).sum(0)).flatten().tolist())


def counted(calls: list[int]):
    def made(images: Tensor) -> Tensor:
        calls.append(len(images))
        return features(images)

    return made


def stored(encode, folder: Path | None, shared: bool) -> list[float]:
    """Probes on stores, with the memory in a file and not."""
    found, options = [], {"batch_size": 2, "shared": shared}
    for held_bytes in (0, 1 << 29):
        with (
            store_features(encode, KNOWN, folder, held_bytes=held_bytes, **options) as known,
            store_features(encode, ASKED, folder, **options) as asked,
        ):
            for protocol in (HUMMINGBIRD._replace(neighbors=5), HUMMINGBIRD_OPEN._replace(cells=7 * 9, neighbors=5)):
                found.append(in_context_segmentation(encode, known, asked, CLASSES, protocol, batch_size=2))
            found.append(nearest_neighbor_segmentation(encode, known, asked, CLASSES, cells=80, batch_size=2))
            found.append(cluster_segmentation(encode, asked, CLASSES, batch_size=2))
    return found


def refused(rank: int, folder: Path) -> list[str]:
    """What the processes are told where they pass different images, or one of them fails."""
    told = []
    for call in (
        lambda: store_features(
            lambda x: features(x) / 0 if rank else features(x), KNOWN, folder, batch_size=2, shared=True
        ),
        lambda: store_features(features, KNOWN[rank:], folder, shared=True),
        lambda: shared_features(features)(torch.stack([KNOWN[rank][0]])),
    ):
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    return told


def work(rank: int, folder: str, port: int, command: tuple[Path, Path]) -> None:
    torch.set_num_threads(1)
    started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
               "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip
    os.environ |= {name: str(value) for name, value in started.items()}
    assert run(*command, Path(folder, "two.json"), "--batch-size", "2", protocols=PROTOCOLS) == 0
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    calls: list[int] = []
    made = {
        "halves": scores(slice(rank, None, 2)),
        "all": scores(slice(None)),
        "stored": stored(counted(calls), Path(folder, "stores"), True),
        "calls": sum(calls),
        "maps": shared_features(features, block=2)(torch.stack([image for image, _ in KNOWN])),
        "refused": refused(rank, Path(folder, "stores")),
    }
    if rank == 0:  # the second never calls it
        with alone():
            made["alone"] = scores(slice(None))
    Path(folder, str(rank)).write_bytes(pickle.dumps(made))
    dist.barrier()  # neither ends while the other still asks the store
    time.sleep(0.3)  # with torch 2.6, closing the group may wait for ever for a thread that still has tensors to free
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("command")
    return camvid_folder(root / "camvid"), resnet_file(root / "resnet18.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, command) -> Path:
    """What the two processes left."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    root = tmp_path_factory.mktemp("two")
    mp.spawn(work, (str(root), store.port, command), nprocs=2)
    return root


@pytest.fixture(scope="module")
def made(folder) -> list[dict]:
    """What each of the two processes found."""
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)]


def flat(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in flat(part)]
    if isinstance(value, tuple):
        return [number for part in value for number in flat(part)]
    return [float(len(value)) if isinstance(value, str) else float(value)]


def test_two_processes_give_what_one_gives(made):
    one = scores(slice(None))
    shared = [found[part] for found in made for part in ("halves", "all")] + [made[0]["alone"]]
    for found in shared:
        for name, expected in one.items():
            # Sums over the processes are rounded in another order.
            assert flat(found[name]) == pytest.approx(flat(expected), abs=1e-6), name
            assert all(number >= 0 for number in flat(expected)[:1])


def test_two_processes_share_stores(made, folder):
    alone = stored(features, None, False)
    for found in made:
        assert found["stored"] == alone
        assert torch.equal(found["maps"], shared_features(features, block=2)(torch.stack([x for x, _ in KNOWN])))
    # Each encoded about half of the 2 x 12 images of the stores.
    assert sum(found["calls"] for found in made) == 2 * 12
    assert [*(folder / "stores").iterdir()] == []


def test_different_images_are_refused_where_the_work_is_shared(made):
    for found in made:
        finite, labelled, images = found["refused"]
        assert "finite" in finite
        assert labelled.startswith("labelled: expected the same images in all processes")
        assert images.startswith("images: expected the same in all processes")


def test_two_processes_run_the_command(folder, command, tmp_path):
    one = tmp_path / "one.json"
    assert run(*command, one, "--batch-size", "2", protocols=PROTOCOLS) == 0
    assert scores_of(folder / "two.json") == scores_of(one)
    assert json.loads((folder / "two.json").read_text())["how"]["processes"] == 2
