"""Dense coords on either side: from view to view, what two views share, and views of an image known in another one."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from densessl import (
    DenseCoords,
    DistanceMatcher,
    MultiView,
    ViewCoords,
    align,
    cell_centers,
    cell_distance,
    coords_from_boxes,
    coords_from_flow,
    overlap_coords,
    plots,
    relative_coords,
    warp,
)
from densessl.geometry import compose


def dense_of(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    return cell_centers(matrix, size).mT.unflatten(2, size)


def turned(count: int) -> Tensor:
    coords = coords_from_boxes(torch.tensor([[0.2, 0.3, 0.8, 0.9]]).expand(count, 4)).clone()
    coords[:, :2, :2] += 0.1 * torch.randn(count, 2, 2)
    coords[:, 2, :2] = 0.2 * torch.randn(count, 2)
    return coords


def test_relative_coords_of_a_dense_source_equal_those_of_its_homography():
    torch.manual_seed(0)
    dst, src = turned(4), turned(4)
    truth = dense_of(relative_coords(dst, src), (19, 14))
    for one in (dense_of(dst, (19, 14)), dst):
        size = (19, 14) if one.ndim == 4 else (120, 150)
        truth = dense_of(relative_coords(dst, src), size)
        found = relative_coords(one, dense_of(src, (120, 150)))
        assert found.shape == (4, 2, *size)
        within = ((truth >= 0.01) & (truth <= 0.99)).all(1)
        beyond = ((truth < -0.01) | (truth > 1.01)).any(1)
        assert found.isfinite().all(1)[within].all()
        assert found.isnan().all(1)[beyond].all()
        apart = (found - truth).abs().amax(1)[within]
        assert apart.max() < 1e-3
        assert within.sum() > 100


def test_relative_coords_of_a_wave_come_back():
    torch.manual_seed(1)
    identity = dense_of(torch.eye(3)[None], (40, 60))
    src = 0.1 + 0.8 * identity + 0.02 * (12 * identity.flip(1)).sin()
    back = relative_coords(src, src)
    known = back.isfinite().all(1)
    assert known.float().mean() > 0.9
    assert (back - identity).abs().amax(1)[known].max() < 1e-3
    src[:, :, 10:20, 10:30] = torch.nan
    assert relative_coords(identity, src).shape == identity.shape
    assert relative_coords(identity, torch.full_like(src, torch.nan)).isnan().all()


def test_overlap_of_dense_views_equals_that_of_crops():
    a = coords_from_boxes(torch.tensor([[0.1, 0.2, 0.7, 0.8], [0.0, 0.0, 0.3, 0.3], [0.9, 0.1, 0.2, 0.6]]))
    b = coords_from_boxes(torch.tensor([[0.3, 0.9, 0.9, 0.1], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]))
    expected, shared = overlap_coords(a, b)
    dense_a, dense_b = dense_of(a, (9, 13)), dense_of(b, (6, 5))
    for one, two in ((dense_a, b), (a, dense_b), (dense_a, dense_b)):
        found, also = overlap_coords(one, two)
        torch.testing.assert_close(found, expected)
        assert also.tolist() == shared.tolist() == [True, False, True]
    assert not overlap_coords(torch.full_like(dense_a, torch.nan), b)[1].any()
    dense_a[:, :, :, 6:] = torch.nan
    low = overlap_coords(dense_a, coords_from_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)))[0]
    assert low[0, 0, 0] == pytest.approx(0.6 * 6 / 13, abs=0.05)


SIZE, OTHER = (60, 80), (70, 50)
INSIDE = v2.Compose([v2.RandomResizedCrop((24, 32), scale=(0.3, 0.8)), v2.RandomHorizontalFlip()])
START = torch.tensor([[0.7, 0.1, 0.15], [-0.1, 0.6, 0.3], [0.05, 0.1, 1.0]])


def test_crops_carry_positions_in_the_other_image():
    torch.manual_seed(2)
    dense_start = dense_of(START[None], SIZE)
    for _ in range(5):
        image, seed = torch.rand(3, *SIZE), int(torch.randint(1000, ()))
        drawn = {}
        for name, start, dense in (
            ("plain", None, False),
            ("homography", START, False),
            ("batched", START[None], False),
            ("dense start", dense_start[0], False),
            ("dense views", START, True),
            ("both", dense_start, True),
        ):
            torch.manual_seed(seed)
            size = None if start is None else OTHER
            drawn[name] = MultiView(INSIDE, dense=dense)(image, coords=start, source_size=size)[0]
        expected = compose(START[None], drawn["plain"].coords.as_subclass(Tensor)[None])
        for name in ("homography", "batched"):
            view = drawn[name]
            assert isinstance(view.coords, ViewCoords)
            assert torch.equal(view.image, drawn["plain"].image)
            assert view.source_size.tolist() == list(OTHER)
            torch.testing.assert_close(view.coords.as_subclass(Tensor)[None], expected)
        truth = dense_of(expected, (24, 32))
        for name in ("dense start", "dense views", "both"):
            coords = drawn[name].coords
            assert isinstance(coords, DenseCoords)
            torch.testing.assert_close(coords.as_subclass(Tensor)[None], truth, atol=5e-4, rtol=0)
    assert drawn["plain"].source_size.tolist() == list(SIZE)


def test_unknown_pixels_and_fill_stay_unknown():
    torch.manual_seed(3)
    flow = torch.randn(2, *SIZE)
    visible = torch.ones(SIZE, dtype=torch.bool)
    visible[20:40, 30:50] = False
    start = coords_from_flow(flow, visible)
    image = visible.float().expand(3, -1, -1)
    turn = v2.RandomRotation((30, 30))
    for dense in (False, True):
        view = MultiView(turn, dense=dense)(image, coords=start)[0]
        shown = view.image[0] > 0.5
        known = view.coords.as_subclass(Tensor).isfinite().all(0)
        assert (known & ~shown).float().mean() < 0.002  # nearest neighbour shows half a pixel to the side
        assert known.float().mean() > 0.5
    with pytest.raises(ValueError, match="coords: the view reaches beyond the image"):
        MultiView(turn)(image, coords=START)
    view = MultiView(turn, dense=True)(image, coords=START)[0]
    assert view.coords.as_subclass(Tensor).isnan().any()


def test_a_mask_moves_along():
    views = MultiView(INSIDE)(torch.rand(3, *SIZE), torch.ones(SIZE), START)
    assert views[0].mask.all()


def test_matches_and_figure_of_crops_of_two_frames():
    pytest.importorskip("matplotlib")
    torch.manual_seed(4)
    frame = torch.rand(3, *SIZE)
    flow = torch.full((2, *SIZE), 3.0)
    first, second = MultiView(INSIDE)(frame)[0], MultiView(INSIDE)(frame, coords=coords_from_flow(flow))[0]
    for sparse in (False, True):
        coords = second.coords.as_subclass(Tensor)[None], first.coords.as_subclass(Tensor)[None]
        mask = DistanceMatcher(0.7, sparse=sparse)(*coords, (6, 8))
        figure = plots.plot_correspondence(second.image, first.image, mask[0], (6, 8))
        assert len(figure.axes) == 2
    warped = warp(torch.rand(1, 3, 6, 8), relative_coords(coords[1], coords[0]), (6, 8))
    assert warped.shape == (1, 3, 6, 8)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (dense_of(torch.eye(3)[None], SIZE) * 60, "coords: expected positions in the other image's unit square"),
        (10 * torch.ones(2, *SIZE), "coords: expected positions .* got values from 10 to 10; .*coords_from_flow"),
        (torch.tensor([[1.0, 0, 30], [0, 1, 20], [0, 0, 1]]), "coords: expected positions"),
        (torch.tensor([[1.0, 0, 12], [0, 1, 0], [0, 0, 1]]), "coords: expected positions"),  # along one axis alone
        (torch.zeros(3, 3), "coords: expected a homography, got a matrix that maps no point"),
        (torch.full((3, 3), torch.nan), "coords: expected a homography, got a matrix that maps no point"),
        (torch.zeros(2, 5, 6), r"coords: expected floating point \(3, 3\), or dense"),
        (torch.zeros(2, *SIZE, dtype=torch.int64), "coords: expected floating point"),
        (torch.zeros(4, 2, *SIZE), "coords: expected floating point"),
    ],
)
def test_what_is_no_start_is_refused_by_name(start, message):
    with pytest.raises(ValueError, match=message):
        MultiView(INSIDE)(torch.rand(3, *SIZE), coords=start)


@pytest.mark.parametrize("zoom", [1, 20, 64, 500])
def test_another_image_may_be_a_small_part(zoom):
    """A slide and one of its patches, wherever that lies."""
    generator = torch.Generator().manual_seed(zoom)
    for _ in range(20):
        x, y = (torch.rand(2, generator=generator) * (1 - zoom)).tolist()
        start = torch.tensor([[zoom, 0, x], [0, zoom, y], [0, 0, 1.0]])
        view = MultiView(v2.Identity())(torch.rand(3, *SIZE), coords=start)[0]
        torch.testing.assert_close(view.coords.as_subclass(Tensor), start)


def test_source_size_is_checked():
    with pytest.raises(ValueError, match="source_size: expected height and width of the other image"):
        MultiView(INSIDE)(torch.rand(3, *SIZE), coords=START, source_size=(1, 2, 3))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("other", ["homography", "dense"])
def test_pixels_passed_as_coords_are_refused_on_either_side(side, other):
    """By all that take two coords; a few places far outside are no error."""
    size = (20, 30)
    pixels = dense_of(torch.eye(3)[None], size) * torch.tensor([30.0, 20.0]).view(2, 1, 1)
    good = torch.eye(3)[None] if other == "homography" else dense_of(torch.eye(3)[None], size)
    pair = (pixels, good) if side == 0 else (good, pixels)
    for name, call in (
        (("coords_q", "coords_k"), lambda a, b: DistanceMatcher(0.7)(a, b, (4, 5))),
        (("coords_q", "coords_k"), lambda a, b: DistanceMatcher(0.7, sparse=True)(a, b, (4, 5))),
        (("coords_q", "coords_k"), lambda a, b: cell_distance(a, b, (4, 5))),
        (("dst", "src"), relative_coords),
        (("a", "b"), overlap_coords),
        (("coords_from", "coords_to"), lambda a, b: align(torch.ones(1, 2, 4, 5), a, b, (3, 3))),
    ):
        with pytest.raises(
            ValueError, match=rf"^{name[side]}: expected positions in the source's unit square, .* 29.5;"
        ):
            call(*pair)
    few = dense_of(torch.eye(3)[None], size)
    few[:, :, :5] = 50.0
    few[:, :, 5:10] = torch.nan
    assert DistanceMatcher(0.7)(*((few, good) if side == 0 else (good, few)), (4, 5)).any()
