"""The losses against loops written from the equations, and where they could become infinite."""

import math

import pytest
import reference
import torch
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.nn import functional as F

from densessl import (
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    PixContrastLoss,
    PixProLoss,
    instance_consistency_loss,
    instance_contrast_loss,
    map_to_tokens,
    pixcontrast_loss,
    pixpro_loss,
)

B, C = 3, 6
SIZE_Q, SIZE_K = (5, 9), (13, 7)
DENSE = pytest.mark.parametrize("loss", [pixpro_loss, pixcontrast_loss])
LAYOUT = pytest.mark.parametrize("layout", ["strided", "sparse", "transposed"])


def features(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Maps of distinct rectangular sizes; lengths far from 1, so that a missing normalisation shows."""
    query, key = torch.randn(B, C, *SIZE_Q, dtype=dtype), torch.randn(B, C, *SIZE_K, dtype=dtype)
    return (3 * query).requires_grad_(), (0.2 * key).requires_grad_()


def random_mask(share: float = 0.05) -> Tensor:
    """A different count in every image, some rows and columns empty."""
    mask = torch.rand(B, 45, 91) < share * torch.tensor([1.0, 3.0, 0.5])[:, None, None]
    mask[:, ::4] = False
    mask[:, :, ::5] = False
    return mask


def laid_out(mask: Tensor, layout: str) -> Tensor:
    """The same mask; "transposed" is sparse and not coalesced, as ``sparse_mask.mT`` is."""
    if layout == "strided":
        return mask
    return mask.to_sparse_coo() if layout == "sparse" else mask.mT.contiguous().to_sparse_coo().mT


def loop(loss, query: Tensor, key: Tensor, mask: Tensor, **options) -> Tensor:
    if loss is pixpro_loss:
        return reference.pixpro_loss(query, key, mask, **options)
    return reference.pixcontrast_loss(query, key, mask, temperature=0.3, **options)


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of a weighted sum, so that the images of reduction="none" count differently."""
    weight = torch.arange(1, value.numel() + 1, dtype=value.dtype).view(value.shape)
    return list(torch.autograd.grad((value * weight).sum(), inputs))


# --- against the loop -----------------------------------------------------------------------------------------------


@DENSE
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("no_match", ["zero", "skip"])
@pytest.mark.parametrize("empty", [[], [1], [0, 1, 2]])
def test_value_and_gradients_equal_the_loop(loss, reduction, no_match, empty):
    query, key = features(torch.float64)
    mask = random_mask()
    mask[empty] = False
    options = {"reduction": reduction, "no_match": no_match}
    expected = loop(loss, query, key, mask, **options)
    wanted = gradients(expected, query, key)
    assert all(g.any() == (len(empty) < B) for g in wanted)
    for layout in ("strided", "sparse", "transposed"):
        got = loss(query, key, laid_out(mask, layout), **options)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        for mine, gradient in zip(gradients(got, query, key), wanted, strict=True):
            torch.testing.assert_close(mine, gradient, rtol=1e-7, atol=1e-11)


@DENSE
@LAYOUT
def test_maps_and_tokens_of_any_mixture_are_the_same(loss, layout):
    query, key = features()
    mask = laid_out(random_mask(), layout)
    expected = loss(query, key, mask)
    assert expected.dtype == torch.float32
    assert expected.shape == ()
    for q in (query, map_to_tokens(query)):
        for k in (key, map_to_tokens(key)):
            assert torch.equal(loss(q, k, mask), expected)


@DENSE
@LAYOUT
def test_gradcheck(loss, layout):
    query, key = torch.randn(2, 3, 2, 3, dtype=torch.float64), torch.randn(2, 3, 4, 1, dtype=torch.float64)
    mask = laid_out(torch.rand(2, 6, 4) < 0.4, layout)
    for no_match in ("zero", "skip"):
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda q, k, r=reduction, n=no_match: loss(q, k, mask, reduction=r, no_match=n),
                (query.requires_grad_(), key.requires_grad_()),
            )


