"""Pairs as a mask, against the loop over them."""

import re

import pytest
import torch
from test_contract import NoHostReads

from densessl import NearestMatcher, Pairs, pairs_to_mask


@pytest.mark.parametrize("options", [{}, {"mutual": True}, {"keep": 2}, {"keep": 5, "mutual": True}])
def test_equals_the_loop_over_the_pairs(options):
    allowed = torch.rand(3, 5, 7) < 0.2
    allowed[1] = torch.arange(35).view(5, 7) == 25  # one pair only: unused slots, which point at (0, 0)
    pairs = NearestMatcher(**options)(torch.rand(3, 5, 7), allowed)
    expected = torch.zeros(3, 5, 7, dtype=torch.bool)
    for b in range(3):
        for query, key, valid in zip(*(part[b].tolist() for part in pairs), strict=True):
            if valid:
                expected[b, query, key] = True
    with NoHostReads():
        mask = pairs_to_mask(pairs, (5, 7))
    assert torch.equal(mask, expected)
    assert 0 < mask.sum() == pairs.valid.sum() < pairs.valid.numel()


@pytest.mark.parametrize("first", [True, False])
def test_an_unused_slot_does_not_undo_the_pair_at_zero(first):
    valid = torch.tensor([[first, not first]])
    zero = torch.zeros(1, 2, dtype=torch.int64)
    assert pairs_to_mask(Pairs(zero, zero, valid), (2, 3)).nonzero().tolist() == [[0, 0, 0]]
    assert not pairs_to_mask(Pairs(zero, zero, valid & False), (2, 3)).any()


@pytest.mark.parametrize(
    ("parts", "shape", "message"),
    [
        ([(1, 2), (1, 2), (1, 2)], (0, 3), "shape: expected two positive numbers of cells (Nq, Nk), got (0, 3)"),
        ([(2,), (1, 2), (1, 2)], (2, 3), "pairs.query: expected int64 (B, K), got torch.int64 (2,)"),
        ([(1, 2), (1, 3), (1, 2)], (2, 3), "pairs.key: expected int64 (B, K) = (1, 2), got torch.int64 (1, 3)"),
        ([(1, 2), (1, 2), (2, 1)], (2, 3), "pairs.valid: expected bool (B, K) = (1, 2), got torch.bool (2, 1)"),
    ],
)
def test_bad_input_is_named(parts, shape, message):
    query, key, valid = (torch.zeros(part, dtype=torch.int64) for part in parts)
    with pytest.raises(ValueError, match=re.escape(message)):
        pairs_to_mask(Pairs(query, key, valid.bool()), shape)
