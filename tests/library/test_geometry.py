import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densessl import (
    DenseCoords,
    DistanceMatcher,
    ViewCoords,
    cell_centers,
    cell_diagonal,
    cell_distance,
    coords_from_boxes,
    coords_from_kornia,
    inside,
    overlap_coords,
    relative_coords,
    warp,
)
from densessl.geometry import compose, inverse_homography

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**31)


def random_homographies(batch: int, generator: torch.Generator, strength: float = 0.2) -> Tensor:
    """Near the identity, so that the whole unit square lies in front; now and then mirrored."""
    noise = torch.rand(batch, 3, 3, generator=generator, dtype=torch.float64) - 0.5
    matrix = torch.eye(3, dtype=torch.float64) + strength * noise
    flip = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
    matrix[:, :, 0] *= flip[:, None]
    matrix[:, :2, 2] += (flip[:, None] < 0).double() * torch.tensor([1.0, 0.0], dtype=torch.float64)
    matrix[:, 2, 0] = matrix[:, 2, 0].abs() * 0.3  # keeps the weight positive on the unit square
    return matrix


def point(matrix: Tensor, x: float, y: float) -> tuple[float, float]:
    (a, b, c), (d, e, f), (g, h, i) = matrix.tolist()
    weight = g * x + h * y + i
    return (a * x + b * y + c) / weight, (d * x + e * y + f) / weight


@given(seeds, sizes)
def test_cell_centers_equal_a_loop(seed, size):
    matrices = random_homographies(3, torch.Generator().manual_seed(seed))
    centers = cell_centers(matrices, size)
    h, w = size
    for b in range(3):
        for i in range(h):
            for j in range(w):
                expected = point(matrices[b], (j + 0.5) / w, (i + 0.5) / h)
                assert centers[b, i * w + j].tolist() == pytest.approx(expected, abs=1e-12)


@given(seeds, sizes)
def test_cell_diagonal_equals_numerical_differentiation(seed, size):
    matrices = random_homographies(2, torch.Generator().manual_seed(seed))
    source = torch.tensor([[30, 50], [70, 20]])
    h, w = size
    step = 1e-6
    for source_size in (None, source):
        diagonal = cell_diagonal(matrices, size, source_size)
        for b in range(2):
            sides = (1, 1) if source_size is None else (source[b, 1].item(), source[b, 0].item())
            for i, j in ((0, 0), (h - 1, w - 1)):
                x, y = (j + 0.5) / w, (i + 0.5) / h
                total = 0.0
                for dx, dy, per in ((step, 0, w), (0, step, h)):
                    after, before = point(matrices[b], x + dx, y + dy), point(matrices[b], x - dx, y - dy)
                    total += sum(
                        ((p - q) * side / (2 * step) / per) ** 2
                        for p, q, side in zip(after, before, sides, strict=True)
                    )
                assert diagonal[b, i * w + j].item() == pytest.approx(math.sqrt(total), rel=1e-6)


@given(seeds)
def test_diagonal_of_a_crop_is_the_published_bin_diagonal(seed):
    boxes = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed))
    diagonal = cell_diagonal(coords_from_boxes(boxes), (5, 9))
    bins = torch.stack([(boxes[:, 2] - boxes[:, 0]) / 9, (boxes[:, 3] - boxes[:, 1]) / 5])
    torch.testing.assert_close(diagonal, bins.norm(dim=0)[:, None].expand(-1, 45))


