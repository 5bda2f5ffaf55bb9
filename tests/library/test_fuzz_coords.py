"""Random coords of every dtype and form through all that takes them: right by a loop, or refused by the argument."""

import random

import pytest
import torch
from reference import distances, homography_cells, matches
from torch import Tensor
from torchvision import tv_tensors

from densessl import (
    BatchAugment,
    DenseCoords,
    DistanceMatcher,
    MultiView,
    View,
    ViewCoords,
    align,
    cell_centers,
    cell_diagonal,
    cell_distance,
    coords_from_boxes,
    coords_from_depth,
    coords_from_disparity,
    coords_from_flow,
    coords_from_kornia,
    coords_from_points,
    inside,
    overlap_coords,
    relative_coords,
    warp,
)

CASES = 120
UNITS = ("max", "min", "query", "key")


def homography(draw: random.Random) -> Tensor:
    """A crop, flipped, turned or in perspective; float64 (3, 3). It may reach beyond the source."""
    a, b = draw.uniform(0.2, 1.1) * draw.choice([-1, 1]), draw.uniform(0.2, 1.1)
    turn = draw.choice([0.0, draw.uniform(-0.5, 0.5)])
    tilt = [0.0, 0.0] if draw.random() < 0.5 else [draw.uniform(-0.3, 0.3), draw.uniform(-0.3, 0.3)]
    matrix = torch.tensor([[a, -turn, draw.uniform(-0.1, 0.8)], [turn, b, draw.uniform(-0.1, 0.8)], [*tilt, 1.0]])
    return matrix.double()


def densely(matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """The same views as dense coords (B, 2, H, W), point by point."""
    maps = []
    for matrix in matrices:
        points = [(x, y) for x, y, _ in homography_cells(matrix.tolist(), size)]
        maps.append(torch.tensor(points, dtype=torch.float64).T.unflatten(1, size))
    return torch.stack(maps)


def sizes(draw: random.Random) -> tuple[int, int]:
    return draw.randint(1, 5), draw.randint(1, 6)


FORMS = {
    "float64": lambda coords: coords,
    "float32": lambda coords: coords.float(),
    "a tensor that asks for gradients": lambda coords: coords.float().requires_grad_(),
    "a view's own": lambda coords: coords.float().as_subclass(tv_tensors.TVTensor),
    "transposed in memory": lambda coords: coords.mT.contiguous().mT,
    "every second of more": lambda coords: torch.stack([coords, coords * torch.nan], 1).flatten(0, 1)[::2],
}
NOT_TAKEN = {
    "float16": lambda coords: coords.half(),
    "bfloat16": lambda coords: coords.bfloat16(),
    "int64": lambda coords: coords.long(),
    "bool": lambda coords: coords > 0,
    "complex": lambda coords: coords.to(torch.complex64),
    "unbatched": lambda coords: coords[0],
    "one rank more": lambda coords: coords[None, None],
    "cut": lambda coords: coords[..., :-1, :] if coords.ndim == 3 else coords[:, :1],
    "flat": lambda coords: coords.flatten(1),
    "channels last": lambda coords: coords.flatten(1) if coords.ndim == 3 else coords.movedim(1, -1)[..., :1],
    "numpy": lambda coords: coords.numpy(),
    "a list": lambda coords: coords.tolist(),
    "a size": lambda coords: torch.Size((3, 5)),
    "none": lambda coords: None,
}


def test_positions_and_distances():
    """Of float32 within its rounding, of float64 within the reference's differences."""
    draw = random.Random(0)
    for case in range(CASES):
        batch, name = draw.randint(1, 3), draw.choice(list(FORMS))
        given = [torch.stack([homography(draw) for _ in range(batch)]) for _ in range(2)]
        size_q, size_k, unit = sizes(draw), sizes(draw), draw.choice(UNITS)
        source = torch.tensor([[draw.randint(20, 500), draw.randint(20, 500)] for _ in range(batch)])
        in_pixels = draw.random() < 0.5
        q, k = (FORMS[name](coords) for coords in given)
        exact = q.dtype == torch.float64
        near = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 2e-4, "atol": 2e-4}
        table = cell_distance(q, k, size_q, size_k, unit=unit, source_size=source if in_pixels else None)
        mask = DistanceMatcher(0.7, unit=unit, sparse=draw.random() < 0.5)(
            q, k, size_q, size_k, source_size=source if in_pixels else None
        )
        mask = mask.to_dense()
        for b in range(batch):
            scale = (float(source[b, 1]), float(source[b, 0])) if in_pixels else (1.0, 1.0)
            cells_q, cells_k = (
                homography_cells(coords[b].tolist(), size, scale)
                for coords, size in ((given[0], size_q), (given[1], size_k))
            )
            centers = torch.tensor([cell[:2] for cell in cells_q]) / torch.tensor(scale)
            torch.testing.assert_close(cell_centers(q, size_q)[b].detach().double(), centers.double(), **near)
            diagonals = cell_diagonal(q, size_q, source if in_pixels else None)[b].detach().double()
            expected = torch.tensor([cell[2] for cell in cells_q], dtype=torch.float64)
            torch.testing.assert_close(diagonals, expected, rtol=1e-3, atol=0)
            expected = torch.tensor(distances(cells_q, cells_k, unit), dtype=torch.float64)
            torch.testing.assert_close(table[b].detach().double(), expected, rtol=1e-3, atol=1e-3)
            wanted = torch.tensor(matches(cells_q, cells_k, 0.7, unit, scale))
            rim = (expected - 0.7).abs() < 1e-3
            rim |= near_edge(cells_q, scale)[:, None] | near_edge(cells_k, scale)
            assert torch.equal(mask[b] | rim, wanted | rim), (case, name)


