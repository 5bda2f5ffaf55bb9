"""Stored features give what computed ones give; in two processes: test_evaluation_processes.py."""

import tempfile

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")

from densessl.evaluation import (
    FAST,
    HUMMINGBIRD,
    HUMMINGBIRD_OPEN,
    cluster_segmentation,
    in_context,
    in_context_segmentation,
    linear_segmentation,
    nearest_neighbor_segmentation,
    patch_probe,
    store_features,
)
from densessl.evaluation._disk import Rows
from densessl.evaluation._held import Held
from densessl.evaluation.retrieval import read_shares

CLASSES = 4


def labelled(count: int, seed: int, height: int = 24, width: int = 40) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (height // 8, width // 8), generator=generator)
        labels = labels.repeat_interleave(8, 0).repeat_interleave(8, 1)
        noise = torch.randint(0, 40, (3, height, width), generator=generator)
        image = (labels * 50 + noise).to(torch.uint8)
        pairs.append((image, labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.2, 255)))
    return pairs


def features(images: Tensor) -> Tensor:
    weight = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return torch.nn.functional.conv2d(images.float() - 100, weight, stride=8)


KNOWN, ASKED = labelled(7, 0), labelled(5, 1)
FEW = HUMMINGBIRD_OPEN._replace(cells=7 * 9, neighbors=5)


@pytest.mark.parametrize("held_bytes", [0, 1 << 29])
@pytest.mark.parametrize("protocol", [HUMMINGBIRD._replace(neighbors=5), FEW, FAST._replace(neighbors=5)])
def test_in_context_reads_a_store(tmp_path, protocol, held_bytes):
    plain = in_context_segmentation(features, KNOWN, ASKED, CLASSES, protocol, batch_size=3, seed=2)
    with (
        store_features(features, KNOWN, tmp_path, batch_size=3, held_bytes=held_bytes) as known,
        store_features(features, ASKED, tmp_path, batch_size=3) as asked,
    ):
        assert known.size == (6, 3, 5)
        assert in_context_segmentation(features, known, asked, CLASSES, protocol, batch_size=3, seed=2) == plain
        assert len([*tmp_path.iterdir()]) == 2
    assert [*tmp_path.iterdir()] == []


def test_the_other_probes_read_a_store(tmp_path):
    def missing(images: Tensor) -> Tensor:
        raise AssertionError("computed again")

    with store_features(features, KNOWN, batch_size=4) as known, store_features(features, ASKED, batch_size=4) as asked:
        plain = nearest_neighbor_segmentation(features, KNOWN, ASKED, CLASSES, batch_size=4)
        assert nearest_neighbor_segmentation(missing, known, asked, CLASSES, batch_size=4) == plain
        plain = cluster_segmentation(features, ASKED, CLASSES, batch_size=4)
        assert cluster_segmentation(missing, asked, CLASSES, batch_size=4) == plain


def test_a_protocol_that_crops_images_refuses_a_store(tmp_path):
    with store_features(features, KNOWN, tmp_path) as known, pytest.raises(ValueError, match="got a store"):
        patch_probe(features, known, ASKED, CLASSES)


def test_a_store_may_be_kept(tmp_path):
    with store_features(features, KNOWN, tmp_path / "new", keep=True, held_bytes=0) as known:
        in_context_segmentation(features, known, ASKED, CLASSES, FEW)
    assert sorted(path.name for path in known.folder.iterdir()) == ["labels", "maps"]
    assert (known.folder / "maps").stat().st_size == 7 * 6 * 3 * 5 * 4


def test_rows(tmp_path):
    rows, expected = Rows(tmp_path / "rows", (3, 2), torch.float32), torch.randn(11, 3, 2)
    rows.write(4, expected[4:])
    rows.write(0, expected[:4])
    assert len(rows) == 11
    assert torch.equal(rows.block(2, 5), expected[2:5])
    assert torch.equal(rows.block(9, 99), expected[9:])
    index = torch.tensor([[10, 0], [3, 3]])
    assert torch.equal(rows.take(index), expected[index])


