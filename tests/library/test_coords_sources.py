"""Coords from flow, disparity, depth and tracks say what a loop over the definition says, and match as it does."""

import math

import pytest
import torch
from torch import Tensor

from densessl import (
    DistanceMatcher,
    cell_centers,
    cell_distance,
    coords_from_depth,
    coords_from_disparity,
    coords_from_flow,
    coords_from_points,
)

EYE = torch.eye(3)[None]


def homographies(count: int, tilt: float) -> Tensor:
    angle, scale = 2 * math.pi * torch.rand(count), torch.empty(count).uniform_(0.6, 1.4)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    x, y = 0.3 + 0.4 * torch.rand(2, count)
    zero = 0 * x
    rows = [cos, -sin, x - (cos - sin) / 2, sin, cos, y - (sin + cos) / 2, zero, zero, zero + 1]
    coords = torch.stack(rows, 1).unflatten(1, (3, 3)).double()
    coords[:, 2, :2] = tilt * (2 * torch.rand(count, 2) - 1)
    return coords


def flow_of(coords: Tensor, size: tuple[int, int], source_size: tuple[int, int]) -> Tensor:
    """The flow, in pixels, that a homography between unit squares makes."""
    (h, w), (high, wide) = size, source_size
    there = cell_centers(coords, size).mT.unflatten(2, size) * coords.new_tensor([wide, high])[:, None, None]
    x, y = torch.meshgrid(torch.arange(w) + 0.5, torch.arange(h) + 0.5, indexing="xy")
    return (there - torch.stack([x, y])).float()


def check_same(match: DistanceMatcher, dense: Tensor, coords: Tensor, cells: tuple, cells_k: tuple, source) -> None:
    """Every pair is the same in both directions; those that rounding puts on the threshold are decided by chance."""
    other, size = EYE.expand(len(coords), 3, 3), source
    for swap in (False, True):
        (of_flow, of_truth), sizes = ((dense, other), (coords, other)), (cells, cells_k)
        if swap:
            of_flow, of_truth, sizes = of_flow[::-1], of_truth[::-1], sizes[::-1]
        unit = match.unit
        apart = cell_distance(*of_truth, *sizes, unit=unit, source_size=size)
        found, expected = (match(*pair, *sizes, size).to_dense() for pair in (of_flow, of_truth))
        tie = (apart - 0.7).abs() < 2e-6
        assert tie.sum() <= 2
        assert torch.equal(found & ~tie, expected & ~tie)
        assert expected.any()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("unit", ["max", "min", "query", "key"])
@pytest.mark.parametrize(("size", "cells"), [((96, 128), (12, 16)), ((105, 63), (15, 9)), ((90, 70), (18, 7))])
def test_matches_of_a_flow_equal_those_of_the_homography_that_made_it(size, cells, unit, sparse):
    torch.manual_seed(0)
    coords, source_size = homographies(16, 0.0), (80, 150)
    dense = coords_from_flow(flow_of(coords, size, source_size), source_size=source_size)
    match = DistanceMatcher(0.7, unit=unit, sparse=sparse)
    for source in (None, torch.tensor(source_size).expand(16, 2)):
        check_same(match, dense, coords.float(), cells, (11, 13), source)


@pytest.mark.parametrize("cells", [(5, 7), (8, 12)])
def test_matches_of_a_flow_equal_those_of_the_perspective_that_made_it(cells):
    torch.manual_seed(1)
    coords = homographies(16, 0.25)
    dense = coords_from_flow(flow_of(coords, (160, 240), (160, 240)))
    check_same(DistanceMatcher(0.7), dense, coords.float(), cells, cells, None)


def test_flow_by_the_definition():
    torch.manual_seed(2)
    flow = 3 * torch.randn(2, 2, 4, 6)
    flow[1, 0, 2, 3] = torch.nan
    visible = torch.rand(2, 4, 6) < 0.7
    coords = coords_from_flow(flow, visible, (5, 9))
    assert coords.shape == flow.shape
    assert coords.dtype == torch.float32
    for b in range(2):
        for i in range(4):
            for j in range(6):
                x, y = (j + 0.5 + flow[b, 0, i, j]) / 9, (i + 0.5 + flow[b, 1, i, j]) / 5
                known = bool(visible[b, i, j]) and -1 <= x <= 2 and -1 <= y <= 2
                expected = torch.stack([x, y]) if known else torch.full((2,), torch.nan)
                torch.testing.assert_close(coords[b, :, i, j], expected, equal_nan=True)
    one = coords_from_flow(flow[0], visible[0], torch.tensor([5, 9]))
    torch.testing.assert_close(one, coords[:1], equal_nan=True)
    each = coords_from_flow(flow, visible, torch.tensor([[5, 9], [5, 9]]))
    torch.testing.assert_close(each, coords, equal_nan=True)


