"""The published linear evaluations: crops, schedule, steps and score against loops and plain PyTorch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torchmetrics")

from densessl.evaluation import DINOV3, FAST, LEOPART, linear_segmentation
from densessl.evaluation._batches import IGNORED
from densessl.evaluation._crops import recoloured, resized_crop, scaled_crop, short_side
from densessl.evaluation._linear_head import Head, _rate, _slid, _starts, score_head, train_head

CLASSES, CELL = 3, 8
SMALL_LEOPART = LEOPART._replace(size=32, grid=16, batch_size=4, epochs=12, drop=10, lr=1.0)
SMALL_DINOV3 = DINOV3._replace(size=32, stride=20, batch_size=4, steps=30, warmup=5, lr=0.05, colours=False)


def blocks(count: int, size: tuple[int, int] = (4, 6), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Images whose colour is their label, in blocks of 8 x 8 pixels."""
    labels = torch.randint(0, CLASSES, (count, *size), generator=torch.Generator().manual_seed(seed))
    labels = labels.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    return [((label * 100 + 20).expand(3, -1, -1).to(torch.uint8), label) for label in labels]


def features(images: Tensor) -> Tensor:
    """How far each pixel's colour is from each class's."""
    return (1 - (images.float()[:, :1] - torch.tensor([20.0, 120, 220]).view(-1, 1, 1)).abs() / 60).clamp(min=0)


@pytest.mark.parametrize("protocol", [SMALL_LEOPART, SMALL_DINOV3, SMALL_DINOV3._replace(colours=True)])
def test_good_features_score_high_on_images_of_several_sizes(protocol):
    fit = blocks(4) + blocks(3, (7, 5), 1)
    test = [*blocks(2, (5, 9), 2), *blocks(1, (8, 4), 3)]
    if not protocol.colours:
        made = linear_segmentation(features, fit, test, CLASSES, protocol, batch_size=2)
        assert 0.8 < made <= 1
    assert linear_segmentation(lambda x: torch.ones(len(x), 2, 4, 4), fit, test, CLASSES, protocol) < 0.35


def test_fast_takes_several_sizes_and_stays_the_default():
    fit = blocks(4) + blocks(3, (7, 5), 1)
    test = [*blocks(2, (5, 9), 2), *blocks(1, (8, 4), 3)]
    made = linear_segmentation(features, fit, test, CLASSES, steps=30)
    assert made > 0.99
    assert linear_segmentation(features, fit, test, CLASSES, FAST, steps=30) == made


def test_one_step_equals_plain_pytorch():
    fit = blocks(4, (4, 4))
    fit[0][1][:9] = 255
    protocol = LEOPART._replace(size=32, grid=16, batch_size=4, epochs=1, scale=(1.0, 1.0))  # whole images
    seen: list[Tensor] = []

    def mean_colour(images: Tensor) -> Tensor:
        seen.append(images)
        return F.avg_pool2d(images.float(), CELL)[:, :2] / 100

    made = train_head(mean_colour, fit, CLASSES, protocol, 4, 7)
    plain = Head(2, CLASSES, protocol, 7)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    labels, flips = [], 0
    for image in seen[0]:
        for other, truth in fit:
            if torch.equal(image, other):
                labels.append(truth)
            elif torch.equal(image, other.flip(2)):
                labels.append(truth.flip(1))
                flips += 1
    assert 0 < flips < 4
    coarse = F.interpolate(torch.stack(labels)[:, None].double(), (16, 16))[:, 0].long()
    logits = F.interpolate(plain(mean_colour(seen[0])), (16, 16), mode="bilinear", align_corners=False)
    F.cross_entropy(logits, coarse, ignore_index=255).backward()
    optimizer.step()
    torch.testing.assert_close(made.layer.weight, plain.layer.weight)
    torch.testing.assert_close(made.layer.bias, plain.layer.bias)


def test_rates_are_the_published_ones():
    assert [_rate(step, 0, 4, LEOPART) for step in (0, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1])
    rates = [_rate(step, 40_000, 1, DINOV3) for step in (0, 750, 1500, 20_000, 39_999)]
    half = 0.5 * (1 + 1e-6) * (1 - 750 / 40_000)
    assert rates == pytest.approx([1e-6, half, 0.99653, 0.49996, 0], abs=1e-5)


