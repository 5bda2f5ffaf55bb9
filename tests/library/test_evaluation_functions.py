"""The tensor functions of the evaluation against golden arrays, loops and brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("scipy")

from densessl.evaluation import (
    class_shares,
    keypoint_accuracy,
    matched_iou,
    outlier_tokens,
    position_share,
    propagate_labels,
    rare_first_cells,
    remove_position,
    retrieve_shares,
)

GOLDEN = Path(__file__).parent.parent / "oracles" / "golden"


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key.removeprefix(f"{name}_"): torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize("memory", ["whole", "sampled"])
def test_in_context_golden(memory):
    g = golden("hbird")
    classes, side = int(g["classes"]), g["train_features"].shape[1]
    shares = class_shares(g["train_labels"], classes, (side, side), ignored=0)
    keys = F.normalize(g["train_features"].flatten(1, 2), dim=-1)
    if memory == "sampled":
        generator = torch.Generator().manual_seed(1)
        chosen = torch.cat([rare_first_cells(part, 11, generator) for part in shares.split(3)]).unsqueeze(-1)
        keys, shares = keys.take_along_dim(chosen, 1), shares.take_along_dim(chosen, 1)
    keys, shares = keys.flatten(0, 1), shares.flatten(0, 1)
    torch.testing.assert_close(keys, g[f"{memory}_memory_features"], atol=1e-6, rtol=0)
    torch.testing.assert_close(shares, g[f"{memory}_memory_labels"], atol=1e-6, rtol=0)
    for normalize in (False, True):
        read = retrieve_shares(
            g["val_features"].flatten(0, 2), keys, shares, neighbors=int(g["k"]), normalize_query=normalize, block=50
        )
        read = read.view(g[f"{memory}_shares"].shape)
        torch.testing.assert_close(read, g[f"{memory}_shares"], atol=1e-5, rtol=0)
    size = g["val_labels"].shape[1:]
    predicted = F.interpolate(read.movedim(-1, 1), size, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(predicted, g[f"{memory}_prediction"])
    hungarian = matched_iou(predicted, g["val_labels"], classes, classes)
    assert hungarian == pytest.approx(float(g[f"{memory}_miou_hungarian"]), abs=1e-6)
    known = g["val_labels"] != 255
    iou = [
        ((predicted == c) & (g["val_labels"] == c)).sum()
        / (((predicted == c) | (g["val_labels"] == c)) & known).sum().clamp(min=1)
        for c in range(classes)
    ]
    assert sum(iou) / classes == pytest.approx(float(g[f"{memory}_miou_identity"]), abs=1e-6)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_video_golden(case):
    g = golden("davis")
    neighbors, radius, frames = g[f"{case}_settings"].tolist()
    features = g["features"].movedim(-1, 1)
    shares = propagate_labels(features, g["first"], neighbors=neighbors, radius=radius, frames=frames)
    torch.testing.assert_close(shares, g[f"{case}_shares"], atol=1e-5, rtol=0)


def test_match_golden():
    g = golden("match")
    classes, clusters = g["sizes"].tolist()

    def score(predicted, clusters, **kwargs):
        return matched_iou(g[predicted], g["gt"], classes, clusters, **kwargs)

    assert score("pred", clusters, rule="iou") == pytest.approx(float(g["many_iou"]), abs=1e-6)
    assert score("pred", clusters, rule="precision") == pytest.approx(float(g["many_precision"]), abs=1e-6)
    assert score("pred", clusters, unmatched=0) == pytest.approx(float(g["hungarian_unmatched_to_0"]), abs=1e-6)
    assert score("pred_same", classes) == pytest.approx(float(g["hungarian_same"]), abs=1e-6)


def test_shares_by_hand():
    labels = torch.tensor([[[0, 1, 255, -1, 255, 2], [0, 0, -1, 255, 2, 2]]])
    torch.testing.assert_close(
        class_shares(labels, 3, (1, 3))[0], torch.tensor([[0.75, 0.25, 0], [0, 0, 0], [0, 0, 1]])
    )
    into_0 = class_shares(labels, 3, (1, 3), ignored=0)[0]
    torch.testing.assert_close(into_0, torch.tensor([[0.75, 0.25, 0], [1, 0, 0], [0.25, 0, 0.75]]))


@pytest.mark.parametrize("block", [7, 2000, 5000])
def test_retrieval_equals_brute_force(block):
    torch.manual_seed(0)
    query, keys, shares = torch.randn(13, 6), torch.randn(4501, 6) * 3, torch.rand(4501, 4)
    cos, index = (F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T).topk(9, dim=1)
    expected = ((cos / 0.05).softmax(1)[..., None] * shares[index]).sum(1)
    made = retrieve_shares(query, keys, shares, neighbors=9, temperature=0.05, block=block)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


def test_retrieval_takes_keys_that_come_ever_closer(monkeypatch):
    monkeypatch.setattr("densessl.evaluation._search._FOUND", 1000)
    torch.manual_seed(0)
    near = torch.linspace(0.1, 1, 9001)[:, None]
    keys = F.normalize(torch.randn(1, 6) * near + torch.randn(9001, 6) * (1 - near), dim=1)
    query, shares = keys[-1:].repeat(3, 1) + 0.1 * torch.randn(3, 6), torch.rand(9001, 4)
    cos, index = (F.normalize(query, dim=1) @ keys.T).topk(9, dim=1)
    expected = ((cos / 0.05).softmax(1)[..., None] * shares[index]).sum(1)
    made = retrieve_shares(query, keys, shares, neighbors=9, temperature=0.05)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "radius", "frames"), [((9, 31), 3, 2), ((30, 8), 13, 1), ((5, 6), 0, 9)])
def test_propagation_equals_the_masked_dense_product(size, radius, frames):
    torch.manual_seed(1)
    h, w = size
    features, first = torch.randn(4, 5, h, w), torch.rand(3, h, w)
    shares = [first.flatten(1)]
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius) | (radius == 0)
    unit = F.normalize(features.flatten(2), dim=1)
    for t in range(1, 4):
        context = [0, *range(max(1, t - frames), t)]
        affinity = torch.cat([(unit[t].T @ unit[c] / 0.1).exp() * near for c in context], 1)
        kept = torch.zeros_like(affinity).scatter(1, (top := affinity.topk(5, dim=1)).indices, top.values)
        shares.append((kept / kept.sum(1, keepdim=True) @ torch.cat([shares[c] for c in context], 1).T).T)
    made = propagate_labels(features, first, radius=radius, frames=frames)
    torch.testing.assert_close(made.flatten(2), torch.stack(shares[1:]), atol=1e-5, rtol=0)


def test_exactly_k_of_equal_cells_vote():
    """Where DINO's code lets all cells vote that are as near as the k-th."""
    first = F.one_hot(torch.randint(0, 4, (5, 6)), 4).movedim(-1, 0).float()
    shares = propagate_labels(torch.ones(2, 3, 5, 6), first, neighbors=3, radius=0)
    torch.testing.assert_close(3 * shares, (3 * shares).round())
    assert len(shares.unique()) > 1


