"""k-means, the principal components and the scores of the over-clustering against loops."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("scipy")

from densessl.evaluation import LEOPART_CLUSTERS, matched_iou, overcluster_segmentation
from densessl.evaluation._kmeans import assigned, k_means
from densessl.evaluation.overclustering import _principal

CLASSES = 3
SMALL = LEOPART_CLUSTERS._replace(size=None, grid=9, components=3, restarts=2, iterations=20)


def labelled(count: int, size: tuple[int, int] = (24, 32), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count, 3, 4), generator=generator).float()
    labels = F.interpolate(labels[None], size, mode="nearest-exact")[0].long()
    images = (labels[:, None] * 80 + torch.randint(0, 30, (count, 3, *size), generator=generator)).to(torch.uint8)
    return list(zip(images, labels, strict=True))


def features(images: Tensor) -> Tensor:
    pooled = F.avg_pool2d(images.float(), 4)
    return torch.cat([pooled, pooled.square() / 100, pooled.flip(1).sqrt()], 1)


def test_rows_go_to_the_first_of_equally_near_centres():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (200, 3), generator=generator).float()
    centers = torch.randint(-2, 3, (12, 3), generator=generator).float()
    nearest, distance = assigned(rows, centers)
    for row, place, far in zip(rows.tolist(), nearest.tolist(), distance.tolist(), strict=True):
        all_far = [sum((a - b) ** 2 for a, b in zip(row, center, strict=True)) for center in centers.tolist()]
        assert place == min(range(12), key=lambda index: (all_far[index], index))
        assert far == all_far[place]


def test_k_means_equals_the_loop():
    rows = torch.rand(60, 2, generator=torch.Generator().manual_seed(1)) * 4
    made = k_means(rows, 4, 30, 3, torch.Generator().manual_seed(5))
    generator, best = torch.Generator().manual_seed(5), None
    for _ in range(3):
        centers = [rows[index].tolist() for index in torch.randperm(60, generator=generator)[:4].tolist()]
        for _ in range(30):
            groups = [[] for _ in centers]
            for row in rows.tolist():
                far = [(row[0] - c[0]) ** 2 + (row[1] - c[1]) ** 2 for c in centers]
                groups[far.index(min(far))].append(row)
            assert all(groups)
            centers = [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]
        cost = sum(min((a - c[0]) ** 2 + (b - c[1]) ** 2 for c in centers) for a, b in rows.tolist())
        if best is None or cost < best[0]:
            best = cost, centers
    assert float(assigned(rows, made)[1].sum()) <= best[0] + 1e-3
    torch.testing.assert_close(made, torch.tensor(best[1]), atol=1e-4, rtol=0)


def test_an_empty_cluster_takes_half_of_the_largest():
    rows = torch.cat([torch.zeros(20, 2), torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 0.1 + 5])
    centers = k_means(rows, 6, 50, 1, torch.Generator().manual_seed(0))
    nearest, _ = assigned(rows, centers)
    assert len(set(nearest[20:].tolist())) > 1
    assert bool(centers.isfinite().all())


def test_principal_components_are_those_of_the_upsampled_maps():
    maps = features(torch.stack([image for image, _ in labelled(5)]))
    mean, projection, images = _principal(iter([maps[:2], maps[2:]]), SMALL)
    full = F.interpolate(maps.double(), (9, 9), mode="bilinear", align_corners=False).movedim(1, -1).flatten(0, 2)
    standard = (full - full.mean(0)) / (full.std(0, correction=0) + 1e-5)
    expected = torch.linalg.svd(standard, full_matrices=False).Vh[:3]
    assert images == 5
    torch.testing.assert_close(mean, full.mean(0))
    made = (full - mean) @ projection
    torch.testing.assert_close(made.abs(), (standard @ expected.T).abs(), atol=1e-6, rtol=1e-5)


def test_scores_equal_the_steps_by_hand():
    test = labelled(4)
    test[0][1][:12] = 255
    made = overcluster_segmentation(features, test, CLASSES, clusters=(3, 7), seeds=2, protocol=SMALL, batch_size=3)
    assert list(made) == [3, 7]
    maps = features(torch.stack([image for image, _ in test])).double()
    full = F.interpolate(maps, (9, 9), mode="bilinear", align_corners=False).movedim(1, -1).flatten(0, 2)
    mean, projection, _ = _principal(iter([maps.float()]), SMALL)
    rows = ((full - mean) @ projection).float()
    answers = torch.stack([labels for _, labels in test])
    answers = F.interpolate(answers[:, None].double(), (9, 9), mode="nearest").long().flatten()
    for clusters in (3, 7):
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(rows), generator=generator)[: 256 * clusters]
            nearest, _ = assigned(rows, k_means(rows[chosen], clusters, 20, 2, generator))
            rule = "hungarian" if clusters == CLASSES else "precision"
            expected = matched_iou(nearest, answers, CLASSES, clusters, rule=rule)
            assert made[clusters].seeds[seed] == pytest.approx(expected, abs=0.02)
    assert made[7].mean == pytest.approx(sum(made[7].seeds) / 2)
    assert 0.4 < made[7].mean < 1


def test_images_of_several_sizes_in_batches_and_absent_classes():
    test = labelled(2) + labelled(2, (40, 24), 1)
    resized = SMALL._replace(size=(32, 48))
    single = overcluster_segmentation(features, test, CLASSES, clusters=(6,), seeds=1, protocol=resized)
    batch = [tuple(torch.stack(parts) for parts in zip(*test[:2], strict=True)), *test[2:]]
    assert overcluster_segmentation(features, batch, CLASSES, clusters=(6,), seeds=1, protocol=resized) == single
    more = overcluster_segmentation(features, test, CLASSES + 1, clusters=(6,), seeds=1, protocol=resized)
    assert more[6].mean == pytest.approx(single[6].mean * 3 / 4)
    one = overcluster_segmentation(features, test[:1], CLASSES, clusters=(6,), seeds=1, protocol=SMALL)
    assert 0 < one[6].mean <= 1
    assert one[6].std == 0


TEST = labelled(2)
NONE = [(image, torch.full_like(labels, -1)) for image, labels in TEST]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("clusters", lambda: overcluster_segmentation(features, TEST, CLASSES, clusters=(2,))),
        ("clusters", lambda: overcluster_segmentation(features, TEST, CLASSES, clusters=())),
        ("clusters", lambda: overcluster_segmentation(features, TEST, CLASSES, clusters=(9.5,))),
        ("clusters", lambda: overcluster_segmentation(features, TEST, CLASSES, protocol=SMALL)),
        ("seeds", lambda: overcluster_segmentation(features, TEST, CLASSES, seeds=0)),
        ("test", lambda: overcluster_segmentation(features, [], CLASSES)),
        ("test", lambda: overcluster_segmentation(features, iter(TEST), CLASSES)),
        ("test", lambda: overcluster_segmentation(features, TEST, 2)),
        ("test", lambda: overcluster_segmentation(features, NONE, CLASSES, clusters=(3,), protocol=SMALL)),
        ("features", lambda: overcluster_segmentation(lambda x: features(x) / 0, TEST, CLASSES)),
        ("protocol", lambda: overcluster_segmentation(features, TEST, CLASSES, protocol="LEOPART")),
    ],
)
def test_bad_input_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}:"):
        call()
