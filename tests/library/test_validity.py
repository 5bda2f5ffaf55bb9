"""From pixels to cells: the loop over each cell's pixels."""

import math

import pytest
import torch
from torch import Tensor

from densessl import DistanceMatcher, PixContrastLoss, PixProLoss, cell_validity
from densessl.metrics import unmatched_share


def valid_cells(mask: Tensor, size: tuple[int, int], min_share: float) -> Tensor:
    """Cell by cell, pixel by pixel; a pixel belongs to every cell that it shares some area with."""
    (height, width), (h, w) = mask.shape[-2:], size
    out = torch.zeros(len(mask), h * w, dtype=torch.bool)
    for b in range(len(mask)):
        for i in range(h):
            for j in range(w):
                rows = [y for y in range(height) if (y + 1) * h > i * height and y * h < (i + 1) * height]
                columns = [x for x in range(width) if (x + 1) * w > j * width and x * w < (j + 1) * width]
                found = [bool(mask[b, y, x] != 0) for y in rows for x in columns]
                out[b, i * w + j] = sum(found) >= min_share * len(found)
    return out


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 4), (3, 5), (1, 1), (7, 13), (9, 20), (8, 12)])
@pytest.mark.parametrize("min_share", [1e-9, 0.25, 0.5, 1.0])
def test_cells_equal_the_loop(dtype, size, min_share):
    values = torch.randint(1, 2 if dtype == torch.bool else 5, (3, 8, 12)).to(dtype)
    mask = torch.where(torch.rand(3, 8, 12) < 0.7, values, torch.zeros_like(values))
    mask[1], mask[2, :4, 3:] = 0, 1
    got = cell_validity(mask, size, min_share)
    assert got.dtype == torch.bool
    assert torch.equal(got, valid_cells(mask, size, min_share))
    assert torch.equal(got, cell_validity(mask[:, None], size, min_share))
    assert not got[1].any()


def test_half_of_a_cell_is_the_default():
    mask = torch.zeros(1, 4, 6)
    mask[:, 2:] = 1  # the edge runs through the middle of a cell
    assert cell_validity(mask, (1, 2)).all()
    mask[0, 2, 0] = 0
    assert cell_validity(mask, (1, 2)).tolist() == [[False, True]]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("loss", [PixProLoss(), PixContrastLoss()])
def test_views_that_do_not_overlap_and_empty_ones_contribute_nothing_and_are_counted(loss, sparse):
    """Of four images the second's views share nothing, and the third's are empty."""
    query, key = (torch.randn(4, 5, *size, dtype=torch.float64).requires_grad_() for size in ((3, 5), (4, 2)))
    coords = torch.eye(3).expand(4, 3, 3).clone()
    coords[1, 0, 0] = 0.3
    far = coords.clone()
    far[1, 0, 2] = 0.7  # the left third of the image, and the right
    pixels = torch.ones(4, 24, 40)
    pixels[2] = 0
    valid_q, valid_k = cell_validity(pixels, (3, 5)), cell_validity(pixels, (4, 2))
    mask = DistanceMatcher(sparse=sparse)(coords, far, (3, 5), (4, 2), None, valid_q, valid_k)
    assert unmatched_share(mask) == 0.5
    alone = loss(query[::3], key[::3], mask.to_dense()[::3])
    loss.reduction = "none"
    per_image = loss(query, key, mask)
    assert (per_image != 0).tolist() == [True, False, False, True]
    for no_match, divisor in (("zero", 4), ("skip", 2)):
        loss.reduction, loss.no_match = "mean", no_match
        total = loss(query, key, mask)
        assert total.item() == pytest.approx(alone.item() * 2 / divisor)
        for gradient in torch.autograd.grad(total, (query, key)):
            assert (gradient.flatten(1) != 0).any(1).tolist() == [True, False, False, True]
            assert math.isfinite(gradient.sum())


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        ((4, 6), {}, r"mask: expected \(B, H, W\) or \(B, 1, H, W\), got \(4, 6\)"),
        ((2, 3, 4, 6), {}, r"mask: expected .* got \(2, 3, 4, 6\)"),
        ((2, 4, 6), {"size": (0, 3)}, r"size: expected \(height, width\), both at least 1, got \(0, 3\)"),
        ((2, 4, 6), {"min_share": 0}, "min_share: expected a share above 0, at most 1, got 0"),
        ((2, 4, 6), {"min_share": 1.5}, "min_share: expected .* got 1.5"),
    ],
)
def test_bad_input_is_named(mask, options, message):
    with pytest.raises(ValueError, match=message):
        cell_validity(torch.ones(mask), **{"size": (2, 3), **options})