def test_rare_cells_come_first_and_cells_without_a_class_last():
    labels = torch.tensor([[0] * 40 + [1] + [255] * 3])
    chosen = [rare_first_cells(labels, 3, torch.Generator().manual_seed(seed))[0].tolist() for seed in range(40)]
    assert sum(40 in part for part in chosen) > 30
    assert sorted(rare_first_cells(labels, 44)[0, -3:].tolist()) == [41, 42, 43]


def test_keypoints_by_hand():
    torch.manual_seed(2)
    source = torch.randn(2, 16, 4, 6)
    target = source.flip(3)
    points = torch.tensor([[[0.5 / 6, 0.5 / 4], [2.5 / 6, 1.5 / 4], [float("nan")] * 2], [[5.5 / 6, 3.5 / 4]] * 3])
    mirrored = points * torch.tensor([-1.0, 1.0]) + torch.tensor([1.0, 0.0])
    perfect = keypoint_accuracy(source, target, points, mirrored, extent=0.5)
    assert (perfect.per_image, perfect.per_point) == (1, 1)
    wrong = mirrored.clone()
    wrong[0, 0, 0] -= 0.06  # within 0.1 of an extent of 1, not of 0.5
    assert keypoint_accuracy(source, target, points, wrong, extent=1.0).per_point == 1
    some = keypoint_accuracy(source, target, points, wrong, extent=torch.tensor([0.5, 0.5]))
    assert some.per_image == pytest.approx(0.75)
    assert some.per_point == pytest.approx(0.8)
    axes = torch.tensor([[1.0, 0.1], [1.0, 0.1]])
    assert keypoint_accuracy(source, target, points, wrong, extent=axes).per_point == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_keypoint_at_just_the_distance_is_right(dtype):
    """As in pixels, where a distance of 0.1 x 80 is 8 exactly; shares of the sides are rounded."""
    sides = torch.tensor([320.0, 240.0], dtype=torch.float64)
    target = torch.eye(15 * 20).view(1, 300, 15, 20)
    y, x = torch.meshgrid(torch.arange(15), torch.arange(20), indexing="ij")
    centers = (torch.stack([x, y], -1).view(-1, 2).double() + 0.5) * 16
    source = (centers / sides)[None].to(dtype)
    for step in ((8, 0), (-8, 0), (0, 8), (0, -8)):
        points = ((centers + torch.tensor(step)) / sides)[None].to(dtype)
        at = keypoint_accuracy(target, target, source, points, extent=(80 / sides)[None], alpha=0.1)
        assert at.per_point == 1
        beyond = keypoint_accuracy(target, target, source, points, extent=(79.9 / sides)[None], alpha=0.1)
        assert beyond.per_point == 0


