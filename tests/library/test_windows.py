"""Windows find exactly the pairs that the dense mask has, for every kind of view, and look at few others."""

import math

import pytest
import torch
from torch import Tensor

from densessl import DistanceMatcher, cell_centers, coords_from_boxes
from densessl.matching import distance
from densessl.matching._windows import Cells, find_windows

SIZES = [((5, 9), (13, 7)), ((16, 11), (3, 20)), ((1, 1), (9, 8)), ((12, 12), (1, 1)), ((1, 30), (30, 1))]


@pytest.fixture
def only_windows(monkeypatch):
    """No comparison of all with all, however small the maps and large the windows; several blocks."""
    monkeypatch.setattr(distance, "_FEW_PAIRS", 0)
    monkeypatch.setattr(distance, "_WINDOW_COST", 0)
    monkeypatch.setattr(distance, "_BLOCK_WINDOWED", 100)
    monkeypatch.setattr(DistanceMatcher, "_by_rows", None)


def crops(count: int, side: tuple[float, float] = (0.1, 1.0)) -> Tensor:
    """Crops, half of them flipped along x, half along y; some reach beyond the image."""
    sides = torch.empty(count, 2).uniform_(*side)
    start = torch.rand(count, 2) * (1.2 - sides) - 0.1
    low, high = start, start + sides
    flip = torch.rand(count, 2) < 0.5
    return coords_from_boxes(torch.cat([torch.where(flip, high, low), torch.where(flip, low, high)], 1))


