"""PCK over pairs of images against a loop."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from densessl.evaluation import SPAIR, KeypointPair, keypoint_correspondence

AS_IT_IS = SPAIR._replace(size=None)


def features(images: Tensor) -> Tensor:
    """Whole numbers, so that some cells are equal and similarities tie."""
    return F.avg_pool2d(images.float(), 8).div(64).round() + 1


def pair(seed: int, points: int = 9, size: tuple[int, int] = (40, 64)) -> KeypointPair:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    target = source.flip(2)[:, :, :48]
    places = torch.rand(points, 2, generator=generator) * torch.tensor([size[1], size[0]])
    mirrored = torch.stack([size[1] - places[:, 0], places[:, 1]], 1)
    mirrored[mirrored[:, 0] > 48] = float("nan")
    places[0] = float("nan")
    return KeypointPair(source, target, places, mirrored, 30.0 + seed)


def loop(pairs: list[KeypointPair], alpha: float) -> tuple[list[float], float]:
    shares, right, asked = [], 0, 0
    for source, target, places, truths, extent in pairs:
        sampled = F.grid_sample(
            features(source[None]),
            (places.nan_to_num(0) / torch.tensor([source.shape[2], source.shape[1]]) * 2 - 1)[None, None],
            padding_mode="border",
            align_corners=False,
        )[0, :, 0].T
        cells = features(target[None])[0]
        hits = []
        for point, truth in zip(range(len(places)), truths.tolist(), strict=True):
            if any(math.isnan(value) for value in [*places[point].tolist(), *truth]):
                continue
            best, place = -math.inf, (0, 0)
            for i in range(cells.shape[1]):
                for j in range(cells.shape[2]):
                    similar = float(F.cosine_similarity(sampled[point], cells[:, i, j], dim=0))
                    if similar > best + 1e-6:
                        best, place = similar, (i, j)
            y = (place[0] + 0.5) / cells.shape[1] * target.shape[1]
            x = (place[1] + 0.5) / cells.shape[2] * target.shape[2]
            hits.append(math.hypot(x - truth[0], y - truth[1]) <= alpha * extent)
        shares.append(sum(hits) / len(hits))
        right, asked = right + sum(hits), asked + len(hits)
    return shares, right / asked


def test_accuracy_equals_the_loop():
    pairs = [pair(0), pair(1, 14), pair(2, 5, (56, 72))]
    shares, per_point = loop(pairs, 0.4)
    made = keypoint_correspondence(features, (one for one in pairs), AS_IT_IS._replace(alpha=0.4))
    assert made.images.tolist() == pytest.approx(shares)
    assert made.per_image == pytest.approx(sum(shares) / 3)
    assert made.per_point == pytest.approx(per_point)
    assert 0.1 < per_point < 0.9
    assert made.per_point != pytest.approx(made.per_image)


def test_images_are_resized_and_pairs_without_points_do_not_count():
    seen = []

    def watched(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape))
        return features(images)

    empty = pair(4)
    empty = empty._replace(source_points=empty.source_points * float("nan"))
    made = keypoint_correspondence(watched, [tuple(pair(3)), empty], SPAIR._replace(size=(48, 80)))
    assert set(seen) == {(1, 3, 48, 80)}
    assert math.isnan(float(made.images[1]))
    assert made.per_image == pytest.approx(made.per_point)


ONE = pair(0)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("pairs", lambda: keypoint_correspondence(features, [])),
        ("pairs", lambda: keypoint_correspondence(features, [ONE._replace(target_points=ONE[3] * float("nan"))])),
        ("pairs.0.", lambda: keypoint_correspondence(features, [ONE[:2]])),
        ("pairs.0..target", lambda: keypoint_correspondence(features, [ONE._replace(target=[[0]])])),
        ("pairs.0..source", lambda: keypoint_correspondence(features, [ONE._replace(source=ONE.source.float())])),
        ("pairs.0..target_points", lambda: keypoint_correspondence(features, [ONE._replace(target_points=ONE[3][1:])])),
        (
            "pairs.0..source_points",
            lambda: keypoint_correspondence(features, [ONE._replace(source_points=ONE[2] + 64)]),
        ),
        ("pairs.0..extent", lambda: keypoint_correspondence(features, [ONE._replace(extent=0.0)])),
        ("features", lambda: keypoint_correspondence(lambda x: features(x) * float("nan"), [ONE], AS_IT_IS)),
        ("protocol", lambda: keypoint_correspondence(features, [ONE], "SPAIR")),
    ],
)
def test_bad_input_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}:"):
        call()
