"""Nearest neighbours and logistic regression on cells against loops and brute force, with ties."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("scipy")

from densessl.evaluation import CAPI, patch_probe
from densessl.evaluation._logistic import logistic_regression
from densessl.evaluation._nearest import nearest_keys

CLASSES, CELL = 3, 4
AS_IT_IS = CAPI._replace(size=None, neighbors=(1, 3), c=(0.01, 1.0, 100.0))


def colour_by_class(count: int, seed: int = 0, size: tuple[int, int] = (3, 5)) -> list[tuple[Tensor, Tensor]]:
    labels = torch.randint(0, CLASSES, (count, *size), generator=torch.Generator().manual_seed(seed))
    labels = labels.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)
    return [((label * 90 + 20).expand(3, -1, -1).to(torch.uint8), label) for label in labels]


def colours(images: Tensor) -> Tensor:
    """Whole numbers with few values, so that many cells are equally far."""
    pooled = F.avg_pool2d(images.float(), CELL).div(30).floor()
    return torch.cat([pooled, pooled.flip(1) % 3], 1)


def one_hot(images: Tensor) -> Tensor:
    inner = images[:, 0, CELL // 2 :: CELL, CELL // 2 :: CELL].long()
    return F.one_hot((inner + 25).clamp(0, 269) // 90, CLASSES).movedim(-1, 1).float()


@pytest.mark.parametrize("distance", ["cosine", "L2"])
@pytest.mark.parametrize("block", [5, 64, 1000])
def test_nearest_keys_equal_brute_force_with_ties(distance, block):
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (40, 4), generator=generator).float()
    keys = torch.randint(-2, 3, (301, 4), generator=generator).float()
    query[0], keys[7] = 0, 0
    found = nearest_keys(query, keys, 11, distance, block)
    for row, answer in zip(query.tolist(), found.tolist(), strict=True):

        def far(key: list[float], row: list[float] = row) -> float:
            if distance == "L2":
                return sum((a - b) ** 2 for a, b in zip(row, key, strict=True))
            product = sum(a * b for a, b in zip(row, key, strict=True))
            length = math.sqrt(sum(a * a for a in key))
            return -round(product / length, 5) if length else 0.0

        ranked = sorted(range(301), key=lambda index: (far(keys[index].tolist()), index))
        assert answer == ranked[:11]


@pytest.mark.parametrize("c", [0.01, 3.0])
def test_logistic_regression_reaches_the_least_of_its_objective(c):
    torch.manual_seed(0)
    rows, labels = torch.randn(60, 4).double(), torch.tensor([0, 1, 3] * 20)
    made = logistic_regression(rows, labels, 4, c, 1000)
    weight = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = rows @ weight[:-1] + weight[-1]
        loss = c * F.cross_entropy(logits, torch.tensor([0, 1, 2] * 20), reduction="sum")
        (loss := loss + weight[:-1].square().sum() / 2).backward()
        return loss

    optimizer.step(closure)
    centred = weight.detach() - weight.detach().mean(1, keepdim=True)
    made = made[:, [0, 1, 3]], made[:, 2]
    torch.testing.assert_close(made[0] - made[0].mean(1, keepdim=True), centred, atol=1e-4, rtol=1e-3)
    assert made[1].tolist() == [0, 0, 0, 0, -math.inf]


def brute_force(fit, test, settings, seed) -> tuple[float, int, str]:
    """The nearest neighbours of the protocol in loops over cells and pixels."""

    def cells(pairs):
        found = []
        for image, labels in pairs:
            maps = colours(image[None])[0].double()
            h, w = maps.shape[1:]
            for i in range(h):
                for j in range(w):
                    part = labels[i * CELL : (i + 1) * CELL, j * CELL : (j + 1) * CELL].flatten().tolist()
                    part = [255 if label in (-1, 255) else label for label in part]
                    found.append((maps[:, i, j], part))
        return found

    def common(values):
        return min(set(values), key=lambda value: (-values.count(value), value))

    def score(keys, asked, count, distance, mean, std):
        keys = [(((row - mean) / std).float(), part) for row, part in keys if common(part) != 255]
        hits, union, seen = [0] * CLASSES, [0] * CLASSES, set()
        for row, part in asked:
            row = ((row - mean) / std).float()
            if distance == "L2":
                far = [round(float((row - key).square().sum()), 4) for key, _ in keys]
            else:
                far = [-round(float(row @ key / key.norm().clamp(min=1e-12)), 4) for key, _ in keys]
            ranked = sorted(range(len(keys)), key=lambda index: (far[index], index))[:count]
            for pixel, truth in enumerate(part):
                answer = common([keys[index][1][pixel] for index in ranked])
                if truth == 255:
                    continue
                for c in {truth, answer} - {255}:
                    union[c] += 1
                    seen.add(c)
                hits[truth] += truth == answer
        return sum(hits[c] / union[c] for c in seen) / len(seen)

    held = max(1, int(len(fit) * settings.held_out))
    first = torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed))[:held].tolist()
    train = cells([pair for index, pair in enumerate(fit) if index not in first])
    out = cells([pair for index, pair in enumerate(fit) if index in first])
    rows = torch.stack([row for row, _ in train])
    mean, std = rows.mean(0), rows.std(0, correction=0)
    std[std == 0] = 1
    best = max(
        ((k, d) for k in settings.neighbors for d in settings.distances),
        key=lambda setting: score(train, out, *setting, mean, std),
    )
    return score(cells(fit), cells(test), *best, mean, std), *best


def test_neighbors_equal_brute_force():
    generator = torch.Generator().manual_seed(3)
    sets = []
    for count, seed in ((4, 1), (2, 2)):
        pairs = []
        for image, labels in colour_by_class(count, seed):
            labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.3, (labels + 1) % CLASSES, labels)
            labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.2, 255, labels)
            labels[:CELL, :CELL] = -1  # a cell without a label
            noisy = image.float() + 70 * torch.rand(image.shape, generator=generator)
            pairs.append((noisy.clamp(0, 255).to(torch.uint8), labels))
        sets.append(pairs)
    made = patch_probe(colours, *sets, CLASSES, AS_IT_IS, batch_size=3, seed=5)
    expected, neighbors, distance = brute_force(*sets, AS_IT_IS, 5)
    assert made.neighbors == pytest.approx(expected, abs=1e-6)
    assert (made.chosen_neighbors, made.chosen_distance) == (neighbors, distance)
    assert 0.2 < made.neighbors < 0.9
    assert 0.2 < made.logistic < 0.9


@pytest.mark.parametrize("changes", [{}, {"size": (24, 40)}, {"pixels": False}])
def test_perfect_features_give_one(changes):
    fit, test = colour_by_class(5), colour_by_class(2, 1)
    made = patch_probe(one_hot, fit, test, CLASSES, AS_IT_IS._replace(**changes))
    assert (made.neighbors, made.logistic) == (1, 1)


def test_published_settings():
    assert CAPI.size == (224, 224)
    assert (CAPI.neighbors, CAPI.distances) == ((1, 3, 10, 30), ("cosine", "L2"))
    assert len(CAPI.c) == 8
    assert CAPI.c[0] == pytest.approx(1e-6)
    assert CAPI.c[-1] == pytest.approx(1e5)


def test_images_may_differ_in_size_and_come_in_batches():
    protocol = AS_IT_IS._replace(pixels=False)
    fit = colour_by_class(3) + colour_by_class(2, 1, (4, 2))
    test = colour_by_class(1, 2, (2, 6)) + colour_by_class(1, 3, (5, 5))
    single = patch_probe(one_hot, fit, test, CLASSES, protocol)
    assert (single.neighbors, single.logistic) == (1, 1)
    padded = []
    for image, labels in test:  # one size for all, by pixels that are ignored
        image = F.pad(image, (0, 24 - image.shape[2], 0, 20 - image.shape[1]))
        padded.append((image, F.pad(labels, (0, 24 - labels.shape[1], 0, 20 - labels.shape[0]), value=255)))
    batch = [tuple(torch.stack(parts) for parts in zip(*padded, strict=True))]
    assert patch_probe(one_hot, fit, batch, CLASSES, protocol) == single


def test_one_image_and_an_absent_class():
    fit, test = colour_by_class(4), colour_by_class(1, 2)
    test = [(image, labels.masked_fill(labels == 2, 255)) for image, labels in test]
    made = patch_probe(one_hot, fit, test, CLASSES + 2, AS_IT_IS)
    assert made.neighbors == made.logistic == 1
    only = [(image, torch.zeros_like(labels)) for image, labels in fit]
    assert patch_probe(one_hot, only, only[:1], CLASSES, AS_IT_IS)[:2] == (1, 1)


FIT = colour_by_class(3)
NONE = [(image, torch.full_like(labels, 255)) for image, labels in FIT]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("protocol", lambda: patch_probe(one_hot, FIT, FIT, CLASSES, "CAPI")),
        ("fit", lambda: patch_probe(one_hot, [], FIT, CLASSES)),
        ("fit", lambda: patch_probe(one_hot, FIT[:1], FIT, CLASSES, AS_IT_IS)),
        ("fit", lambda: patch_probe(one_hot, NONE, FIT, CLASSES, AS_IT_IS)),
        ("fit", lambda: patch_probe(one_hot, FIT, FIT, CLASSES, AS_IT_IS._replace(neighbors=(31,)))),
        ("fit", lambda: patch_probe(one_hot, iter(FIT), FIT, CLASSES)),
        ("fit", lambda: patch_probe(one_hot, FIT, FIT, 2)),
        ("test", lambda: patch_probe(one_hot, FIT, NONE, CLASSES, AS_IT_IS)),
        ("test.0.", lambda: patch_probe(one_hot, FIT, [(FIT[0][0], FIT[0][1][1:])], CLASSES, AS_IT_IS)),
        ("fit.1.", lambda: patch_probe(one_hot, [FIT[0], (FIT[0][0].float(), FIT[0][1])], FIT, CLASSES, AS_IT_IS)),
        ("features", lambda: patch_probe(lambda x: one_hot(x) * float("nan"), FIT, FIT, CLASSES, AS_IT_IS)),
        ("features", lambda: patch_probe(lambda x: one_hot(x)[:1], FIT, FIT, CLASSES, AS_IT_IS)),
        ("classes", lambda: patch_probe(one_hot, FIT, FIT, 1)),
    ],
)
def test_bad_input_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}:"):
        call()