@pytest.mark.parametrize("unit", ["max", "min", "query", "key"])
@pytest.mark.parametrize("pixels", [False, True])
def test_cell_distance_equals_a_loop(unit, pixels):
    generator = torch.Generator().manual_seed(3)
    q, k = random_homographies(2, generator), random_homographies(2, generator)
    source = torch.tensor([[30, 50], [70, 20]]) if pixels else None
    size_q, size_k = (2, 3), (4, 1)
    distance = cell_distance(q, k, size_q, size_k, unit=unit, source_size=source)
    assert distance.shape == (2, 6, 4)
    dq, dk = cell_diagonal(q, size_q, source), cell_diagonal(k, size_k, source)
    for b in range(2):
        sx, sy = (source[b, 1].item(), source[b, 0].item()) if pixels else (1, 1)
        for i in range(6):
            for j in range(4):
                xq, yq = point(q[b], (i % 3 + 0.5) / 3, (i // 3 + 0.5) / 2)
                xk, yk = point(k[b], 0.5, (j + 0.5) / 4)
                length = math.hypot((xq - xk) * sx, (yq - yk) * sy)
                a, c = dq[b, i].item(), dk[b, j].item()
                divisor = {"max": max(a, c), "min": min(a, c), "query": a, "key": c}[unit]
                assert distance[b, i, j].item() == pytest.approx(length / divisor, rel=1e-9)


@given(seeds)
def test_batch_equals_loop_and_swapping_views_transposes(seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = random_homographies(3, generator).float(), random_homographies(3, generator).float()
    together = cell_distance(q, k, (3, 5), (4, 2))
    for b in range(3):
        assert torch.equal(together[b], cell_distance(q[b : b + 1], k[b : b + 1], (3, 5), (4, 2))[0])
    assert torch.equal(together.mT, cell_distance(k, q, (4, 2), (3, 5)))


@given(seeds)
def test_inverse_and_composition(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = random_homographies(2, generator), random_homographies(2, generator)
    identity = compose(inverse_homography(a), a)
    torch.testing.assert_close(identity, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=1e-10, rtol=0)
    inner = cell_centers(b, (3, 4))
    outer = torch.tensor([[point(a[n], *xy) for xy in inner[n].tolist()] for n in range(2)], dtype=torch.float64)
    torch.testing.assert_close(cell_centers(compose(a, b), (3, 4)), outer)


@given(seeds)
def test_relative_coords_lead_from_one_view_to_the_other(seed):
    generator = torch.Generator().manual_seed(seed)
    dst, src = random_homographies(2, generator), random_homographies(2, generator)
    relative = relative_coords(dst, src)
    there = cell_centers(relative, (3, 4))
    back = torch.tensor([[point(src[n], *xy) for xy in there[n].tolist()] for n in range(2)], dtype=torch.float64)
    torch.testing.assert_close(back, cell_centers(dst, (3, 4)))


def test_flipping_a_view_mirrors_its_cells():
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.9]])
    plain = cell_centers(coords_from_boxes(boxes), (3, 5)).unflatten(1, (3, 5))
    mirrored = cell_centers(coords_from_boxes(boxes[:, [2, 1, 0, 3]]), (3, 5)).unflatten(1, (3, 5))
    torch.testing.assert_close(mirrored, plain.flip(2))


def dense_of(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    return cell_centers(matrix, size).mT.unflatten(2, size)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 8), (16, 24), (31, 7)])
def test_dense_coords_of_a_crop_equal_its_homography_at_every_map_size(size):
    crop = coords_from_boxes(torch.tensor([[0.1, 0.2, 0.7, 0.9], [0.9, 0.1, 0.3, 0.4]]))
    dense = dense_of(crop, (16, 24))
    source = torch.tensor([[30, 50], [70, 20]])
    torch.testing.assert_close(cell_centers(dense, size), cell_centers(crop, size), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        cell_diagonal(dense, size, source), cell_diagonal(crop, size, source), atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(
        cell_distance(dense, crop, size, (3, 2)), cell_distance(crop, crop, size, (3, 2)), atol=1e-3, rtol=1e-3
    )


def test_dense_relative_coords_follow_the_source_view():
    dst, src = random_homographies(2, torch.Generator().manual_seed(0)).split(1)
    relative = relative_coords(dense_of(dst, (6, 8)), src)
    torch.testing.assert_close(relative, dense_of(relative_coords(dst, src), (6, 8)))


def test_unknown_dense_positions_stay_unknown_and_do_not_spread():
    dense = dense_of(torch.eye(3)[None], (8, 8))
    dense[:, :, :, :4] = torch.nan
    centers = cell_centers(dense, (8, 8)).unflatten(1, (8, 8))
    assert centers[:, :, :4].isnan().all()
    assert centers[:, :, 4:].isfinite().all()
    assert not inside(dense, (8, 8)).unflatten(1, (8, 8))[:, :, :4].any()
    diagonal = cell_diagonal(dense, (8, 8)).unflatten(1, (8, 8))
    torch.testing.assert_close(diagonal[:, :, 4:], torch.full((1, 8, 4), math.sqrt(2) / 8))


def test_points_behind_the_horizon_are_unknown():
    matrix = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-2, 0, 1]]])  # the weight is 0 at x = 0.5
    centers = cell_centers(matrix, (1, 4))[0]
    assert centers[:2].isfinite().all()
    assert centers[2:].isnan().all()
    assert inside(matrix, (1, 4)).tolist() == [[True, False, False, False]]


