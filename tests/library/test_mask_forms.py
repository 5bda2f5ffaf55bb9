"""Masks in all the forms that torch makes of them, and cells that no pair needs."""

import re

import pytest
import torch
from test_contract import NoHostReads
from torch import Tensor

from densessl import pixcontrast_loss, pixpro_loss
from densessl.losses import pixcontrast
from densessl.metrics import pair_similarity, positives_per_cell, unmatched_share

B, SIZE_Q, SIZE_K = 3, (4, 5), (2, 6)
LOSSES = pytest.mark.parametrize("loss", [pixpro_loss, pixcontrast_loss])


def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 5, *SIZE_Q, requires_grad=True), torch.randn(B, 5, *SIZE_K, requires_grad=True)


def with_false_entries() -> tuple[Tensor, Tensor]:
    """A strided mask, and the same as a sparse one that stores some entries with the value False; image 1 has none."""
    stored = torch.rand(B, 20, 12) < 0.3
    valid = torch.rand(B, 20, 1) < 0.5
    valid[1], valid[0, 3], stored[0, 3, 2] = False, True, True
    valid[2, -1] = False
    stored[2, -1, -1] = True
    return stored & valid, torch.sparse_coo_tensor(
        stored.nonzero().T, valid.expand_as(stored)[stored], stored.shape, check_invariants=True
    )


@pytest.fixture(params=["few", "many"])
def pairs_at_once(request, monkeypatch):
    if request.param == "many":
        monkeypatch.setattr(pixcontrast, "_FEW_PAIRS", {torch.strided: 0, torch.sparse_coo: 0})


@LOSSES
@pytest.mark.parametrize("no_match", ["zero", "skip"])
def test_entries_with_the_value_false_are_no_positives(loss, no_match, pairs_at_once):
    q, k = pair()
    dense, sparse = with_false_entries()
    assert sparse.coalesce().values().numel() > dense.sum()
    expected, got = (loss(q, k, mask, no_match=no_match) for mask in (dense, sparse))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, (q, k)), torch.autograd.grad(expected, (q, k)))
    nothing = sparse * torch.zeros(B, 20, 1, dtype=torch.bool)
    assert loss(q, k, nothing) == 0


def test_meters_do_not_count_them_either():
    q, k = pair()
    dense, sparse = with_false_entries()
    for meter in (positives_per_cell, unmatched_share):
        assert meter(sparse) == meter(dense) > 0
    torch.testing.assert_close(pair_similarity(q, k, sparse), pair_similarity(q, k, dense))


def test_they_are_left_out_without_a_host_read():
    q, k = pair()
    sparse = with_false_entries()[1].coalesce()
    with NoHostReads():
        pixpro_loss(q, k, sparse).backward()


@LOSSES
@pytest.mark.parametrize("layout", ["strided", "sparse"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_cells_that_no_pair_needs_may_hold_anything(loss, layout, value, pairs_at_once):
    q, k = (x.detach() for x in pair())
    valid = torch.ones(B, 12, dtype=torch.bool)
    valid[:, 4] = False
    mask = torch.rand(B, 20, 12) < 0.2
    mask[:, 7], mask[:, :, 4] = False, False
    options = {"valid_k": valid} if loss is pixcontrast_loss else {}
    results = []
    for fill in (1.0, value):
        query, key = q.clone(), k.clone()
        query[:, :, 1, 2], key[:, :, 0, 4] = fill, fill
        inputs = query.requires_grad_(), key.requires_grad_()
        total = loss(*inputs, mask if layout == "strided" else mask.to_sparse(), **options)
        results.append((total, *torch.autograd.grad(total, inputs)))
    assert all(x.isfinite().all() for x in results[1])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda mask: mask.to_sparse(2), "mask: expected a sparse COO mask with 3 sparse dimensions, got a hybrid one"),
        (lambda mask: mask.to_sparse_csr(), "mask: expected a strided or sparse COO mask, got torch.sparse_csr"),
    ],
)
def test_other_sparse_forms_are_refused_by_name(form, message):
    mask = form(torch.ones(B, 20, 12, dtype=torch.bool))
    q, k = pair()
    for use in (
        lambda: pixpro_loss(q, k, mask),
        lambda: pixcontrast_loss(q, k, mask),
        lambda: positives_per_cell(mask),
        lambda: unmatched_share(mask),
        lambda: pair_similarity(q, k, mask),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()