@DENSE
def test_sparse_equals_strided_in_float32(loss):
    query, key = features()
    mask = random_mask()
    mask[1] = False
    strided, sparse = loss(query, key, mask), loss(query, key, mask.to_sparse_coo())
    torch.testing.assert_close(sparse, strided, rtol=1e-6, atol=1e-7)
    for a, b in zip(gradients(sparse, query, key), gradients(strided, query, key), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


@DENSE
def test_full_mask(loss):
    """Every pair positive: PixContrast's fraction is 1, its loss 0."""
    query, key = features()
    mask = torch.ones(B, 45, 91, dtype=torch.bool)
    expected = -(F.normalize(query, dim=1).flatten(2).mT @ F.normalize(key, dim=1).flatten(2)).mean()
    expected = expected if loss is pixpro_loss else torch.tensor(0.0)
    for layout in ("strided", "sparse"):
        torch.testing.assert_close(loss(query, key, laid_out(mask, layout)), expected, rtol=1e-4, atol=1e-7)


def test_pixpro_lies_between_its_bounds():
    query = torch.randn(2, C, 3, 5)
    eye = torch.eye(15, dtype=torch.bool).expand(2, 15, 15)
    assert pixpro_loss(query, 7 * query, eye).item() == pytest.approx(-1, abs=1e-6)
    assert pixpro_loss(query, -query, eye).item() == pytest.approx(1, abs=1e-6)


def test_pixcontrast_sums_positives_inside_the_logarithm():
    """With two positives of three keys the loss is -log of their common share, not the mean of two logs."""
    query = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    angles = torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64)
    key = torch.stack([angles.cos(), angles.sin()], -1)[None]
    mask = torch.tensor([[[True, True, False]]])
    t = 0.3
    terms = [math.exp(math.cos(a) / t) for a in angles.tolist()]
    inside = -math.log((terms[0] + terms[1]) / sum(terms))
    outside = -(math.log(terms[0] / sum(terms)) + math.log(terms[1] / sum(terms))) / 2
    assert pixcontrast_loss(query, key, mask, temperature=t).item() == pytest.approx(inside)
    assert outside > 2 * inside


def test_pixcontrast_averages_over_the_cells_that_have_a_positive():
    query, key = features()
    mask = torch.zeros(B, 45, 91, dtype=torch.bool)
    mask[:, 3, 5] = mask[:, 7, 11] = True
    two = pixcontrast_loss(query, key, mask)
    one = [pixcontrast_loss(query, key, mask & (torch.arange(45) == row)[:, None]) for row in (3, 7)]
    torch.testing.assert_close(two, sum(one) / 2)


@DENSE
def test_scale_of_the_features_does_not_matter(loss):
    query, key = features()
    mask = random_mask()
    torch.testing.assert_close(loss(100 * query, 1e-3 * key, mask), loss(query, key, mask))


# --- precision ------------------------------------------------------------------------------------------------------


@DENSE
@LAYOUT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(loss, layout, dtype):
    query, key = features()
    mask = laid_out(random_mask(), layout)
    expected = loss(query, key, mask)
    with torch.autocast("cpu", dtype=dtype):
        got = loss(query, key, mask)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    for a, b in zip(gradients(got, query, key), gradients(expected, query, key), strict=True):
        assert torch.equal(a, b)


@DENSE
@LAYOUT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features(loss, layout, dtype):
    """Values of 200 over 6 channels: their sum of squares overflows float16."""
    query, key = (200 * F.normalize(x.detach(), dim=1) for x in features())
    query, key = query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_()
    mask = random_mask()
    got = loss(query, key, laid_out(mask, layout))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, loss(query.float(), key.float(), mask), rtol=1e-6, atol=1e-7)
    (got * 1024).backward()
    for x in (query, key):
        assert x.grad.dtype == dtype
        assert x.grad.isfinite().all()
        assert x.grad.any()


def test_query_and_key_of_different_precision():
    """Under autocast the online branch may come in bfloat16 and the target in float32."""
    query, key = features()
    got = pixpro_loss(query.bfloat16(), key, random_mask())
    assert got.dtype == torch.float32
    assert got.isfinite()


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("share", [0.01, 0.3])
@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_pixcontrast_with_tiny_temperature(temperature, share, layout):
    """Few positives, as T < 0.5 gives them: most rows have none, and exp(cos / t) alone would overflow."""
    query, key = features()
    mask = random_mask(share)
    loss = pixcontrast_loss(query, key, laid_out(mask, layout), temperature=temperature)
    cosine = map_to_tokens(F.normalize(query, dim=1)) @ map_to_tokens(F.normalize(key, dim=1)).mT
    best = cosine.masked_fill(~mask, -2).amax(2)
    per_cell = (cosine.amax(2) - best) / temperature  # the limit of small temperatures
    expected = torch.stack([per_cell[b][mask[b].any(1)].mean() for b in range(B)]).mean()
    if temperature < 1e-3:
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, query, key))


# --- no positive pair -----------------------------------------------------------------------------------------------