def test_warp_resamples_one_view_on_the_others_grid():
    y, x = torch.meshgrid(torch.linspace(0, 3, 40).double(), torch.linspace(0, 5, 60).double(), indexing="ij")
    source = torch.stack([x.sin() * y.cos(), (x + y).sin(), x * y]).expand(2, -1, -1, -1)  # smooth
    first = coords_from_boxes(torch.tensor([[0.1, 0.1, 0.9, 0.9], [0.8, 0.0, 0.1, 1.0]], dtype=torch.float64))
    second = coords_from_boxes(torch.tensor([[0.3, 0.2, 0.8, 0.7], [0.3, 0.6, 0.6, 0.3]], dtype=torch.float64))
    view_first, view_second = warp(source, first, (80, 120)), warp(source, second, (20, 30))
    again = warp(view_first, relative_coords(second, first), (20, 30))
    assert (again - view_second).abs().max() < 0.02 < (view_second - view_second.flip(-1)).abs().max()


def test_warp_with_identity_and_outside():
    x = torch.rand(1, 2, 5, 7)
    torch.testing.assert_close(warp(x, torch.eye(3)[None], (5, 7)), x)
    shifted = torch.tensor([[[1.0, 0, 2.0], [0, 1, 0], [0, 0, 1]]])
    assert warp(x, shifted, (5, 7)).abs().max() == 0
    assert warp(x, torch.full((1, 3, 3), torch.nan), (5, 7)).abs().max() == 0
    assert warp(x.half(), torch.eye(3)[None], (3, 3)).dtype == torch.float16


def test_warp_continues_the_border_if_told_to():
    x = torch.rand(1, 2, 3, 4)
    coords = coords_from_boxes(torch.tensor([[-0.5, 0.0, 1.0, 2.0]]))  # two cells to the left, one map below
    got = warp(x, coords, (6, 6), outside="border")
    wide = torch.cat([x[..., :1], x[..., :1], x], 3)
    torch.testing.assert_close(got, torch.cat([wide, wide[:, :, -1:].expand(-1, -1, 3, -1)], 2))
    finer = torch.eye(3)[None]
    assert (warp(torch.ones(1, 1, 2, 2), finer, (4, 4))[0, 0, 0] < 1).all()
    torch.testing.assert_close(warp(torch.ones(1, 1, 2, 2), finer, (4, 4), outside="border"), torch.ones(1, 1, 4, 4))
    assert warp(x, torch.full((1, 3, 3), torch.nan), (2, 2), outside="border").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlap_is_the_box_that_two_views_share(dtype):
    first = [
        (0.1, 0.2, 0.7, 0.9),
        (0.8, 0.1, 0.2, 0.6),
        (0.0, 0.0, 0.3, 0.3),
        (0.1, 0.1, 0.9, 0.2),
        (0.5, 0.0, 1.0, 1.0),
    ]
    second = [
        (0.3, 0.1, 0.9, 0.5),
        (0.1, 0.9, 0.4, 0.3),
        (0.4, 0.1, 0.9, 0.2),
        (0.2, 0.3, 0.8, 0.9),
        (0.0, 0.0, 0.5, 1.0),
    ]
    expected = []
    for a, b in zip(first, second, strict=True):
        sides = [(sorted(a[i::2]), sorted(b[i::2])) for i in range(2)]
        low, high = [max(p[0], q[0]) for p, q in sides], [min(p[1], q[1]) for p, q in sides]
        apart = low[0] >= high[0] or low[1] >= high[1]
        expected.append((0.0, 0.0, 1.0, 1.0) if apart else (*low, *high))
    a, b, wanted = (coords_from_boxes(torch.tensor(boxes, dtype=dtype)) for boxes in (first, second, expected))
    for coords, shared in (overlap_coords(a, b), overlap_coords(b, a)):
        torch.testing.assert_close(coords, wanted)
        assert shared.tolist() == [True, True, False, False, False]