def test_matching_on_absent_classes_and_leftover_clusters():
    labels = torch.tensor([0] * 6 + [1] * 4 + [255])
    predicted = torch.tensor([0] * 4 + [1] * 2 + [2] * 4 + [0])
    assert matched_iou(predicted, labels, 3, 3) == pytest.approx((4 / 6 + 1 + 0) / 3)
    assert matched_iou(predicted, labels, 2, 3) == pytest.approx((4 / 6 + 1) / 2)
    assert matched_iou(predicted, labels, 2, 3, unmatched=0) == 1
    assert matched_iou(predicted, labels, 2, 3, rule="precision") == 1
    assert matched_iou(labels[:6], labels[:6], 1, 1) == 1


def test_outliers_are_found():
    features = F.normalize(torch.randn(2, 8, 5, 7), dim=1) * (1 + 0.1 * torch.rand(2, 1, 5, 7))
    features[1, :, 2, 3] *= 50
    found = outlier_tokens(features)
    assert found.nonzero().tolist() == [[1, 2, 3]]
    assert torch.equal(outlier_tokens(features.flatten(2).mT), found.flatten(1))


def test_position_is_read_and_removed():
    torch.manual_seed(3)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 9), indexing="ij")
    noise = torch.randn(6, 10, 6, 9)
    direction = torch.linalg.qr(torch.randn(10, 2)).Q
    features = noise + 20 * torch.einsum("kc,chw->khw", direction, torch.stack([y, x]))
    assert position_share(features) > 0.95
    assert position_share(noise) < 0.1
    assert position_share(remove_position(features, 3)) < 0.2
    cleaned = remove_position(features, 1)
    assert position_share(cleaned) < position_share(features)
    assert torch.linalg.matrix_rank(cleaned.movedim(1, -1).reshape(-1, 10)) == 8
    assert torch.equal(remove_position(features, 0), features)


