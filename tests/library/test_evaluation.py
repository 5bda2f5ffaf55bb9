"""The probes against loops, perfect features, and numbers computed by hand."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")

from densessl.evaluation import (
    HUMMINGBIRD,
    class_shares,
    cluster_segmentation,
    correspondence_accuracy,
    in_context_segmentation,
    linear_overlaps,
    linear_segmentation,
    nearest_neighbor_segmentation,
)
from densessl.evaluation.clustering import _names
from densessl.evaluation.correspondence import _homographies
from densessl.evaluation.matched import class_ious, overlap_of
from densessl.evaluation.neighbors import _memory

CLASSES, CELL = 4, 8


def colour_by_class(count: int, seed: int = 0, size: tuple[int, int] = (4, 6)) -> list[tuple[Tensor, Tensor]]:
    """Images whose first channel is the label, in blocks of 8 x 8 pixels."""
    labels = torch.randint(0, CLASSES, (count, *size), generator=torch.Generator().manual_seed(seed))
    labels = labels.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    return [(label.expand(3, -1, -1).to(torch.uint8), label) for label in labels]


def one_hot(images: Tensor) -> Tensor:
    """Perfect features, at stride 8."""
    return F.one_hot(images[:, 0, CELL // 2 :: CELL, CELL // 2 :: CELL].long(), CLASSES).movedim(-1, 1).float()


def fine_one_hot(images: Tensor) -> Tensor:
    """Perfect features, at stride 1: no upsampling blurs the edges."""
    return F.one_hot(images[:, 0].long(), CLASSES).movedim(-1, 1).float()


def noise(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(int(images.float().sum()))
    return torch.randn(len(images), 5, images.shape[2] // CELL, images.shape[3] // CELL, generator=generator)


def with_ignored(labelled: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(image, labels.masked_fill(labels == CLASSES - 1, 255)) for image, labels in labelled]


def test_mean_iou_by_hand():
    answers, labels = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 2, -1, -1])
    # Class 0: 2 hits of 4; class 1: 2 of 3; class 2: 0 of 1; class 3 occurs nowhere and does not count.
    made = class_ious(overlap_of(answers, labels, 4, 4)).nanmean()
    assert float(made) == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)


def test_class_shares_by_hand():
    labels = torch.tensor([[0, 1, -1, -1], [0, 0, -1, 2]])
    shares = class_shares(labels[None], 3, (1, 2))
    torch.testing.assert_close(shares, torch.tensor([[[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]]))
    assert class_shares(torch.full((1, 2, 2), -1), 3, (1, 1)).sum() == 0


@pytest.mark.parametrize("probe", [partial(linear_segmentation, steps=40, lr=0.2), nearest_neighbor_segmentation])
def test_perfect_features_give_one(probe):
    known, asked = colour_by_class(6), colour_by_class(3, seed=1)
    assert probe(fine_one_hot, known, asked, CLASSES) == 1
    assert probe(fine_one_hot, with_ignored(known), with_ignored(asked), CLASSES - 1) == 1
    assert probe(one_hot, known, asked, CLASSES) > 0.7  # upsampled: right but for the edges
    assert probe(noise, known, asked, CLASSES) < 0.3


def test_overlaps_of_images_add_up_to_the_linear_score():
    known, asked = colour_by_class(6), colour_by_class(3, seed=1)
    layer = torch.nn.Conv2d(4, 5, 1)
    recorded = []  # whether a graph was built of features that ask for a gradient

    def features(images):
        recorded.append(layer(one_hot(images)).requires_grad)
        return layer(one_hot(images))

    every = linear_overlaps(features, known, asked, CLASSES, steps=5)
    assert every.shape == (3, CLASSES, CLASSES)
    assert recorded
    assert not any(recorded)
    for overlap, (_, labels) in zip(every, asked, strict=True):
        assert torch.equal(overlap.sum(1), labels.flatten().bincount(minlength=CLASSES))
    score = linear_segmentation(features, known, asked, CLASSES, steps=5)
    assert float(class_ious(every.sum(0)).nanmean()) == score
    for bad in ([], without_labels(asked)):
        with pytest.raises(ValueError, match=r"^test: expected .* at least one labelled pixel, got none"):
            linear_overlaps(one_hot, known, bad, CLASSES)


@pytest.mark.parametrize("clusters", [None, CLASSES + 3])
def test_perfect_features_give_perfect_clusters(clusters):
    asked = colour_by_class(4)
    perfect = cluster_segmentation(one_hot, asked, CLASSES, clusters=None)
    assert perfect == 1
    assert cluster_segmentation(one_hot, with_ignored(asked), CLASSES - 1, clusters=CLASSES) == 1
    assert cluster_segmentation(noise, asked, CLASSES, clusters=clusters) < 0.5


def test_nearest_neighbors_equal_a_loop():
    known, asked = colour_by_class(3, seed=2), colour_by_class(2, seed=3)

    def mixed(images: Tensor) -> Tensor:
        return one_hot(images).repeat(1, 2, 1, 1) + 0.8 * noise(images)[:, [0, 1, 2, 3, 4, 0, 1, 2]]

    def unit(x: Tensor) -> Tensor:
        return x / x.norm()

    memory = []
    for image, labels in known:
        features = mixed(image[None])[0]
        for i in range(4):
            for j in range(6):
                cell = labels[i * CELL : (i + 1) * CELL, j * CELL : (j + 1) * CELL]
                memory.append((unit(features[:, i, j]), F.one_hot(cell.flatten(), CLASSES).float().mean(0)))
    hits, union = torch.zeros(CLASSES), torch.zeros(CLASSES)
    for image, labels in asked:
        features = mixed(image[None])[0]
        scores = torch.zeros(CLASSES, 4, 6)
        for i in range(4):
            for j in range(6):
                ranked = sorted(((float(unit(features[:, i, j]) @ key), share) for key, share in memory),
                                key=lambda pair: -pair[0])[:5]  # fmt: skip
                weights = [math.exp(similarity / 0.1) for similarity, _ in ranked]
                scores[:, i, j] = sum(w * share for w, (_, share) in zip(weights, ranked, strict=True)) / sum(weights)
        predicted = F.interpolate(scores[None], labels.shape, mode="bilinear", align_corners=False)[0].argmax(0)
        for c in range(CLASSES):
            hits[c] += ((predicted == c) & (labels == c)).sum()
            union[c] += ((predicted == c) | (labels == c)).sum()
    expected = float((hits / union).mean())
    assert 0.3 < expected < 0.9
    made = nearest_neighbor_segmentation(mixed, known, asked, CLASSES, neighbors=5, temperature=0.1, batch_size=1)
    assert made == pytest.approx(expected, abs=1e-6)


def test_a_small_memory_is_drawn_from_all_images_and_a_function_of_the_seed():
    known, asked = colour_by_class(8), colour_by_class(2, seed=1)
    seen = []

    def watched(images: Tensor) -> Tensor:
        seen.append(len(images))
        return one_hot(images)

    few = [nearest_neighbor_segmentation(watched, known, asked, CLASSES, cells=2, batch_size=3, seed=s) for s in (1, 1)]
    assert few[0] == few[1]
    assert sum(seen) == 2 * 10
    assert few[0] < nearest_neighbor_segmentation(one_hot, known, asked, CLASSES)


def test_hungarian_matching_and_majority_by_hand():
    # Both clusters lie mostly on class 0; one to one, the second has to take class 1.
    labels = torch.tensor([0] * 12 + [1] * 3)
    predicted = torch.tensor([0] * 8 + [1] * 4 + [1] * 3)
    assert _names(overlap_of(predicted, labels, 2, 2)).tolist() == [0, 1]
    # With three clusters there is no need to share: each takes its majority.
    assert _names(overlap_of(predicted, labels, 2, 3))[:2].tolist() == [0, 0]


class OnDisk:
    """Items that are decoded each time that they are asked for."""

    def __init__(self, items):
        self.items, self.decoded = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        self.decoded.append(index)
        return item


def test_images_on_disk_are_decoded_once_and_checked_all_the_same():
    known = colour_by_class(5)
    for probe in (
        lambda data: cluster_segmentation(one_hot, data, CLASSES, batch_size=2),
        lambda data: nearest_neighbor_segmentation(one_hot, data, known, CLASSES, batch_size=2),
        lambda data: nearest_neighbor_segmentation(one_hot, known, data, CLASSES, batch_size=2),
    ):
        data = OnDisk(known)
        assert probe(data) == probe(known)
        # The first may be read beforehand, to see whether images come one by one or in batches.
        assert data.decoded[-5:] == list(range(5))
        assert data.decoded[:-5] in ([], [0])
        with pytest.raises(ValueError, match=r"^(test|memory)\[3\]: expected labels int64"):
            probe(OnDisk([*known[:3], (known[3][0], known[3][1].float()), known[4]]))
    photos = OnDisk([image for image, _ in known])
    expected = correspondence_accuracy(one_hot, photos.items, batch_size=2)
    assert correspondence_accuracy(one_hot, photos, batch_size=2) == expected
    assert photos.decoded == list(range(5))
    with pytest.raises(ValueError, match=r"^photos\[1\]: expected uint8"):
        correspondence_accuracy(one_hot, OnDisk([photos.items[0], photos.items[1].float()]))


@pytest.mark.parametrize(
    "probe",
    [
        lambda known, asked: cluster_segmentation(fine_one_hot, asked, CLASSES),
        lambda known, asked: nearest_neighbor_segmentation(fine_one_hot, known, asked, CLASSES),
        lambda known, asked: in_context_segmentation(fine_one_hot, known, asked, CLASSES, HUMMINGBIRD),
    ],
)
def test_images_may_differ_in_size_and_come_in_padded_batches(probe):
    """Every cell knows its class: only padding taken for a label, or cells mixed up between images, can be wrong."""
    known = colour_by_class(2) + colour_by_class(2, seed=1, size=(3, 5))
    asked = colour_by_class(1, seed=2, size=(5, 2)) + colour_by_class(2, seed=3)
    assert probe(known, asked) == 1
    batch = torch.full((2, 3, 40, 48), 200, dtype=torch.uint8), torch.full((2, 40, 48), 255)
    for place, (image, labels) in enumerate((asked[0], asked[1])):
        batch[0][place, :, : image.shape[1], : image.shape[2]] = image
        batch[1][place, : labels.shape[0], : labels.shape[1]] = labels
    padded = [batch, (asked[2][0][None], asked[2][1][None])]
    padding = [(image.clamp(max=CLASSES - 1), labels) for image, labels in padded]
    assert probe(padding, padding) == 1
    assert probe(known, padding) == 1


def test_clusters_are_drawn_out_to_the_labels_a_batch_at_a_time(monkeypatch):
    """At the size of the labels all predictions together would take gigabytes."""
    enlarged = []

    def watched(maps, *args, **kwargs):
        enlarged.append(len(maps))
        return interpolate(maps, *args, **kwargs)

    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", watched)
    cluster_segmentation(one_hot, colour_by_class(5), CLASSES, batch_size=2)
    assert enlarged == [2, 2, 1]


def ramp_photo(height: int, width: int) -> Tensor:
    """Red runs with x, green with y."""
    x = (torch.arange(width) + 0.5) / width * 255
    y = (torch.arange(height) + 0.5) / height * 255
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), torch.zeros(height, width)]).to(torch.uint8)


def position(images: Tensor) -> Tensor:
    """Perfect features: the colours, which are positions, as directions close to one another."""
    x = F.avg_pool2d(images.float(), CELL)[:, :2] / 255
    return torch.cat([0.1 * (x - 0.5), torch.ones_like(x[:, :1])], 1)


def test_perfect_features_find_every_point():
    photos = [ramp_photo(128, 192), ramp_photo(128, 192), ramp_photo(160, 120)]
    found = correspondence_accuracy(position, photos, distances=(0.3, 1.0))
    assert found[1.0] > 0.99  # a photo's rim, where the copy's cells reach beyond it, may be off
    assert 0.2 < found[0.3] < 0.5  # within 0.3 cells: the share of a cell's area, pi 0.3^2 = 0.28
    assert correspondence_accuracy(noise, photos, distances=(1.0,))[1.0] < 0.05


def test_correspondence_equals_a_loop():
    photo = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    photo = F.avg_pool2d(photo.float(), 5, 1, 2).to(torch.uint8)

    def features(images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float(), CELL) - 100

    seen = []

    def watched(images: Tensor) -> Tensor:
        seen.append(images)
        return features(images)

    made = correspondence_accuracy(watched, [photo], distances=(0.8, 2.5), seed=4)
    copy, original = features(seen[0])[0], features(seen[1])[0]
    h = _homographies(1, torch.Generator().manual_seed(4))[0].double()
    errors = []
    for i in range(6):
        for j in range(8):
            x, y, w = (h @ torch.tensor([(j + 0.5) / 8, (i + 0.5) / 6, 1.0]).double()).tolist()
            x, y = x / w, y / w
            if not (0 <= x <= 1 and 0 <= y <= 1):
                continue
            best = max(
                ((k, m) for k in range(6) for m in range(8)),
                key=lambda at: float(F.cosine_similarity(copy[:, i, j], original[:, at[0], at[1]], dim=0)),
            )
            errors.append(math.hypot(best[1] + 0.5 - x * 8, best[0] + 0.5 - y * 6))
    for distance, share in made.items():
        assert share == pytest.approx(sum(e <= distance for e in errors) / len(errors))
    assert 0 < made[0.8] < made[2.5] < 1


def test_photometric_changes_reach_the_copies_only():
    photos = [ramp_photo(64, 64)]
    inverted = correspondence_accuracy(position, photos, photometric=lambda copies: 255 - copies)
    assert inverted[1.0] < 0.3 < correspondence_accuracy(position, photos)[1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_segmentation(one_hot, [], colour_by_class(1), 4), r"fit: expected .* got none"),
        (
            lambda: nearest_neighbor_segmentation(one_hot, colour_by_class(1), [], 4),
            r"test: expected .* got none",
        ),
        (
            lambda: nearest_neighbor_segmentation(
                one_hot, [(colour_by_class(1)[0][0], torch.full((32, 48), 255))], colour_by_class(1), 4
            ),
            r"memory: expected labels in 0..3, got none",
        ),
        (
            lambda: cluster_segmentation(one_hot, [(colour_by_class(1)[0][0], torch.zeros(32, 48))], 4),
            r"test\[0\]: expected labels int64 \(H, W\) = \(32, 48\), got torch.float32",
        ),
        (lambda: cluster_segmentation(one_hot, colour_by_class(1), 4, clusters=3), r"clusters: .* 4 classes, got 3"),
        (lambda: cluster_segmentation(one_hot, colour_by_class(1), 4, clusters=25), r"as there are cells, 24, got 25"),
        (lambda: linear_segmentation(lambda x: x.float().mean((2, 3)), colour_by_class(1), colour_by_class(1), 4),
         r"features: expected it to return maps"),
        (lambda: correspondence_accuracy(position, []), "photos: expected at least one, got none"),
        (lambda: correspondence_accuracy(position, [torch.zeros(3, 8, 8)]), r"photos\[0\]: expected uint8"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def without_labels(labelled):
    return [(image, torch.full_like(labels, 255)) for image, labels in labelled]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("features", lambda known, bad: linear_segmentation(bad, known, known, CLASSES)),
        ("features", lambda known, bad: nearest_neighbor_segmentation(bad, known, known, CLASSES)),
        ("features", lambda known, bad: cluster_segmentation(bad, known, CLASSES)),
        ("features", lambda known, bad: correspondence_accuracy(bad, [image for image, _ in known])),
        ("fit", lambda known, bad: linear_segmentation(one_hot, without_labels(known), known, CLASSES)),
        ("memory", lambda known, bad: nearest_neighbor_segmentation(one_hot, without_labels(known), known, CLASSES)),
        ("classes", lambda known, bad: linear_segmentation(one_hot, known, known, 1)),
        ("classes", lambda known, bad: cluster_segmentation(one_hot, known, 1)),
        ("neighbors", lambda known, bad: nearest_neighbor_segmentation(one_hot, known, known, CLASSES, neighbors=0)),
        ("temperature", lambda known, bad: nearest_neighbor_segmentation(one_hot, known, known, 4, temperature=0)),
        ("test", lambda known, bad: nearest_neighbor_segmentation(one_hot, known, without_labels(known), CLASSES)),
        ("classes", lambda known, bad: nearest_neighbor_segmentation(one_hot, known, known, None)),
        ("memory", lambda known, bad: nearest_neighbor_segmentation(one_hot, iter(known), known, CLASSES)),
        ("test", lambda known, bad: in_context_segmentation(one_hot, known, iter(known), CLASSES)),
        (r"memory\[0\]", lambda known, bad: nearest_neighbor_segmentation(one_hot, [([0], [1])], known, CLASSES)),
        ("clusters", lambda known, bad: cluster_segmentation(one_hot, known, CLASSES, clusters=9.5)),
        ("photos", lambda known, bad: correspondence_accuracy(one_hot, None)),
        ("distances", lambda known, bad: correspondence_accuracy(one_hot, [known[0][0]], distances=())),
        (r"photos\[0\]", lambda known, bad: correspondence_accuracy(one_hot, known)),
        *(
            (
                f"protocol.{setting}",
                lambda known, bad, s=setting, v=value: in_context_segmentation(
                    one_hot, known, known, CLASSES, HUMMINGBIRD._replace(**{s: v})
                ),
            )
            for setting, value in (("neighbors", 0), ("temperature", 0.0), ("temperature", float("nan")))
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(name, call):
    def bad(images: Tensor) -> Tensor:
        return one_hot(images) * float("nan")

    with pytest.raises(ValueError, match=f"^{name}:"):
        call(colour_by_class(3), bad)


def test_images_that_are_read_once_may_come_from_an_iterator():
    known = colour_by_class(3)
    assert cluster_segmentation(one_hot, iter(known), CLASSES) == cluster_segmentation(one_hot, known, CLASSES)
    expected = nearest_neighbor_segmentation(one_hot, known, known, CLASSES)
    assert nearest_neighbor_segmentation(one_hot, known, iter(known), CLASSES) == expected


def test_linear_probe_runs_without_gradients():
    known = colour_by_class(3)
    expected = linear_segmentation(one_hot, known, known, CLASSES, steps=20)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert linear_segmentation(one_hot, known, known, CLASSES, steps=20) == expected


@pytest.mark.parametrize("images", [10, 17, 40])
def test_memory_holds_at_most_the_cells_asked_for(images):
    keys, _ = _memory(one_hot, colour_by_class(images), CLASSES, 100, 16, 0)
    assert len(keys) == 100
