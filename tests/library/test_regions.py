"""Label maps, labels drawn from them and means over regions, against loops."""

import re
from collections import Counter

import pytest
import torch
from reference import tokens
from test_contract import NoHostReads
from torch import Tensor

from densessl import cell_labels, map_to_tokens, masks, pool_regions, same_region, sample_labels

B, C, R = 3, 4, 6


def blobs(height: int, width: int, most: int = 5) -> Tensor:
    """Label maps with areas, not noise, of labels from 0 on."""
    coarse = torch.randint(0, most + 1, (B, 3, 4)).float()
    return torch.nn.functional.interpolate(coarse[:, None], (height, width), mode="nearest")[:, 0].long()


def cell_loop(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Counts the pixels of each label in each cell."""
    batch, height, width = labels.shape
    h, w = size
    found = torch.zeros(batch, h, w, dtype=torch.int64)
    for b in range(batch):
        counts = {(i, j): Counter() for i in range(h) for j in range(w)}
        for y in range(height):
            for x in range(width):
                counts[int(y / height * h + 1e-9), int(x / width * w + 1e-9)][int(labels[b, y, x])] += 1
        for (i, j), count in counts.items():
            most = max(count.values())
            found[b, i, j] = min(label for label, n in count.items() if n == most)
    return found


@pytest.mark.parametrize("size", [(3, 5), (1, 1), (12, 20), (5, 3), (7, 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_a_cell_takes_the_label_that_covers_most_of_it(size, dtype):
    for labels in (blobs(12, 20), torch.randint(0, 4, (B, 12, 20))):  # the noise has cells with a tie
        got = cell_labels(labels.to(dtype), size)
        assert got.dtype == torch.int64
        assert torch.equal(got, cell_loop(labels, size))
        assert torch.equal(cell_labels(labels[:, None].to(dtype), size), got)


def test_it_is_the_largest_share_of_the_pooled_one_hot_maps():
    """As DetCon's code has it, where a cell is a whole number of pixels; large labels too."""
    labels = torch.randint(0, 5, (B, 12, 20))
    shares = torch.nn.functional.avg_pool2d(torch.nn.functional.one_hot(labels).permute(0, 3, 1, 2).double(), 4)
    assert torch.equal(cell_labels(labels, (3, 5)), shares.argmax(1))
    far = torch.tensor([0, 7, 2**20, 2**31, 2**32 - 1])
    assert torch.equal(cell_labels(far[labels], (3, 5)), far[shares.argmax(1)])


def test_labels_are_drawn_from_those_that_an_image_has():
    labels = torch.tensor([[[4, 4, 0], [9, 4, 2]], [[0, 0, 0], [0, 7, 0]], [[0, 0, 0], [0, 0, 0]]])
    present = [[2, 4, 9], [7], []]
    draws = torch.rand(B, 300)
    got = sample_labels(labels, draws)
    for b, own in enumerate(present):
        expected = [own[min(int(float(draw) * len(own)), len(own) - 1)] if own else 0 for draw in draws[b]]
        assert got[b].tolist() == expected
    assert 60 < (got[0] == 9).sum() < 140  # by its area it would be 50
    edge = torch.tensor([0.0, 1 - 2**-24]).expand(B, 2)
    assert sample_labels(labels, edge).tolist() == [[2, 9], [7, 7], [0, 0]]
    assert sample_labels(labels.byte(), edge.double()).tolist() == [[2, 9], [7, 7], [0, 0]]


def pool_loop(features: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, list[list[bool]]]:
    cells, means, there = tokens(features), [], []
    for b in range(B):
        found = []
        for label in ids[b].tolist():
            own = [cells[b, n] for n, at in enumerate(labels[b].flatten().tolist()) if at == label and label]
            found.append(sum(own) / len(own) if own else 0 * cells[b, 0])
            there.append(bool(own))
        means.append(torch.stack(found))
    return torch.stack(means), [there[R * b : R * b + R] for b in range(B)]


def test_means_and_gradients_equal_the_loop():
    labels = torch.tensor([[[1, 1, 2, 0, 0], [1, 8, 8, 0, 2], [1, 1, 8, 8, 2]]]).repeat(B, 1, 1)
    labels[1] = labels[1].flip(1)
    labels[2] = 0
    ids = torch.tensor([[1, 2, 8, 0, 5, 2], [8, 8, 3, 1, 0, 2], [1, 0, 2, 8, 8, 1]])
    features = torch.randn(B, C, 3, 5, dtype=torch.float64, requires_grad=True)
    got, valid = pool_regions(features, labels, ids)
    expected, there = pool_loop(features, labels, ids)
    assert got.dtype == torch.float64
    assert valid.tolist() == there
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    weight = torch.randn(B, R, C, dtype=torch.float64)
    mine, wanted = (torch.autograd.grad((x * weight).sum(), features)[0] for x in (got, expected))
    torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-14)
    assert torch.equal(pool_regions(map_to_tokens(features), labels.int(), ids.int())[0], got)