@pytest.mark.parametrize("normalize_query", [True, False])
def test_shares_are_read_from_files_as_from_memory(tmp_path, normalize_query):
    query, keys, shares = torch.randn(70, 5), torch.randn(900, 5), torch.rand(900, 3)
    on_disk = Rows(tmp_path / "keys", (5,), torch.float32), Rows(tmp_path / "shares", (3,), torch.float32)
    for rows, values in zip(on_disk, (keys, shares), strict=True):
        for part in values.split(130):
            rows.append(part)
    options = {"neighbors": 4, "block": 256, "normalize_query": normalize_query}
    assert torch.equal(read_shares(query, *on_disk, **options), read_shares(query, keys, shares, **options))
    unit = torch.nn.functional.normalize(keys, dim=1)
    cos, best = (torch.nn.functional.normalize(query, dim=1) @ unit.mT).topk(4)
    expected = ((cos / 0.02).softmax(1).unsqueeze(2) * shares[best]).sum(1)
    torch.testing.assert_close(read_shares(query, *on_disk, **options), expected)


@pytest.mark.parametrize(
    ("pairs", "made", "message"),
    [
        ([], features, r"^labelled: expected .* got none"),
        (KNOWN[:1] + labelled(1, 3, 24, 48), features, r"^labelled\[1\]: expected images of one size"),
        (KNOWN[:3] + labelled(1, 3, 24, 48), features, r"^labelled: expected images of one size"),
        (KNOWN, lambda images: features(images) * float("nan"), r"^features: expected finite values"),
        (KNOWN, lambda images: images, r"^features: expected it to return maps"),
        ([image for image, _ in KNOWN], features, r"^labelled\[0\]: expected a pair .* got a tensor alone"),
        ([(image.float(), labels) for image, labels in KNOWN], features, r"^labelled\[0\]: expected an image uint8"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path, pairs, made, message):
    with pytest.raises(ValueError, match=message):
        store_features(made, pairs, tmp_path, batch_size=3)
    assert [*tmp_path.iterdir()] == []


def test_held_tensors_come_back_from_memory_and_from_the_file():
    tensors = [torch.randn(3, 4), torch.arange(6, dtype=torch.int16), torch.randn(2, 5).half(), torch.randn(4, 3).mT]
    tensors += [torch.randn(0, 4), torch.randn(3, 3)]
    for most in (0, 60, 1 << 20):
        held = Held(most)
        for tensor in tensors:
            held.append(tensor)
        assert len(held) == len(tensors)
        for tensor, found in zip(tensors, held, strict=True):
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
        assert torch.equal(held[2], tensors[2])


@pytest.mark.parametrize("most", [0, 900])
def test_maps_in_a_file_give_what_maps_in_memory_give(tmp_path, monkeypatch, most):
    mixed = KNOWN + labelled(3, 4, 16, 24)
    linear = linear_segmentation(features, mixed, ASKED, CLASSES, steps=9, batch_size=3)
    clusters = cluster_segmentation(features, mixed, CLASSES, clusters=6, batch_size=3)
    plain = linear_segmentation(features, KNOWN, ASKED, CLASSES, steps=9, batch_size=3)
    monkeypatch.setattr(Held.__init__, "__defaults__", (most,))
    assert linear_segmentation(features, mixed, ASKED, CLASSES, steps=9, batch_size=3) == linear
    assert cluster_segmentation(features, mixed, CLASSES, clusters=6, batch_size=3) == clusters
    with store_features(features, KNOWN, tmp_path) as known, store_features(features, ASKED, tmp_path) as asked:
        assert linear_segmentation(features, known, asked, CLASSES, steps=9, batch_size=3) == plain


def test_a_memory_in_a_file_gives_what_one_in_memory_gives(tmp_path, monkeypatch):
    mixed = KNOWN + labelled(3, 4, 16, 24)
    for protocol in (HUMMINGBIRD._replace(neighbors=5), FEW._replace(cells=100)):
        expected = in_context_segmentation(features, mixed, ASKED, CLASSES, protocol, batch_size=3)
        for most in (0, 500, 1500):
            with monkeypatch.context() as patch:
                patch.setattr(in_context, "HELD", most)
                patch.setattr(tempfile, "tempdir", str(tmp_path))
                assert in_context_segmentation(features, mixed, ASKED, CLASSES, protocol, batch_size=3) == expected
            assert [*tmp_path.iterdir()] == []