def test_overlap_of_turned_views_is_that_of_their_bounding_boxes():
    half = math.sqrt(0.5) / 2
    turned = torch.tensor([[[half, -half, 0.5], [half, half, 0.5 - half], [0, 0, 1]]])  # by 45 degrees about the middle
    corners = torch.stack([torch.tensor(point(turned[0], x, y)) for x in (0.0, 1.0) for y in (0.0, 1.0)])
    crop = coords_from_boxes(torch.tensor([[0.0, 0.3, 0.6, 1.0]]))
    coords, shared = overlap_coords(turned, crop)
    low, high = corners.amin(0), corners.amax(0)
    box = torch.tensor([[low[0], 0.3, 0.6, high[1]]])
    torch.testing.assert_close(coords, coords_from_boxes(box))
    assert shared.all()
    lost = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-2, 0, 1]]])  # half of it lies behind the horizon
    assert not overlap_coords(lost, crop)[1]


def test_views_on_their_overlap_show_the_same():
    y, x = torch.meshgrid(torch.linspace(0, 3, 80).double(), torch.linspace(0, 5, 120).double(), indexing="ij")
    source = torch.stack([x.sin() * y.cos(), (x + y).sin(), x * y]).expand(2, -1, -1, -1)  # smooth
    a = coords_from_boxes(torch.tensor([[0.1, 0.1, 0.9, 0.9], [0.8, 0.0, 0.1, 1.0]], dtype=torch.float64))
    b = coords_from_boxes(torch.tensor([[0.3, 0.2, 1.0, 0.7], [0.0, 0.6, 0.6, 0.3]], dtype=torch.float64))
    overlap, _ = overlap_coords(a, b)
    of_a, of_b, direct = (
        warp(warp(source, view, (60, 70)), relative_coords(overlap, view), (9, 8), outside="border")
        for view in (a, b, overlap)
    )
    assert (of_a - direct).abs().max() < 0.03
    assert (of_b - direct).abs().max() < 0.03 < (direct - direct.flip(-1)).abs().max()


@given(seeds)
def test_kornia_matrices_are_pixel_indices_from_image_to_view(seed):
    matrix = random_homographies(1, torch.Generator().manual_seed(seed), 0.1)
    image_size, view_size = (40, 60), (17, 31)
    # view index from image index, built from the unit-square homography
    unit_to_image = torch.tensor([[60, 0, -0.5], [0, 40, -0.5], [0, 0, 1]], dtype=torch.float64)
    view_to_unit = torch.tensor([[1 / 31, 0, 0.5 / 31], [0, 1 / 17, 0.5 / 17], [0, 0, 1]], dtype=torch.float64)
    image_from_view = unit_to_image @ matrix[0] @ view_to_unit
    coords = coords_from_kornia(torch.linalg.inv(image_from_view)[None], image_size, view_size)
    torch.testing.assert_close(cell_centers(coords, (3, 4)), cell_centers(matrix, (3, 4)), atol=1e-9, rtol=0)


