"""Buckets find exactly the pairs that the dense mask has, on dense coords of any kind, in linear time."""

import math
import time

import pytest
import torch
from torch import Tensor

from densessl import DistanceMatcher, cell_centers, cell_diagonal, cell_distance, coords_from_boxes, inside
from densessl.matching import distance

SIZES = [((5, 9), (13, 7)), ((16, 11), (3, 20)), ((1, 1), (9, 8)), ((12, 12), (1, 1)), ((1, 30), (30, 1))]


@pytest.fixture
def only_buckets(monkeypatch):
    """No comparison of all with all, however small the maps; several blocks."""
    monkeypatch.setattr(distance, "_FEW_PAIRS", 0)
    monkeypatch.setattr(distance, "_BLOCK_WINDOWED", 100)
    monkeypatch.setattr(DistanceMatcher, "_by_rows", None)


def crops(count: int) -> Tensor:
    sides = torch.empty(count, 2).uniform_(0.1, 1.0)
    low = torch.rand(count, 2) * (1.2 - sides) - 0.1
    flip = torch.rand(count, 2) < 0.5
    high = low + sides
    return coords_from_boxes(torch.cat([torch.where(flip, high, low), torch.where(flip, low, high)], 1))


def dense_crops(count: int) -> Tensor:
    return cell_centers(crops(count), (17, 23)).mT.unflatten(2, (17, 23))


def waves(count: int) -> Tensor:
    """Not even one to one: the views fold, and cells have very different sizes."""
    dense = dense_crops(count)
    phase = 6 * torch.rand(count, 2, 1, 1)
    return dense + 0.08 * (20 * dense.flip(1) + phase).sin()


def holes(count: int) -> Tensor:
    """Unknown and infinite pixels, one image without any that is known."""
    dense = waves(count)
    dense[torch.rand(count, 1, 17, 23).expand_as(dense) < 0.1] = math.nan
    dense[torch.rand_like(dense) < 0.01] = math.inf
    dense[0] = math.nan
    return dense


def jumps(count: int) -> Tensor:
    """Two surfaces at different depths: the cells astride their edge are very large."""
    dense = dense_crops(count)
    dense[:, 0, :, 11:] += 0.3
    return dense


def point(count: int) -> Tensor:
    """All pixels in one place, but for the last digits."""
    return 0.7 + 2e-7 * torch.rand(count, 2, 17, 23)


@pytest.mark.usefixtures("only_buckets")
@pytest.mark.parametrize("unit", ["max", "min", "query", "key"])
@pytest.mark.parametrize("kind_k", [dense_crops, waves, holes, jumps, point])
@pytest.mark.parametrize("kind_q", [crops, waves, holes, jumps])
def test_equal_the_dense_mask(kind_q, kind_k, unit):
    torch.manual_seed(0)
    found = 0
    for case, sizes in enumerate(SIZES):
        threshold = (0.35, 0.7, 1.0, 2.8, 0.5)[case]
        for pixels in (False, True):
            arguments = [kind_q(6), kind_k(6), *sizes, torch.randint(50, 500, (6, 2)) if pixels else None]
            if case % 2:
                arguments += [torch.rand(6, *sizes[0]) < 0.8, torch.rand(6, *sizes[1]) < 0.8]
            dense = DistanceMatcher(threshold, unit=unit)(*arguments)
            sparse = DistanceMatcher(threshold, unit=unit, sparse=True)(*arguments)
            assert torch.equal(sparse.indices().T, dense.nonzero())
            assert sparse.values().all()
            found += int(dense.sum())
    assert found > 0 or kind_k is point


@pytest.mark.usefixtures("only_buckets")
def test_equal_brute_force_from_the_equation():
    torch.manual_seed(1)
    q, k, size_q, size_k = waves(3), holes(3), (6, 5), (4, 7)
    sparse = DistanceMatcher(1.1, sparse=True)(q, k, size_q, size_k).to_dense()
    apart, in_q = cell_distance(q, k, size_q, size_k), inside(q, size_q)
    in_k = inside(k, size_k) & cell_diagonal(k, size_k).isfinite()
    for image in range(3):
        for i in range(30):
            for j in range(28):
                expected = bool(in_q[image, i] and in_k[image, j] and apart[image, i, j] < 1.1)
                assert bool(sparse[image, i, j]) == expected


@pytest.mark.usefixtures("only_buckets")
@pytest.mark.parametrize("threshold", [math.inf, 1e30, 1e-30])
def test_equal_the_dense_mask_at_any_threshold(threshold):
    torch.manual_seed(2)
    for kind in (dense_crops, holes, point):
        q = kind(4)
        dense = DistanceMatcher(threshold)(q, q, *SIZES[0])
        sparse = DistanceMatcher(threshold, sparse=True)(q, q, *SIZES[0])
        assert torch.equal(sparse.indices().T, dense.nonzero())


@pytest.mark.usefixtures("only_buckets")
def test_unknown_cells_never_match_and_float64_stays_exact():
    torch.manual_seed(3)
    q, k = holes(5).double(), waves(5).double()
    dense = DistanceMatcher(0.7)(q, k, (16, 11))
    sparse = DistanceMatcher(0.7, sparse=True)(q, k, (16, 11))
    assert torch.equal(sparse.indices().T, dense.nonzero())
    assert len(sparse.indices()[0].unique()) == 4
    rows = sparse.indices()[:2]
    assert inside(q, (16, 11))[rows[0], rows[1]].all()


def test_time_grows_with_the_cells_and_not_with_their_square():
    torch.manual_seed(4)
    identity = cell_centers(torch.eye(3)[None], (56, 56)).mT.unflatten(2, (56, 56))
    q, k = (identity + 0.02 * (9 * identity.flip(1) + s).sin() for s in (0.0, 1.0))
    match, seconds = DistanceMatcher(0.7, sparse=True), {}
    for side in (56, 224):
        match(q, k, (side, side))
        taken = []
        for _ in range(3):
            start = time.process_time()
            match(q, k, (side, side))
            taken.append(time.process_time() - start)
        seconds[side] = min(taken)
    assert math.log(seconds[224] / seconds[56]) / math.log(16) <= 1.2