def rotations(count: int) -> Tensor:
    """Turned about their centre by any angle, and scaled."""
    angle, scale = 2 * math.pi * torch.rand(count), torch.empty(count).uniform_(0.2, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x, y = torch.rand(2, count)
    rows = [cos, -sin, x - (cos - sin) / 2, sin, cos, y - (sin + cos) / 2, 0 * x, 0 * x, 0 * x + 1]
    return torch.stack(rows, 1).unflatten(1, (3, 3))


def perspectives(count: int) -> Tensor:
    """Sheared and tilted; the horizon stays outside the view."""
    coords = rotations(count)
    coords[:, :2] += 0.1 * torch.randn(count, 2, 3)
    coords[:, 2, :2] = torch.rand(count, 2) - 0.5
    return coords


def mild(count: int) -> Tensor:
    """Tilted a little, as augmentations draw it."""
    coords = rotations(count)
    coords[:, 2, :2] = 0.6 * torch.rand(count, 2) - 0.3
    return coords


def horizons(count: int) -> Tensor:
    """Part of the view looks above the horizon."""
    coords = crops(count)
    coords[:, 2, :2] = 4 * torch.rand(count, 2) - 2.5
    return coords


def tiny(count: int) -> Tensor:
    """Cells of the size of float32's rounding at 0.7."""
    return coords_from_boxes(0.7 + 2e-6 * torch.rand(count, 4))


def broken(count: int) -> Tensor:
    """Unknown, infinite and singular views among sound ones."""
    coords = crops(count)
    for image, value in enumerate((math.nan, math.inf, -math.inf, 0.0)):
        coords[image].view(-1)[torch.randint(9, ())] = value
    coords[4, 1] = 2 * coords[4, 0]
    coords[5, :, 0] = 0
    return coords


def sparse_and_dense(q: Tensor, k: Tensor, sizes: tuple, threshold: float, unit: str, pixels: bool, valid: bool):
    count = len(q)
    arguments = [q, k, *sizes, torch.randint(50, 500, (count, 2)) if pixels else None]
    if valid:
        arguments += [torch.rand(count, *sizes[0]) < 0.8, torch.rand(count, *sizes[1]) < 0.8]
    dense = DistanceMatcher(threshold, unit=unit)(*arguments)
    return DistanceMatcher(threshold, unit=unit, sparse=True)(*arguments), dense


@pytest.mark.usefixtures("only_windows")
@pytest.mark.parametrize("unit", ["max", "min", "query", "key"])
@pytest.mark.parametrize("kind_k", [crops, rotations, perspectives, horizons, tiny, broken])
@pytest.mark.parametrize("kind_q", [crops, perspectives, horizons, tiny])
def test_equal_the_dense_mask(kind_q, kind_k, unit):
    """Ten images at every size, with thresholds from less than a cell to several, in both units of length."""
    found = 0
    for case, sizes in enumerate(SIZES):
        q, k = kind_q(10), kind_k(10)
        threshold = (0.35, 0.7, 1.0, 2.8, 0.5)[case]
        for pixels in (False, True):
            sparse, dense = sparse_and_dense(q, k, sizes, threshold, unit, pixels, valid=case % 2 == 1)
            assert sparse.is_coalesced()
            assert torch.equal(sparse.indices().T, dense.nonzero())
            found += int(dense.sum())
    assert found > 0 or tiny in (kind_q, kind_k)


@pytest.mark.usefixtures("only_windows")
@pytest.mark.parametrize("threshold", [math.inf, 1e30, 1e-30])
def test_equal_the_dense_mask_at_any_threshold(threshold):
    for kind in (crops, perspectives, broken):
        sparse, dense = sparse_and_dense(kind(8), kind(8), SIZES[0], threshold, "max", False, False)
        assert torch.equal(sparse.indices().T, dense.nonzero())
        assert dense.any() == (threshold > 1)


@pytest.mark.usefixtures("only_windows")
def test_ties_are_decided_as_in_the_dense_mask():
    """Identical square views: many distances lie on the threshold, up to rounding."""
    coords = crops(20)
    coords = torch.where(torch.rand(20, 1, 1) < 0.5, coords, rotations(20))
    for threshold in (math.sqrt(0.5), 1.0, math.sqrt(2.0), 2.0):
        sparse, dense = sparse_and_dense(coords, coords, ((12, 12), (12, 12)), threshold, "max", False, False)
        assert torch.equal(sparse.indices().T, dense.nonzero())
        above, below = (DistanceMatcher(threshold * (1 + e))(coords, coords, (12, 12)) for e in (1e-5, -1e-5))
        assert above.sum() > below.sum()


@pytest.mark.usefixtures("only_windows")
def test_views_that_do_not_overlap_and_float64():
    left, right = (coords_from_boxes(torch.tensor([[x, 0.1, x + 0.3, 0.9]])) for x in (0.0, 0.6))
    sparse, _ = sparse_and_dense(left, right, SIZES[0], 0.7, "max", False, False)
    assert sparse._nnz() == 0
    assert sparse.shape == (1, 45, 91)
    sparse, dense = sparse_and_dense(perspectives(6).double(), crops(6).double(), SIZES[0], 0.7, "max", True, True)
    assert torch.equal(sparse.indices().T, dense.nonzero())
    assert dense.any()


@pytest.mark.usefixtures("only_windows")
def test_half_precision_coords_are_refused():
    q, k = crops(6, (0.3, 0.9)).bfloat16(), perspectives(6).bfloat16()
    with pytest.raises(ValueError, match=r"coords_q: expected .* float32 or float64, got torch.bfloat16"):
        sparse_and_dense(q, k, SIZES[0], 0.7, "max", True, False)


@pytest.mark.usefixtures("only_windows")
def test_query_coords_may_be_dense():
    image = crops(4, (0.3, 0.9))
    dense = cell_centers(image, (26, 14)).mT.unflatten(2, (26, 14)).clone()
    dense[:, :, :3, :4] = math.nan
    sparse, expected = sparse_and_dense(dense, perspectives(4), ((13, 7), (16, 11)), 0.7, "max", True, False)
    assert torch.equal(sparse.indices().T, expected.nonzero())
    assert expected.any()


def test_each_image_takes_its_road(monkeypatch):
    """Extreme perspectives among crops: its pairs come from rows, theirs from windows, all in order."""
    monkeypatch.setattr(distance, "_FEW_PAIRS", 0)
    rows, compared = DistanceMatcher._by_rows, []

    def counted(self, query, key):
        compared.append(len(query.allowed))
        return rows(self, query, key)

    monkeypatch.setattr(DistanceMatcher, "_by_rows", counted)
    q, k = crops(6, (0.3, 0.9)), crops(6, (0.3, 0.9))
    # What these views show to their right comes ever closer to x = 0.5, and near cells are large.
    k[[1, 4]] = torch.tensor([[5.0, 0.0, 0.1], [5.0, 1.0, 0.1], [10.0, 0.0, 1.0]])
    size = (30, 20)
    sparse, dense = sparse_and_dense(q, k, (size, size), 0.7, "max", False, False)
    assert torch.equal(sparse.coalesce().indices().T, dense.nonzero())
    assert dense.any(2).any(1).sum() > 3
    assert compared == [2]


def test_small_maps_and_dense_keys_are_compared_as_a_whole(monkeypatch):
    monkeypatch.setattr(distance, "find_windows", None)
    match = DistanceMatcher(sparse=True)
    assert match(crops(4), crops(4), (14, 14)).shape == (4, 196, 196)
    dense = cell_centers(crops(1), (32, 32)).mT.unflatten(2, (32, 32))
    assert match(crops(1), dense, (30, 30)).shape == (1, 900, 900)


@pytest.mark.parametrize("kind", [crops, rotations, mild])
def test_windows_are_small(kind):
    """Pairs looked at, for each that matches: a square around a disc takes 4 / pi, and cells are whole."""
    size = (40, 40)
    q, k = kind(40), kind(40)
    cells = []
    for coords in (q, k):
        one = torch.ones(len(coords), 1600)
        centers = cell_centers(coords, size)
        cells.append(Cells(centers, 0.02 * one, ((centers >= 0) & (centers <= 1)).all(-1)))
    windows = find_windows(*cells, k, size, None, 0.7, "max")
    offset = cells[0].centers[:, :, None] - cells[1].centers[:, None]
    near = (offset.norm(dim=-1) < 0.7 * 0.02) & cells[0].allowed[..., None] & cells[1].allowed[:, None]
    looked_at = (windows.width * windows.height).sum()
    assert near.sum() > 10_000
    assert near.sum() < looked_at < 2 * near.sum()


def test_dense_mask_beyond_the_machine_is_refused():
    """A mask of 4 million by 4 million cells; refused before anything of that size is made."""
    eye = torch.eye(3)[None]
    with pytest.raises(ValueError, match=r"^size_q, size_k: a dense mask .* GiB of cpu; set sparse=True$"):
        DistanceMatcher()(eye, eye, (2000, 2000))