X = torch.randn(4, 3)
MAP = torch.randn(2, 3, 4, 5)
NAN = torch.full((4, 3), float("nan"))
P = torch.rand(2, 3, 2)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("labels", lambda: class_shares(torch.full((1, 4, 4), 7), 3, (2, 2))),
        ("labels", lambda: class_shares(torch.zeros(4, 4), 3, (2, 2))),
        ("size", lambda: class_shares(torch.zeros(1, 4, 4).long(), 3, (0, 2))),
        ("ignored", lambda: class_shares(torch.zeros(1, 4, 4).long(), 3, (2, 2), ignored=1)),
        ("query", lambda: retrieve_shares(NAN, X, X, neighbors=2)),
        ("keys", lambda: retrieve_shares(X, NAN, X, neighbors=2)),
        ("keys", lambda: retrieve_shares(X, torch.randn(4, 5), X, neighbors=2)),
        ("shares", lambda: retrieve_shares(X, X, X[:2], neighbors=2)),
        ("neighbors", lambda: retrieve_shares(X, X, X)),
        ("neighbors", lambda: retrieve_shares(X, X, X, neighbors=0)),
        ("temperature", lambda: retrieve_shares(X, X, X, neighbors=2, temperature=0)),
        ("count", lambda: rare_first_cells(torch.zeros(1, 4).long(), 5)),
        ("labels_or_presence", lambda: rare_first_cells(torch.zeros(4).long(), 1)),
        ("first", lambda: propagate_labels(MAP, torch.rand(2, 4, 4))),
        ("features", lambda: propagate_labels(MAP * float("nan"), torch.rand(2, 4, 5))),
        ("radius", lambda: propagate_labels(MAP, torch.rand(2, 4, 5), radius=-1)),
        ("predicted", lambda: matched_iou(torch.tensor([5]), torch.tensor([0]), 2, 3)),
        ("labels", lambda: matched_iou(torch.tensor([1]), torch.tensor([4]), 2, 3)),
        ("labels", lambda: matched_iou(torch.tensor([1]), torch.tensor([255]), 2, 3)),
        ("rule", lambda: matched_iou(torch.tensor([1]), torch.tensor([0]), 2, 3, rule="best")),
        ("source_points", lambda: keypoint_accuracy(MAP, MAP, P * float("nan"), P, extent=1.0)),
        ("target_points", lambda: keypoint_accuracy(MAP, MAP, P, P + 2, extent=1.0)),
        ("extent", lambda: keypoint_accuracy(MAP, MAP, P, P, extent=torch.ones(3))),
        ("source_points", lambda: keypoint_accuracy(MAP, MAP, P[0, 0], P[0, 0], extent=1.0)),
        ("source_points", lambda: keypoint_accuracy(MAP, MAP, P.tolist(), P, extent=1.0)),
        ("extent", lambda: keypoint_accuracy(MAP, MAP, P, P, extent="1")),
        ("labels", lambda: class_shares([[0]], 3, (2, 2))),
        ("size", lambda: class_shares(torch.zeros(1, 4, 4).long(), 3, 2)),
        ("size", lambda: class_shares(torch.zeros(1, 4, 4).long(), 3, (2.0, 2))),
        ("query", lambda: retrieve_shares(X.tolist(), X, X, neighbors=2)),
        ("neighbors", lambda: retrieve_shares(X, X, X, neighbors=2.5)),
        ("count", lambda: rare_first_cells(torch.zeros(1, 4).long(), 1.5)),
        ("labels_or_presence", lambda: rare_first_cells([[0, 1]], 1)),
        ("labels_or_presence", lambda: rare_first_cells(X[None] * float("nan"), 1)),
        ("frames", lambda: propagate_labels(MAP, torch.rand(2, 4, 5), frames=1.5)),
        ("radius", lambda: propagate_labels(MAP, torch.rand(2, 4, 5), radius=1.5)),
        ("features", lambda: propagate_labels([MAP], torch.rand(2, 4, 5))),
        ("classes", lambda: matched_iou(torch.tensor([1]), torch.tensor([0]), 2.0, 3)),
        ("predicted", lambda: matched_iou([1], torch.tensor([0]), 2, 3)),
        ("k", lambda: outlier_tokens(MAP, 0)),
        ("features", lambda: position_share(MAP[:1])),
        ("rounds", lambda: remove_position(MAP, 2)),
    ],
)
def test_bad_input_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}[:,]"):
        call()
