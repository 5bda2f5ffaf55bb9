"""InfoNCE over aligned pairs, against a loop written from MoCo's Eq. 1."""

import re

import pytest
import torch
from reference import cosine, over_images
from test_contract import NoHostReads
from torch import Tensor

from densessl import InfoNCELoss, info_nce_loss

B, K, C, M = 3, 5, 6, 11  # all different: a transposed product has no legal shape


def vectors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths far from 1, so that a missing normalisation shows."""
    query, key = 3 * torch.randn(B, K, C, dtype=dtype), 0.2 * torch.randn(B, K, C, dtype=dtype)
    return query.requires_grad_(), key.requires_grad_(), (7 * torch.randn(M, C, dtype=dtype)).requires_grad_()


def some_valid() -> Tensor:
    """A different count in every image."""
    return torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def loop(query, key, negatives, valid, temperature=0.2, reduction="mean", no_match="zero") -> Tensor:
    per_image: list[Tensor | None] = []
    for b in range(B):
        found = []
        for i in range(K):
            if valid[b, i]:
                own = (cosine(query[b, i], key[b, i]) / temperature).exp()
                others = sum((cosine(query[b, i], negatives[m]) / temperature).exp() for m in range(M))
                found.append(-(own / (own + others)).log())
        per_image.append(sum(found) / len(found) if found else None)
    return over_images(per_image, reduction, no_match, 0 * query.sum())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("no_match", ["zero", "skip"])
@pytest.mark.parametrize("empty", [[], [1], [0, 1, 2]])
def test_value_and_gradients_equal_the_loop(reduction, no_match, empty):
    inputs, valid = vectors(), some_valid()
    valid[empty] = False
    options = {"reduction": reduction, "no_match": no_match}
    got, expected = info_nce_loss(*inputs, valid, **options), loop(*inputs, valid, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weight = torch.arange(1, got.numel() + 1, dtype=got.dtype).view(got.shape)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for mine, gradient in zip(torch.autograd.grad((got * weight).sum(), inputs), wanted, strict=True):
        gradient = torch.zeros_like(mine) if gradient is None else gradient
        torch.testing.assert_close(mine, gradient, rtol=1e-8, atol=1e-12)


def test_all_pairs_count_unless_told_otherwise():
    inputs = vectors()
    torch.testing.assert_close(info_nce_loss(*inputs), loop(*inputs, torch.ones(B, K), 0.2))
    everything = torch.ones(B, K, dtype=torch.bool)
    assert torch.equal(info_nce_loss(*inputs), info_nce_loss(*inputs, everything))


def test_detached_keys_and_negatives_take_no_gradient():
    query, key, negatives = vectors()
    info_nce_loss(query, key.detach(), negatives.detach()).backward()
    assert query.grad.any()
    assert key.grad is None
    assert negatives.grad is None


def test_pairs_that_do_not_count_may_hold_anything():
    inputs, valid = [x.detach() for x in vectors()], some_valid()
    expected = info_nce_loss(*inputs, valid)
    inputs[0][~valid] = torch.nan
    query = inputs[0].requires_grad_()
    got = info_nce_loss(*inputs, valid)
    assert torch.equal(got, expected)
    got.backward()
    assert query.grad[valid].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit_and_half_precision_little(dtype):
    inputs, valid = vectors(torch.float32), some_valid()
    expected = info_nce_loss(*inputs, valid)
    with torch.autocast("cpu", dtype=dtype):
        got = info_nce_loss(*inputs, valid)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    half = [(200 * x.detach()).to(dtype).requires_grad_() for x in inputs]
    value = info_nce_loss(*half, valid)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, info_nce_loss(*(x.float() for x in half), valid))
    value.backward()
    assert all(x.grad.isfinite().all() for x in half)


@pytest.mark.parametrize("temperature", [1e-2, 1e-6])
def test_tiny_temperatures_stay_finite(temperature):
    inputs = vectors(torch.float32)
    value = info_nce_loss(*inputs, temperature=temperature)
    value.backward()
    assert value.isfinite()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_reads_no_value():
    inputs, valid = vectors(), some_valid()
    with NoHostReads():
        info_nce_loss(*inputs, valid, no_match="skip").backward()


def test_the_module_is_its_function():
    inputs, valid = vectors(), some_valid()
    valid[0] = False
    for options in ({}, {"temperature": 0.07}, {"reduction": "none"}, {"no_match": "skip"}):
        assert torch.equal(InfoNCELoss(**options)(*inputs, valid), info_nce_loss(*inputs, valid, **options))
    assert "temperature=0.07, reduction='none', no_match='skip'" in repr(InfoNCELoss(0.07, "none", "skip"))


Q, N = torch.rand(B, K, C), torch.rand(M, C)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info_nce_loss(torch.rand(B, C), Q, N), "query: expected floating point (B, K, C), got"),
        (lambda: info_nce_loss(Q.long(), Q, N), "query: expected floating point"),
        (lambda: info_nce_loss(Q, Q[:, :4], N), "key: expected floating point (B, K, C) = (3, 5, 6) as query, got"),
        (lambda: info_nce_loss(Q, Q, N.mT), "negatives: expected floating point (M, C) with M > 0 and C = 6 as query"),
        (lambda: info_nce_loss(Q, Q, N[:0]), "got torch.float32 (0, 6)"),
        (lambda: info_nce_loss(Q, Q, N, torch.ones(B, K)), "valid: expected bool (B, K) = (3, 5), got torch.float32"),
        (lambda: info_nce_loss(Q, Q, N.to("meta")), "expected one device, got cpu, cpu, meta"),
        (lambda: InfoNCELoss(0), "temperature: expected a positive number, got 0"),
        (lambda: InfoNCELoss(no_match="drop"), "no_match: expected 'zero' or 'skip', got 'drop'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_pairs_that_do_not_count_may_hold_nan():
    valid = torch.tensor([[True, False, True], [True, True, False]])
    clean = torch.randn(2, 3, 5)
    results = []
    for fill in (1.0, torch.nan):
        query = clean.masked_fill(~valid[..., None], fill).requires_grad_()
        key = clean.flip(2).masked_fill(~valid[..., None], fill).requires_grad_()
        negatives = torch.linspace(-1, 1, 20).view(4, 5)
        total = info_nce_loss(query, key, negatives, valid)
        results.append((total, *torch.autograd.grad(total, (query, key))))
    torch.testing.assert_close(results[1], results[0])
