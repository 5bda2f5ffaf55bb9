"""InfoNCE with masks for positives and negatives, against a loop written from SupCon's Eq. 2."""

import re

import pytest
import torch
from reference import cosine
from test_contract import NoHostReads
from torch import Tensor

from densessl import MaskedInfoNCELoss, info_nce_loss, masked_info_nce_loss

N, M, C = 5, 9, 6


def vectors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Lengths far from 1, so that a missing normalisation shows."""
    query, key = 3 * torch.randn(N, C, dtype=dtype), 0.2 * torch.randn(M, C, dtype=dtype)
    return query.requires_grad_(), key.requires_grad_()


def masks() -> tuple[Tensor, Tensor]:
    """Row by row: several positives, one, none, none and no negative either, one and no negative."""
    positive, negative = torch.rand(N, M) < 0.4, torch.rand(N, M) < 0.6
    positive[0, :3] = True
    positive[1] = torch.arange(M) == 4
    positive[2:4] = False
    negative[3:] = False
    positive[4] = torch.arange(M) == 2
    return positive, negative


def loop(query, key, positive, negative, temperature=0.1) -> list[Tensor | None]:
    rows: list[Tensor | None] = []
    for i in range(N):
        terms = [(cosine(query[i], key[m]) / temperature).exp() for m in range(M)]
        counted = sum(terms[m] for m in range(M) if positive[i, m] or negative[i, m])
        own = [-(terms[m] / counted).log() for m in range(M) if positive[i, m]]
        rows.append(sum(own) / len(own) if own else None)
    return rows


@pytest.mark.parametrize("no_match", ["zero", "skip"])
@pytest.mark.parametrize("empty", [[], [0, 1, 2, 3, 4]])
def test_value_and_gradients_equal_the_loop(no_match, empty):
    inputs, (positive, negative) = vectors(), masks()
    positive[empty] = False
    rows = loop(*inputs, positive, negative)
    zero = 0 * inputs[0].sum() + 0 * inputs[1].sum()
    per_query = torch.stack([zero if row is None else row for row in rows])
    counted = N if no_match == "zero" else max(1, sum(row is not None for row in rows))
    for reduction, expected in (("none", per_query), ("mean", per_query.sum() / counted)):
        got = masked_info_nce_loss(*inputs, positive, negative, reduction=reduction, no_match=no_match)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        weight = torch.arange(1, got.numel() + 1, dtype=got.dtype).view(got.shape)
        for mine, wanted in zip(
            *(torch.autograd.grad((x * weight).sum(), inputs, retain_graph=True) for x in (got, expected)), strict=True
        ):
            torch.testing.assert_close(mine, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("no_match", ["zero", "skip"])
@pytest.mark.parametrize(("queries", "keys"), [(0, M), (N, 0), (0, 0)])
def test_no_query_or_no_key_is_a_zero_with_gradients(queries, keys, no_match):
    inputs, none = [x[:n] for x, n in zip(vectors(), (queries, keys), strict=True)], torch.zeros(queries, keys).bool()
    value = masked_info_nce_loss(*inputs, none, none, no_match=no_match)
    assert value == 0
    assert not any(grad.any() for grad in torch.autograd.grad(value, inputs))
    assert masked_info_nce_loss(*inputs, none, none, reduction="none").shape == (queries,)


def test_one_positive_and_negatives_that_all_share_are_info_nce():
    query, key = vectors()
    positive, negative = torch.zeros(N, N + M, dtype=torch.bool), torch.zeros(N, N + M, dtype=torch.bool)
    positive[:, :N], negative[:, N:] = torch.eye(N, dtype=torch.bool), True
    own = torch.randn(N, C, dtype=torch.float64)
    got = masked_info_nce_loss(query, torch.cat([own, key]), positive, negative, temperature=0.2)
    torch.testing.assert_close(got, info_nce_loss(query[None], own[None], key))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit_and_half_precision_little(dtype):
    inputs, both = vectors(torch.float32), masks()
    expected = masked_info_nce_loss(*inputs, *both)
    with torch.autocast("cpu", dtype=dtype):
        got = masked_info_nce_loss(*inputs, *both)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
    half = [(200 * x.detach()).to(dtype).requires_grad_() for x in inputs]
    value = masked_info_nce_loss(*half, *both)
    torch.testing.assert_close(value, masked_info_nce_loss(*(x.float() for x in half), *both))
    value.backward()
    assert all(x.grad.isfinite().all() for x in half)


@pytest.mark.parametrize("temperature", [1e-2, 1e-6])
def test_tiny_temperatures_stay_finite(temperature):
    inputs = vectors(torch.float32)
    value = masked_info_nce_loss(*inputs, *masks(), temperature=temperature)
    value.backward()
    assert value.isfinite()
    assert all(x.grad.isfinite().all() for x in inputs)


def test_reads_no_value():
    inputs, both = vectors(), masks()
    with NoHostReads():
        masked_info_nce_loss(*inputs, *both, no_match="skip").backward()


def test_the_module_is_its_function():
    inputs, both = vectors(), masks()
    for options in ({}, {"temperature": 0.07}, {"reduction": "none"}, {"no_match": "skip"}):
        assert torch.equal(
            MaskedInfoNCELoss(**options)(*inputs, *both), masked_info_nce_loss(*inputs, *both, **options)
        )
    assert "temperature=0.07, reduction='none', no_match='skip'" in repr(MaskedInfoNCELoss(0.07, "none", "skip"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, N, C)}, "query: expected floating point (N, C), got torch.float32 (2, 5, 6)"),
        ({"key": torch.zeros(M, C + 1)}, "key: expected floating point (M, C) with the C of query, got"),
        ({"key": torch.zeros(M, C, dtype=torch.int64)}, "got torch.int64 (9, 6)"),
        ({"positive": torch.zeros(M, N, dtype=torch.bool)}, "positive: expected bool (N, M) = (5, 9), got"),
        ({"negative": torch.zeros(N, M)}, "negative: expected bool (N, M) = (5, 9), got torch.float32"),
        (
            {"key": torch.zeros(M, C, device="meta")},
            "query, key, positive, negative: expected one device, got cpu, meta",
        ),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"reduction": "sum"}, "reduction: expected 'mean' or 'none', got 'sum'"),
        ({"no_match": "drop"}, "no_match: expected 'zero' or 'skip', got 'drop'"),
    ],
)
def test_errors_name_the_argument(change, message):
    query, key = vectors(torch.float32)
    positive, negative = masks()
    given = {"query": query, "key": key, "positive": positive, "negative": negative, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        masked_info_nce_loss(**given)


def test_vectors_that_no_counting_pair_reads_may_hold_nan():
    positive, negative = torch.rand(6, 7) < 0.3, torch.rand(6, 7) < 0.5
    positive[:, 0], positive[2], positive[:, 3], negative[:, 3] = True, False, False, False
    results = []
    clean = torch.randn(6, 5), torch.randn(7, 5)
    for fill in (1.0, torch.nan):
        query, key = (x.clone() for x in clean)
        query[2], key[3] = fill, fill
        inputs = query.requires_grad_(), key.requires_grad_()
        total = masked_info_nce_loss(*inputs, positive, negative)
        results.append((total, *torch.autograd.grad(total, inputs)))
    torch.testing.assert_close(results[1], results[0])
    with pytest.raises(ValueError, match=r"negative: expected a strided mask, got torch.sparse_coo"):
        masked_info_nce_loss(*clean, positive, negative.to_sparse())