def test_occluded_pixels_never_match():
    torch.manual_seed(3)
    visible = torch.ones(1, 48, 64, dtype=torch.bool)
    visible[:, 8:24, 16:40] = False
    coords = coords_from_flow(torch.randn(1, 2, 48, 64), visible)
    for sparse in (False, True):
        mask = DistanceMatcher(0.7, sparse=sparse)(coords, EYE, (48, 64), (48, 64)).to_dense()
        assert not mask[0][~visible[0].flatten()].any()
        assert mask[0][visible[0].flatten()].any()


def test_disparity_moves_to_the_left():
    disparity = torch.full((2, 4, 8), 2.0)
    disparity[0, 1, 5] = torch.inf
    disparity[1, 2, 7] = torch.nan
    coords = coords_from_disparity(disparity)
    assert torch.allclose(coords[0, :, 3, 6], torch.tensor([4.5 / 8, 3.5 / 4]))
    assert coords[0, :, 1, 5].isnan().all()
    assert coords[1, :, 2, 7].isnan().all()
    assert coords.isnan().sum() == 4
    torch.testing.assert_close(coords_from_disparity(disparity[:, None]), coords, equal_nan=True)
    torch.testing.assert_close(coords_from_disparity(disparity[0]), coords[:1], equal_nan=True)


def test_depth_by_the_definition():
    torch.manual_seed(4)
    h, w = 5, 7
    depth = 1 + torch.rand(2, h, w)
    depth[0, 1, 1], depth[1, 2, 2] = 0.0, torch.nan
    camera = torch.tensor([[6.0, 0.1, 3.4], [0.0, 5.0, 2.6], [0.0, 0.0, 1.0]])
    other = torch.tensor([[4.0, 0.0, 4.5], [0.0, 4.2, 3.1], [0.0, 0.0, 1.0]])
    turn = torch.linalg.matrix_exp(torch.tensor([[0, -0.1, 0.2], [0.1, 0, -0.05], [-0.2, 0.05, 0]]))
    pose = torch.eye(4)
    pose[:3, :3], pose[:3, 3] = turn, torch.tensor([0.2, -0.1, 0.3])
    coords = coords_from_depth(depth, camera, pose, source_intrinsics=other, source_size=(6, 9))
    for b in range(2):
        for i in range(h):
            for j in range(w):
                ray = torch.linalg.solve(camera, torch.tensor([j + 0.5, i + 0.5, 1.0]))
                seen = other @ (turn @ (ray * depth[b, i, j]) + pose[:3, 3])
                expected = seen[:2] / seen[2] / torch.tensor([9.0, 6.0])
                if not depth[b, i, j] > 0 or not ((expected >= -1) & (expected <= 2)).all():
                    expected = torch.full((2,), torch.nan)
                torch.testing.assert_close(coords[b, :, i, j], expected, equal_nan=True)
    behind = torch.eye(4)
    behind[2, 3] = -5.0
    assert coords_from_depth(depth, camera, behind).isnan().all()
    identity = coords_from_depth(torch.ones(h, w), camera, torch.eye(4))
    torch.testing.assert_close(identity, cell_centers(EYE, (h, w)).mT.unflatten(2, (h, w)))


