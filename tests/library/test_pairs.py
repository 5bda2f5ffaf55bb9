"""Pairs as a mask, against the loop over them."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from densessl import (
    NearestMatcher,
    Pairs,
    feature_distance,
    gather_tokens,
    info_nce_loss,
    map_to_tokens,
    pairs_to_mask,
    pixcontrast_loss,
)

nearest = NearestMatcher(mutual=True)


def from_features_to_losses(query: Tensor, key: Tensor, negatives: Tensor) -> tuple[Tensor, ...]:
    """Matching by features, and both kinds of loss: on aligned pairs and on a mask."""
    pairs = nearest(feature_distance(query, key))
    q, k = gather_tokens(map_to_tokens(query), pairs.query), gather_tokens(map_to_tokens(key), pairs.key)
    aligned = info_nce_loss(q, k, negatives, pairs.valid, no_match="skip")
    mask = pairs_to_mask(pairs, (15, 12))
    return aligned, pixcontrast_loss(query, key, mask), feature_distance(query, key, metric="euclidean")


def test_the_way_from_features_to_losses_compiles_without_a_break():
    inputs = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 6, 2), torch.randn(7, 4)
    compiled = torch.compile(from_features_to_losses, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(*inputs), from_features_to_losses(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 asks the driver even where it indexes a fake GPU tensor"
)
def test_the_way_from_features_to_losses_runs_on_another_device():
    """On tensors that say they are on a GPU: one made on the CPU on the way raises, and so does a host read."""
    with FakeTensorMode():
        inputs = (torch.rand(*shape, device="cuda") for shape in ((2, 4, 3, 5), (2, 4, 6, 2), (7, 4)))
        assert {value.device.type for value in from_features_to_losses(*inputs)} == {"cuda"}


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
        (
            [(1, 2), (1, 2), (1, 2)],
            (0, 3),
            "shape: expected two positive numbers of cells (Nq, Nk), such as (h * w, h * w), got (0, 3)",
        ),
        ([(2,), (1, 2), (1, 2)], (2, 3), "pairs.query: expected int64 (B, K), got torch.int64 (2,)"),
        ([(1, 2), (1, 3), (1, 2)], (2, 3), "pairs.key: expected int64 (B, K) = (1, 2), got torch.int64 (1, 3)"),
        ([(1, 2), (1, 2), (2, 1)], (2, 3), "pairs.valid: expected bool (B, K) = (1, 2), got torch.bool (2, 1)"),
    ],
)
def test_bad_input_is_named(parts, shape, message):
    query, key, valid = (torch.zeros(part, dtype=torch.int64) for part in parts)
    with pytest.raises(ValueError, match=re.escape(message)):
        pairs_to_mask(Pairs(query, key, valid.bool()), shape)


@pytest.mark.parametrize(("query", "key", "name"), [(-1, 0, "query"), (2, 0, "query"), (0, -1, "key"), (0, 3, "key")])
def test_an_index_out_of_range_is_refused_and_on_other_devices_left_out(query, key, name):
    pairs = Pairs(torch.tensor([[query, 1]]), torch.tensor([[key, 2]]), torch.tensor([[True, True]]))
    told = rf"pairs.{name}: expected indices from 0 to [12], got {query or key}; shape is \(Nq, Nk\), the numbers of"
    with pytest.raises(ValueError, match=told):
        pairs_to_mask(pairs, (2, 3))
    unused = pairs._replace(valid=torch.tensor([[False, True]]))
    assert pairs_to_mask(unused, (2, 3)).nonzero().tolist() == [[0, 1, 2]]
    # Compiled code may not look at values either: it takes the way of the other devices.
    compiled = torch.compile(pairs_to_mask, backend="eager", fullgraph=True)
    assert compiled(pairs, (2, 3)).nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("given", [torch.ones(1, 2, 2, dtype=torch.bool), None, (torch.zeros(1, 2).long(),) * 2])
def test_what_is_no_pairs_is_named(given):
    with pytest.raises(ValueError, match=rf"pairs: expected Pairs\(query, key, valid\), got {type(given).__name__}"):
        pairs_to_mask(given, (2, 2))


def test_shapes_may_be_numpy_s_and_symbolic():
    pairs = Pairs(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[True]]))
    assert pairs_to_mask(pairs, (np.prod((1, 2)), np.int64(2))).sum() == 1

    class Made(torch.nn.Module):
        def forward(self, query, key):
            return pairs_to_mask(
                Pairs(*(torch.zeros(1, 1).long(),) * 2, torch.ones(1, 1).bool()), (query.shape[1], key.shape[1])
            )

    maps = torch.rand(1, 6, 3), torch.rand(1, 7, 3)
    cells = {1: torch.export.Dim("cells_q", min=2)}, {1: torch.export.Dim("cells_k", min=2)}
    exported = torch.export.export(Made(), maps, dynamic_shapes=cells, strict=False).module()
    assert exported(torch.rand(1, 4, 3), torch.rand(1, 5, 3)).shape == (1, 4, 5)


@pytest.mark.parametrize("shape", [4, None, (2,), ((2, 2), (2, 2)), (2, 0), (2, 2, 2), (2.0, 2)])
def test_shapes_that_are_no_numbers_of_cells_are_named(shape):
    pairs = Pairs(torch.tensor([[0]]), torch.tensor([[0]]), torch.tensor([[True]]))
    with pytest.raises(ValueError, match=r"shape: expected two positive numbers of cells \(Nq, Nk\), such as"):
        pairs_to_mask(pairs, shape)