def near_edge(cells: list, scale: tuple[float, float]) -> Tensor:
    points = torch.tensor([[cell[0] / scale[0], cell[1] / scale[1]] for cell in cells])
    return ((points.abs() < 1e-4) | ((points - 1).abs() < 1e-4)).any(1)


def test_unknown_places_match_nothing_and_reach_no_others():
    """NaN and infinities in random entries of one image."""
    draw = random.Random(1)
    for case in range(CASES // 3):
        size = sizes(draw)
        plain = torch.stack([homography(draw) for _ in range(3)]).to(draw.choice([torch.float32, torch.float64]))
        coords = plain if draw.random() < 0.5 else densely(plain, (3, 4)).to(plain.dtype)
        bad = coords.clone()
        bad[1].view(-1)[draw.randrange(9)] = draw.choice([torch.nan, torch.inf, -torch.inf])
        unknown = ~cell_centers(bad, size)[1].isfinite().all(-1)
        other = torch.stack([homography(draw) for _ in range(3)]).to(plain.dtype)
        for sparse in (False, True):
            match = DistanceMatcher(draw.choice([0.7, 2.0]), sparse=sparse)
            got, expected = match(bad, other, size).to_dense(), match(coords, other, size).to_dense()
            back, before = match(other, bad, size).to_dense(), match(other, coords, size).to_dense()
            assert torch.equal(got[::2], expected[::2]), case
            assert torch.equal(back[::2], before[::2]), case
            assert not got[1, unknown].any(), case
            assert not back[1, :, unknown].any(), case


def test_dense_coords_equal_homographies():
    draw = random.Random(2)
    for case in range(CASES // 4):
        dtype = draw.choice([torch.float32, torch.float64])
        matrices, size = torch.stack([homography(draw) for _ in range(2)]), (draw.randint(2, 8), draw.randint(2, 8))
        affine = matrices.clone()
        affine[:, 2, :2] = 0
        dense = densely(affine, (draw.randint(2, 9), draw.randint(2, 9))).to(dtype)
        torch.testing.assert_close(
            cell_centers(dense, size), cell_centers(affine.to(dtype), size), rtol=1e-4, atol=1e-4, msg=str(case)
        )
        other = torch.stack([homography(draw) for _ in range(2)]).to(dtype)
        (box, shared), (expected, too) = (overlap_coords(coords, other) for coords in (dense, affine.to(dtype)))
        torch.testing.assert_close(box, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(shared, too)


def test_other_forms_are_refused_by_name():
    draw = random.Random(3)
    for _ in range(CASES):
        good = torch.stack([homography(draw) for _ in range(2)]).float()
        good = good if draw.random() < 0.5 else densely(good, (4, 5)).float()
        name = draw.choice(list(NOT_TAKEN))
        bad, right, size = NOT_TAKEN[name](good), good.clone(), (3, 4)
        features = torch.rand(2, 2, 3, 4)
        calls = {
            "coords": [
                lambda: cell_centers(bad, size),  # noqa: B023
                lambda: cell_diagonal(bad, size),  # noqa: B023
                lambda: inside(bad, size),  # noqa: B023
                lambda: warp(features, bad, size),  # noqa: B023
                lambda: BatchAugment(_flip())(View(torch.rand(2, 3, 4, 5), bad, torch.ones(2, 2).long())),  # noqa: B023
            ],
            "coords_q": [
                lambda: cell_distance(bad, right, size),  # noqa: B023
                lambda: DistanceMatcher()(bad, right, size),  # noqa: B023
                lambda: DistanceMatcher(sparse=True)(bad, right, size),  # noqa: B023
            ],
            "coords_k": [
                lambda: cell_distance(right, bad, size),  # noqa: B023
                lambda: DistanceMatcher()(right, bad, size),  # noqa: B023
            ],
            "dst": [lambda: relative_coords(bad, right)],  # noqa: B023
            "src": [lambda: relative_coords(right, bad)],  # noqa: B023
            "a": [lambda: overlap_coords(bad, right)],  # noqa: B023
            "b": [lambda: overlap_coords(right, bad)],  # noqa: B023
            "coords_from": [lambda: align(features, bad, right, size)],  # noqa: B023
            "coords_to": [lambda: align(features, right, bad, size)],  # noqa: B023
        }
        argument = draw.choice(list(calls))
        for call in calls[argument]:
            with pytest.raises(ValueError, match=f"^{argument}: expected"):
                call()
        with pytest.raises(ValueError, match=r"^coords_k: expected"):
            cell_distance(right, right.double(), size)
        with pytest.raises(ValueError, match=r"^coords: expected"):
            warp(features, right.to("meta"), size)


def _flip():
    import kornia.augmentation as K

    return K.RandomHorizontalFlip()


BOX, FLOW = torch.rand(2, 4), torch.rand(2, 2, 4, 5)
START = torch.eye(3)


@pytest.mark.parametrize("change", ["half", "bfloat16", "long", "bool", "numpy", "list", "none", "complex"])
@pytest.mark.parametrize(
    ("name", "call", "good"),
    [
        ("boxes", coords_from_boxes, torch.rand(2, 4)),
        ("matrix", lambda x: coords_from_kornia(x, (4, 5), (4, 5)), torch.eye(3)[None]),
        ("data", lambda x: ViewCoords(x, canvas_size=(4, 5)), torch.eye(3)),
        ("data", lambda x: DenseCoords(x, canvas_size=(4, 5)), torch.rand(2, 4, 5)),
        ("coords", lambda x: MultiView(lambda *parts: parts)(torch.rand(3, 4, 5), coords=x), torch.eye(3)),
        ("flow", coords_from_flow, torch.rand(2, 2, 4, 5)),
        ("disparity", coords_from_disparity, torch.rand(2, 4, 5)),
        ("depth", lambda x: coords_from_depth(x, torch.eye(3), torch.eye(4)), torch.rand(2, 4, 5)),
        ("intrinsics", lambda x: coords_from_depth(torch.rand(4, 5), x, torch.eye(4)), torch.eye(3)),
        ("pose", lambda x: coords_from_depth(torch.rand(4, 5), torch.eye(3), x), torch.eye(4)),
        ("points", lambda x: coords_from_points(x, torch.rand(3, 2), (4, 5)), torch.rand(3, 2)),
        ("source_points", lambda x: coords_from_points(torch.rand(3, 2), x, (4, 5)), torch.rand(3, 2)),
    ],
)
def test_what_makes_coords_refuses_by_name(name, call, good, change):
    call(good)
    forms = {
        "half": good.half,
        "bfloat16": good.bfloat16,
        "long": good.long,
        "bool": good.bool,
        "numpy": good.numpy,
        "list": good.tolist,
        "none": lambda: None,
        "complex": lambda: good.to(torch.complex64),
    }
    bad = forms[change]()
    taken = name == "data" and change in ("numpy", "list", "none", "long", "bool")  # what becomes a tensor of itself
    taken |= name in ("flow", "disparity", "depth") and change in ("half", "bfloat16")  # lengths, not positions
    if taken or (change == "none" and name == "coords"):
        assert call(bad) is not None
        return
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call(bad)