def test_tracks_move_the_pixels_around_them():
    torch.manual_seed(5)
    h, w = 12, 17
    points = torch.rand(2, 6, 2) * torch.tensor([w, h])
    there = points + torch.randn(2, 6, 2)
    points[0, 2] = torch.nan
    visible = torch.ones(2, 6, dtype=torch.bool)
    visible[1, 4] = False
    coords = coords_from_points(points, there, (h, w), visible, radius=3.0, source_size=(10, 20))
    for b in range(2):
        for i in range(h):
            for j in range(w):
                center = torch.tensor([j + 0.5, i + 0.5])
                apart = (points[b] - center).norm(dim=1)
                apart = torch.where(visible[b] & apart.isfinite(), apart, torch.inf)
                expected = torch.full((2,), torch.nan)
                if apart.min() <= 3:
                    n = apart.argmin()
                    expected = (center + there[b, n] - points[b, n]) / torch.tensor([20.0, 10.0])
                torch.testing.assert_close(coords[b, :, i, j], expected, equal_nan=True)
    assert coords_from_points(torch.zeros(0, 2), torch.zeros(0, 2), (4, 5)).isnan().all()
    assert coords_from_points(points, there, (h, w), torch.zeros_like(visible)).isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coords_from_flow(torch.zeros(1, 3, 4, 4)), r"flow: expected floating point \(B, 2, H, W\)"),
        (lambda: coords_from_flow(torch.zeros(2, 4, 4, dtype=torch.int64)), "flow: expected floating point"),
        (lambda: coords_from_flow(torch.zeros(2, 4, 5), torch.ones(4, 5)), "visible: expected bool"),
        (lambda: coords_from_flow(torch.zeros(2, 4, 5), torch.ones(5, dtype=torch.bool)), "visible: expected bool"),
        (lambda: coords_from_flow(torch.zeros(2, 4, 5), source_size=(4,)), "source_size: expected"),
        (lambda: coords_from_flow(torch.zeros(3, 2, 4, 5), source_size=torch.ones(2, 2)), "source_size: expected"),
        (lambda: coords_from_disparity(torch.zeros(1, 2, 4, 5)), "disparity: expected floating point"),
        (lambda: coords_from_depth(torch.ones(4, 5), torch.eye(4), torch.eye(4)), "intrinsics: expected"),
        (lambda: coords_from_depth(torch.ones(4, 5), torch.eye(3), torch.eye(3)), "pose: expected"),
        (lambda: coords_from_points(torch.zeros(3, 3), torch.zeros(3, 3), (4, 5)), "points: expected"),
        (lambda: coords_from_points(torch.zeros(3, 2), torch.zeros(4, 2), (4, 5)), "source_points: expected"),
        (lambda: coords_from_points(torch.zeros(3, 2), torch.zeros(3, 2), (4, 0)), "size: expected"),
        (lambda: coords_from_points(torch.zeros(3, 2), torch.zeros(3, 2), (4, 5), radius=0.0), "radius: expected"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture(scope="module")
def stereo() -> tuple[Tensor, Tensor]:
    """Disparity of scikit-image's stereo pair, and which pixels have one."""
    data = pytest.importorskip("skimage.data")
    try:
        disparity = torch.from_numpy(data.stereo_motorcycle()[2])
    except (OSError, ValueError, ImportError, ModuleNotFoundError) as error:  # not in this build, and no network
        pytest.skip(str(error))
    return disparity, disparity.isfinite()


@pytest.mark.parametrize("unit", ["min", "key"])
@pytest.mark.parametrize("cells", [(31, 46), (62, 92)])
def test_stereo_pair_matches_the_truth(stereo, cells, unit):
    """In diagonals of the right image's cells: those of the left one are very long at the edges of objects."""
    disparity, known = stereo
    h, w = disparity.shape
    coords, source_size = coords_from_disparity(disparity), torch.tensor([[h, w]])
    mask = DistanceMatcher(0.7, unit=unit, sparse=True)(coords, EYE, cells, None, source_size)
    _, query, key = mask.indices()
    high, wide = h / cells[0], w / cells[1]
    row, column = query // cells[1], query % cells[1]
    pixel = ((row + 0.5) * high).long(), ((column + 0.5) * wide).long()
    across = ((column + 0.5) * wide - disparity[pixel]) / wide - (key % cells[1] + 0.5)
    near = (across.abs() <= 1) & ((key // cells[1] - row).abs() <= 1)
    assert near.float().mean() >= 0.99
    assert len(query.unique()) > 0.7 * cells[0] * cells[1]
    assert known[pixel].all()


def test_stereo_cells_without_disparity_match_nothing(stereo):
    disparity, known = stereo
    size = tuple(disparity.shape)
    mask = DistanceMatcher(0.7, sparse=True)(coords_from_disparity(disparity), EYE, size, (125, 185))
    matched = torch.zeros(known.numel(), dtype=torch.bool)
    matched[mask.indices()[1]] = True
    assert not matched.view(size)[~known].any()
    assert matched.view(size)[known].float().mean() > 0.9
