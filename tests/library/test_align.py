"""A map on the grid of a shared region: a loop reference, RoIAlign on boxes, dense coords, and what is not known."""

import pytest
import torch
from torchvision.ops import roi_align

from densessl import align, cell_centers, coords_from_boxes, overlap_coords, relative_coords

A = torch.tensor([[0.1, 0.2, 0.8, 0.9], [0.0, 0.1, 0.6, 0.7]])
B = torch.tensor([[0.3, 0.1, 0.9, 0.7], [0.25, 0.3, 0.95, 1.0]])
TURNED = torch.tensor([[0.5, -0.2, 0.3], [0.15, 0.6, 0.1], [0.1, -0.05, 1.0]]).expand(2, 3, 3)


def as_dense(coords, size):
    return cell_centers(coords, size).mT.unflatten(2, size)


def test_boxes_equal_roi_align():
    x = torch.randn(2, 3, 9, 13)
    got, valid = align(x, coords_from_boxes(A), coords_from_boxes(B), (5, 7))
    assert valid.all()
    low, high = torch.maximum(A[:, :2], B[:, :2]), torch.minimum(A[:, 2:], B[:, 2:])
    scale, start = torch.tensor([13, 9]) / (A[:, 2:] - A[:, :2]), A[:, :2]
    boxes = torch.cat([(low - start) * scale, (high - start) * scale], 1)
    expected = roi_align(x, list(boxes[:, None]), (5, 7), sampling_ratio=1, aligned=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dense", [False, True])
def test_any_homography_equals_a_loop(dense):
    a, b, (h, w), (height, width) = TURNED, coords_from_boxes(B), (6, 4), (9, 13)
    x = torch.randn(2, 3, height, width)
    box, _ = overlap_coords(a, b)
    to_a, to_b = (cell_centers(relative_coords(box, c), (h, w)) for c in (a, b))
    source = cell_centers(box, (h, w))
    got, valid = align(x, as_dense(a, (40, 56)) if dense else a, as_dense(b, (33, 47)) if dense else b, (h, w))
    for image in range(2):
        for n in range(h * w):
            cell = got[image, :, n // w, n % w]
            inside = all(0 <= v <= 1 for p in (to_a, to_b, source) for v in p[image, n].tolist())
            assert valid[image, n // w, n % w] == inside
            if not inside:
                assert (cell == 0).all()
                continue
            px = (to_a[image, n, 0] * width - 0.5).clamp(0, width - 1)
            py = (to_a[image, n, 1] * height - 0.5).clamp(0, height - 1)
            i, j = min(int(py), height - 2), min(int(px), width - 2)
            u, v = px - j, py - i
            top = (1 - u) * x[image, :, i, j] + u * x[image, :, i, j + 1]
            bottom = (1 - u) * x[image, :, i + 1, j] + u * x[image, :, i + 1, j + 1]
            torch.testing.assert_close(cell, (1 - v) * top + v * bottom, rtol=1e-3, atol=2e-3 if dense else 1e-4)
    assert valid.any()
    assert not valid.all()


def test_both_views_show_the_same_places():
    places = []
    for own, other in ((TURNED, coords_from_boxes(B)), (coords_from_boxes(B), TURNED)):
        places.append(align(as_dense(own, (30, 44)), own, other, (5, 8)))
    (first, valid), (second, again) = places
    assert torch.equal(valid, again)
    inner = valid[:, None]  # the outer half of a map's edge cells is continued flat
    assert ((first - second) * inner).abs().max() < 0.02


def test_what_is_not_known_does_not_spread():
    a, b = as_dense(coords_from_boxes(A), (24, 32)), coords_from_boxes(B)
    a[0, :, 8:14, 14:20] = torch.nan
    x = torch.randn(2, 3, 9, 13)
    x[1, 0, 4, 6] = torch.nan
    x.requires_grad_()
    got, valid = align(x, a, b, (6, 5))
    got.square().sum().backward()
    assert got.isfinite().all()
    assert x.grad.isfinite().all()
    assert valid[0].any()
    assert valid[1].any()
    assert not valid[0].all()
    assert not valid[1].all()
    assert (got[(~valid)[:, None].expand_as(got)] == 0).all()


def test_views_that_share_nothing_and_views_not_known_at_all():
    a = coords_from_boxes(torch.tensor([[0.0, 0.0, 0.4, 0.4]]))
    b = coords_from_boxes(torch.tensor([[0.6, 0.6, 1.0, 1.0]]))
    for other in (b, torch.full((1, 2, 5, 7), torch.nan)):
        got, valid = align(torch.ones(1, 2, 3, 4), a, other, (3, 2))
        assert not valid.any()
        assert not got.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align(torch.ones(2, 3), TURNED, TURNED, (2, 3)), "map: expected a floating point map"),
        (lambda: align(torch.ones(1, 3, 4, 5), TURNED, TURNED, (2, 3)), "coords_from: expected B = 1"),
        (lambda: align(torch.ones(2, 3, 4, 5), TURNED, TURNED[:1], (2, 3)), "coords_to: expected as many images"),
        (lambda: align(torch.ones(2, 3, 4, 5), TURNED, TURNED, (0, 3)), "size: "),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("dense", [False, True])
def test_padding_around_the_source_is_not_shared(dense):
    first = coords_from_boxes(torch.tensor([[-0.5, -0.5, 0.2, 0.2], [-0.5, -0.25, 0.75, 0.5]]))
    second = coords_from_boxes(torch.tensor([[-0.6, -0.6, -0.1, -0.1], [-0.25, -0.5, 0.5, 1.5]]))
    if dense:
        first, second = as_dense(first, (6, 8)), as_dense(second, (5, 7))
    coords, shared = overlap_coords(first, second)
    assert shared.tolist() == [False, True]
    torch.testing.assert_close(coords[1], coords_from_boxes(torch.tensor([[0.0, 0.0, 0.5, 0.5]]))[0])