def test_batch_statistics_and_dropout():
    torch.manual_seed(0)
    maps = torch.randn(3, 5, 4, 6) * 3 + 2
    ours, theirs = Head(5, CLASSES, DINOV3, 0), nn.BatchNorm2d(5)
    torch.testing.assert_close(ours.normalized(maps), theirs(maps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.norm.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.norm.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval().normalized(maps), theirs.eval()(maps))


@pytest.mark.parametrize(("length", "expected"), [(512, [0]), (600, [0, 88]), (853, [0, 341]), (854, [0, 341, 342])])
def test_windows_end_at_the_border(length, expected):
    assert _starts(length, 512, 341) == expected


def test_sliding_windows_are_averaged():
    protocol = DINOV3._replace(size=16, stride=10, norm=False)
    image = torch.randint(0, 256, (3, 16, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    head = Head(3, CLASSES, protocol, 0).eval()
    made = _slid(features, head, image, protocol, 2)
    total, count = torch.zeros(CLASSES, 16, 33), torch.zeros(33)
    for left in (0, 10, 17):
        total[:, :, left : left + 16] += head(features(image[None, :, :, left : left + 16]))[0]
        count[left : left + 16] += 1
    torch.testing.assert_close(made, total / count)


def test_score_of_absent_classes_ignored_pixels_and_one_image():
    head = Head(3, 5, LEOPART, 0).eval()
    with torch.no_grad():
        head.layer.weight[:, :, 0, 0] = torch.eye(3)[[0, 1, 2, 0, 0]] * torch.tensor([1.0, 1, 1, 0, 0])[:, None]
        head.layer.bias[:] = torch.tensor([0.1, 0.1, 0.1, 0, 0])
    image, labels = blocks(1)[0]
    labels = labels.clone()
    labels[:8] = 255
    labels[8:16] = 3
    overlap = score_head(features, head, [(image, labels)], 5, LEOPART._replace(size=32, grid=None), 1)
    assert int(overlap.sum()) == 24 * 32  # of the resized square, without its ignored quarter
    assert int(overlap[3].sum()) == 8 * 32
    score = linear_segmentation(features, blocks(5), blocks(1), CLASSES + 2, SMALL_LEOPART)
    skipped = linear_segmentation(features, blocks(5), blocks(1), CLASSES + 2, SMALL_LEOPART._replace(absent="skip"))
    assert score == pytest.approx(skipped * 3 / 5)


def test_crops_are_pieces_of_the_image():
    y, x = torch.meshgrid(torch.arange(60), torch.arange(90), indexing="ij")
    image, labels = torch.stack([x, y, x + y]).to(torch.uint8), (x // 30).long()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        crop, found = resized_crop(image, labels, 40, (0.8, 1.0), generator)
        assert crop.shape == (3, 40, 40)
        assert bool(((crop[0].float() // 30 - found).abs() <= 1).all())
        area = (float(crop[0].max()) - float(crop[0].min())) * (float(crop[1].max()) - float(crop[1].min()))
        assert 0.7 < area / (90 * 60) <= 1
        crop, found = scaled_crop(image, labels, 40, (0.5, 2.0), generator)
        assert crop.shape == (3, 40, 40)
        padded = found == IGNORED
        assert bool((crop[:, padded] == torch.tensor([124, 116, 104])[:, None]).all())
        assert bool((~padded).any())
    assert short_side(image, labels, 30)[0].shape == (3, 30, 45)
    changed = {
        tuple(recoloured(image, torch.Generator().manual_seed(seed)).flatten()[:99].tolist()) for seed in range(8)
    }
    assert len(changed) > 5


FIT = blocks(2)
NONE = [(image, torch.full_like(labels, 255)) for image, labels in FIT]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("protocol", lambda: linear_segmentation(features, FIT, FIT, CLASSES, "LEOPART")),
        ("protocol", lambda: linear_segmentation(features, FIT, FIT, CLASSES, FAST._replace(neighbors=3))),
        ("fit", lambda: linear_segmentation(features, [], FIT, CLASSES, SMALL_LEOPART)),
        ("fit", lambda: linear_segmentation(features, iter(FIT), FIT, CLASSES, SMALL_LEOPART)),
        ("fit", lambda: linear_segmentation(features, NONE, FIT, CLASSES, SMALL_LEOPART)),
        (r"fit\[\d\]", lambda: linear_segmentation(features, FIT, FIT, 2, SMALL_LEOPART)),
        ("test", lambda: linear_segmentation(features, FIT, [], CLASSES, SMALL_LEOPART)),
        ("test", lambda: linear_segmentation(features, FIT, NONE, CLASSES, SMALL_DINOV3)),
        ("test", lambda: linear_segmentation(features, FIT, iter(FIT), CLASSES)),
        ("features", lambda: linear_segmentation(lambda x: features(x) / 0, FIT, FIT, CLASSES, SMALL_LEOPART)),
    ],
)
def test_bad_input_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}:"):
        call()