@DENSE
@LAYOUT
@pytest.mark.parametrize("no_match", ["zero", "skip"])
@pytest.mark.parametrize("empty", [[1], [0, 2], [0, 1, 2]])
def test_images_without_positives(loss, layout, no_match, empty):
    query, key = features()
    mask = random_mask()
    mask[empty] = False
    per_image = loss(query, key, laid_out(mask, layout), reduction="none", no_match=no_match)
    assert per_image.shape == (B,)
    assert (per_image == 0).tolist() == [b in empty for b in range(B)]
    value = loss(query, key, laid_out(mask, layout), no_match=no_match)
    divisor = B if no_match == "zero" else max(B - len(empty), 1)
    torch.testing.assert_close(value, per_image.sum() / divisor)
    assert value.requires_grad  # connected: DDP waits for every parameter's gradient
    for g in gradients(value, query, key):
        assert g.isfinite().all()
        assert not g[empty].any()
        assert all(g[b].any() for b in range(B) if b not in empty)


@DENSE
def test_default_is_the_published_one(loss):
    query, key = features()
    mask = random_mask()
    mask[0] = False
    assert torch.equal(loss(query, key, mask), loss(query, key, mask, reduction="mean", no_match="zero"))
    skipped = loss(query, key, mask, no_match="skip")
    torch.testing.assert_close(skipped, 1.5 * loss(query, key, mask))


@DENSE
@LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dead_cells_have_no_direction_and_take_no_gradient(loss, layout, dtype):
    """Dividing by a clamped norm would send them gradients of 1e12, infinite in float16."""
    query, key = (x.detach().to(dtype) for x in features())
    query[:, :, 1:3], key[:, :, 4:] = 0, 0
    query.requires_grad_()
    key.requires_grad_()
    mask = random_mask(0.2)
    value = loss(query, key, laid_out(mask, layout))
    value.backward()
    assert value.isfinite()
    for x, dead in ((query, query[:, 0] == 0), (key, key[:, 0] == 0)):
        assert x.grad.isfinite().all()
        assert dead.any()
        assert not x.grad.movedim(1, -1)[dead].any()
        assert x.grad.abs().max() < 10


# --- modules, instance losses ---------------------------------------------------------------------------------------


def test_modules_are_their_functions():
    query, key = features()
    mask = random_mask()
    mask[0] = False
    for options in ({}, {"reduction": "none"}, {"no_match": "skip"}):
        assert torch.equal(PixProLoss(**options)(query, key, mask), pixpro_loss(query, key, mask, **options))
        assert torch.equal(PixContrastLoss(**options)(query, key, mask), pixcontrast_loss(query, key, mask, **options))
    assert torch.equal(PixContrastLoss(0.1)(query, key, mask), pixcontrast_loss(query, key, mask, temperature=0.1))
    assert PixContrastLoss().temperature == 0.3
    assert "temperature=0.1, reduction='none', no_match='skip'" in repr(PixContrastLoss(0.1, "none", "skip"))
    assert "reduction='none', no_match='skip'" in repr(PixProLoss("none", "skip"))
    vectors = torch.randn(4, 5), torch.randn(4, 5)
    assert torch.equal(InstanceConsistencyLoss()(*vectors), instance_consistency_loss(*vectors))
    assert torch.equal(InstanceContrastLoss(0.1)(*vectors), instance_contrast_loss(*vectors, temperature=0.1))
    assert "temperature=0.2" in repr(InstanceContrastLoss())


def test_instance_consistency_equals_the_loop():
    query, key = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    expected = sum(2 - 2 * reference.cosine(q, k) for q, k in zip(query, key, strict=True)) / 4 - 2
    torch.testing.assert_close(instance_consistency_loss(query, key), expected)
    torch.testing.assert_close(instance_consistency_loss(query, 3 * query), torch.tensor(-2.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(instance_consistency_loss, (query.requires_grad_(), key.requires_grad_()))


def test_instance_contrast_equals_the_loop_and_lightly():
    query = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    key = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    loss = instance_contrast_loss(query, key)
    torch.testing.assert_close(loss, reference.nt_xent(query, key, 0.2))
    torch.testing.assert_close(loss, NTXentLoss(temperature=0.2)(query, key))
    loss.backward()
    assert query.grad.any()
    assert key.grad is None
    (expected,) = torch.autograd.grad(reference.nt_xent(query, key.detach(), 0.2), query)
    torch.testing.assert_close(query.grad, expected)


@pytest.mark.parametrize("loss", [instance_consistency_loss, instance_contrast_loss])
def test_instance_losses_under_autocast_and_in_half_precision(loss):
    query, key = 100 * torch.randn(8, 32), 100 * torch.randn(8, 32)
    expected = loss(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(query, key), expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = loss(query.to(dtype), key.to(dtype))
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, expected, rtol=2e-2, atol=2e-2)