def test_negative_labels_count_as_nothing():
    labels = torch.randint(-2, 4, (B, 12, 20))
    assert torch.equal(cell_labels(labels, (3, 5)), cell_loop(labels.clamp(min=0), (3, 5)))
    assert not cell_labels(torch.full((1, 4, 6), -1), (2, 3)).any()


def test_a_cell_that_is_not_finite_reaches_its_own_region_only():
    labels = torch.tensor([[[1, 1, 2, 0, -1], [1, 8, 8, 0, 2], [1, 1, 8, 8, 2]]]).expand(B, -1, -1)
    ids = torch.tensor([[1, 2, 8, 5]]).expand(B, -1)
    clean = torch.randn(B, C, 3, 5)
    dirty = clean.clone()
    dirty[:, :, 0, 3], dirty[:, :, 0, 4], dirty[1, 0, 1, 1] = torch.nan, torch.inf, torch.nan
    dirty.requires_grad_()
    got, there = pool_regions(dirty, labels, ids)
    expected, _ = pool_regions(clean, labels, ids)
    expected[1, 2] = torch.nan
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert there.tolist() == [[True, True, True, False]] * B
    got[[0, 2]].sum().backward()
    assert dirty.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    labels, ids = blobs(3, 5), torch.randint(0, 6, (B, R))
    features = (100 * torch.randn(B, C, 3, 5)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        means, _ = pool_regions(features, labels, ids)
    assert means.dtype == torch.float32
    assert torch.equal(means, pool_regions(features.float(), labels, ids)[0])


def test_the_road_of_a_mask(monkeypatch):
    """Pixels to cells, cells to ids, ids to means; no value is read back from a device other than the CPU."""
    monkeypatch.setattr(masks, "_is_readable", lambda values: False)
    features = torch.randn(B, C, 3, 5, requires_grad=True)
    mask, draws = blobs(12, 20).byte(), torch.rand(B, R)
    with NoHostReads():
        labels = cell_labels(mask, (3, 5))
        ids = sample_labels(labels, draws)
        means, valid = pool_regions(features, labels, ids)
        means.sum().backward()
    assert torch.equal(valid, ids > 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y, i: cell_labels(y[0], (1, 1)), "labels: expected integer (B, h, w), got torch.int64 (3, 5)"),
        (lambda x, y, i: cell_labels(y.float(), (1, 1)), "labels: expected integer (B, h, w), got torch.float32"),
        (lambda x, y, i: cell_labels(y > 0, (1, 1)), "labels: expected integer (B, h, w), got torch.bool"),
        (lambda x, y, i: cell_labels(y, (4, 5)), "size: expected (h, w) of 1 to 3 and 1 to 5"),
        (lambda x, y, i: cell_labels(y, (0, 5)), "size: expected (h, w) of 1 to 3 and 1 to 5"),
        (lambda x, y, i: sample_labels(y, i), "draws: expected floating point (B, R) with B = 3 as labels, got"),
        (lambda x, y, i: sample_labels(y, torch.rand(2, 4)), "got torch.float32 (2, 4)"),
        (lambda x, y, i: pool_regions(x.mT, y, i), "features: expected (B, C, h, w) or (B, h * w, C) with B, h, w = 3"),
        (lambda x, y, i: pool_regions(x[:2], y, i), "got (2, 4, 3, 5)"),
        (lambda x, y, i: pool_regions(x, y, i.float()), "ids: expected integer (B, R) with B = 3 as labels, got"),
        (lambda x, y, i: pool_regions(x, y, i[:2]), "got torch.int64 (2, 6)"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.randn(B, C, 3, 5), blobs(3, 5), torch.randint(0, 6, (B, R)))


def test_the_same_region_in_two_views():
    one, other = torch.randint(-1, 4, (B, 6)), torch.randint(-1, 4, (B, 2, 5))
    one[0, :2] = other[0, 0, :2] = 255
    got = same_region(one, other)
    for b in range(B):
        for i, label in enumerate(one[b].tolist()):
            for j, again in enumerate(other[b].flatten().tolist()):
                assert bool(got[b, i, j]) == (label == again and label > 0 and label != 255)
    assert torch.equal(same_region(one.clamp(0).byte(), other.clamp(0).int()), got)
    for wrong, name in (((one.float(), other), "first"), ((one, other[:1]), "second"), ((one[0], other), "first")):
        with pytest.raises(ValueError, match=rf"^{name}: expected integer \(B, N\) or \(B, h, w\)"):
            same_region(*wrong)


def test_255_and_negative_labels_are_nothing():
    labels = torch.tensor([[[255, 255, 3, 3], [255, 7, 3, -1]]])
    assert cell_labels(labels, (1, 2)).tolist() == [[[0, 3]]]
    assert cell_labels(labels.clamp(0).byte(), (1, 2)).tolist() == [[[0, 3]]]
    assert set(sample_labels(labels, torch.rand(1, 50)).flatten().tolist()) == {3, 7}
    means, there = pool_regions(torch.rand(1, 2, 2, 4), labels, torch.tensor([[255, -1, 3]]))
    assert there.tolist() == [[False, False, True]]
    assert not means[0, :2].any()