def test_autocast_changes_nothing():
    coords = random_homographies(2, torch.Generator().manual_seed(1)).float()
    plain = cell_distance(coords, coords.flip(0), (28, 28)), relative_coords(coords, coords.flip(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cell_distance(coords, coords.flip(0), (28, 28)), relative_coords(coords, coords.flip(0))
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[1], mixed[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_wherever_coords_enter(dtype):
    coords, x, good = EYE.to(dtype), torch.zeros(2, 1, 4, 5), EYE.clone()
    calls = {
        "coords: ": [
            lambda: cell_centers(coords, (2, 3)),
            lambda: cell_diagonal(coords, (2, 3)),
            lambda: cell_centers(torch.zeros(2, 2, 4, 5, dtype=dtype), (2, 3)),
            lambda: inside(coords, (2, 3)),
            lambda: warp(x, coords, (2, 3)),
        ],
        "coords_q: ": [
            lambda: cell_distance(coords, coords, (2, 3)),
            lambda: DistanceMatcher()(coords, coords, (2, 3)),
        ],
        "coords_k: ": [lambda: cell_distance(good, coords, (2, 3)), lambda: DistanceMatcher()(good, coords, (2, 3))],
        "dst: ": [lambda: relative_coords(coords, coords)],
        "src: ": [lambda: relative_coords(good, coords), lambda: relative_coords(good.double(), good)],
        "b: ": [lambda: overlap_coords(good, coords)],
        "boxes: ": [lambda: coords_from_boxes(torch.zeros(2, 4, dtype=dtype))],
        "matrix: ": [lambda: coords_from_kornia(coords, (4, 5), (4, 5))],
        "data: ": [
            lambda: ViewCoords(coords[0], canvas_size=(4, 5)),
            lambda: DenseCoords(torch.zeros(2, 4, 5, dtype=dtype)),
        ],
    }
    for name, entrances in calls.items():
        for call in entrances:
            with pytest.raises(ValueError, match=rf"^{name}expected .*float.*got"):
                call()


EYE = torch.eye(3).expand(2, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cell_centers(torch.eye(3), (2, 2)), r"coords: expected .*\(B, 3, 3\).*got \(3, 3\)"),
        (lambda: cell_centers(EYE.long(), (2, 2)), "coords: expected a floating point.*int64"),
        (lambda: cell_centers(torch.zeros(1, 3, 4, 4), (2, 2)), r"coords: .*got \(1, 3, 4, 4\)"),
        (lambda: cell_centers(EYE, (0, 2)), r"size: .*got \(0, 2\)"),
        (lambda: cell_distance(EYE, EYE[:1], (2, 2)), "coords_k: expected as many images.*got 1"),
        (lambda: cell_distance(EYE, EYE.to("meta"), (2, 2)), "coords_k: expected a tensor on cpu.*meta"),
        (lambda: cell_distance(EYE, EYE, (2, 2), unit="big"), "unit: expected one of.*'big'"),
        (lambda: cell_distance(EYE, EYE, (2, 2), source_size=torch.ones(2)), r"source_size: .*got \(2,\)"),
        (lambda: overlap_coords(EYE, EYE[:1]), "b: expected as many images as a"),
        (lambda: relative_coords(EYE, EYE[:1]), "src: expected as many images as dst"),
        (lambda: warp(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), EYE, (2, 2)), "x: expected a floating point.*uint8"),
        (lambda: warp(torch.zeros(1, 3, 4, 4), EYE, (2, 2)), "coords: expected as many images as x"),
        (lambda: warp(torch.zeros(2, 3, 4, 4), EYE, (2, 2), outside="reflection"), "outside: expected .*'reflection'"),
        (lambda: coords_from_boxes(torch.zeros(4)), r"boxes: .*got torch.float32 \(4,\)"),
        (lambda: coords_from_kornia(torch.eye(3), (4, 4), (4, 4)), r"matrix: .*got torch.float32 \(3, 3\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
