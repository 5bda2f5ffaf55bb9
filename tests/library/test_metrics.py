"""The health meters against loops, and on features whose health is known."""

import math

import pytest
import reference
import torch
from torch import Tensor, nn

from densessl import PPM, DistanceMatcher, coords_from_boxes, map_to_tokens
from densessl.metrics import (
    effective_rank,
    feature_std,
    pair_similarity,
    positives_per_cell,
    propagation_entropy,
    unmatched_share,
)

LAYOUT = pytest.mark.parametrize("layout", ["strided", "sparse", "transposed"])


def random_mask(layout: str = "strided") -> Tensor:
    mask = torch.rand(4, 6, 20) < torch.tensor([0.1, 0.5, 0.0, 0.3])[:, None, None]
    mask[3, :, :10] = False
    if layout == "transposed":
        return mask.mT.contiguous().to_sparse_coo().mT
    return mask.to_sparse_coo() if layout == "sparse" else mask


def features() -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(4, 5, 2, 3) + 1, torch.randn(4, 5, 4, 5) - 0.5


@LAYOUT
def test_counts(layout):
    mask = random_mask(layout)
    cells = [sum(row) for image in as_lists(mask) for row in image]
    assert positives_per_cell(mask).item() == pytest.approx(sum(cells) / len(cells))
    assert unmatched_share(mask).item() == 0.25
    nothing = torch.zeros(4, 6, 20, dtype=torch.bool)
    nothing = nothing if layout == "strided" else nothing.to_sparse_coo()
    assert positives_per_cell(nothing).item() == 0
    assert unmatched_share(nothing).item() == 1


def as_lists(mask: Tensor) -> list[list[list[bool]]]:
    return (mask if mask.layout == torch.strided else mask.to_dense()).tolist()


def test_positives_of_full_overlap():
    coords = coords_from_boxes(torch.tensor([[0.0, 0, 1, 1]]))
    mask = DistanceMatcher(0.7)(coords, coords, (7, 7))
    assert positives_per_cell(mask).item() == 1
    assert unmatched_share(mask).item() == 0


@LAYOUT
def test_pair_similarity_equals_the_loop(layout):
    query, key = features()
    mask = random_mask(layout)
    expected = reference.pair_similarity(query, key, torch.tensor(as_lists(mask)))
    for q, k in ((query, key), (map_to_tokens(query), map_to_tokens(key))):
        got = pair_similarity(q, k, mask)
        assert [value.item() for value in got] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = pair_similarity(query, key, mask)
    assert [value.item() for value in got] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_cells_that_do_not_count():
    """As if they were not there: picked out by hand, image by image."""
    query, key = features()
    valid_q, valid_k = torch.rand(4, 6) < 0.6, torch.rand(4, 20) < 0.6
    valid_q[0], valid_k[0] = False, True
    valid_q[1, :2] = True
    mask = random_mask() & valid_q[:, :, None] & valid_k[:, None]
    left = map_to_tokens(query)[valid_q][None]  # one image of the cells that are left
    for q, k, of_q, of_k in (
        (query, key, valid_q, valid_k),
        (map_to_tokens(query), map_to_tokens(key), valid_q, valid_k),
        (query, key, valid_q.view(4, 2, 3), valid_k.view(4, 4, 5)),
    ):
        torch.testing.assert_close(feature_std(q, of_q), feature_std(left))
        torch.testing.assert_close(effective_rank(q, of_q), effective_rank(left))
        positives, negatives = [], []
        for b in range(4):
            one, other = map_to_tokens(query)[b].double(), map_to_tokens(key)[b].double()
            for i in valid_q[b].nonzero()[:, 0]:
                for j in valid_k[b].nonzero()[:, 0]:
                    (positives if mask[b, i, j] else negatives).append(reference.cosine(one[i], other[j]).item())
        for form in (mask, mask.to_sparse_coo()):
            got = pair_similarity(q, k, form, of_q, of_k)
            expected = [sum(values) / len(values) for values in (positives, negatives)]
            assert [value.item() for value in got] == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert positives_per_cell(form, of_q).item() == pytest.approx(len(positives) / int(valid_q.sum()))
    nothing = torch.zeros_like(valid_q)
    assert feature_std(query, nothing) == 0
    assert positives_per_cell(torch.zeros_like(mask), nothing) == 0
    assert effective_rank(query, nothing) == 1  # the exponential of no entropy


def test_pair_similarity_where_there_are_no_such_pairs():
    query, key = features()
    everything = torch.ones(4, 6, 20, dtype=torch.bool)
    positive, negative = pair_similarity(query, key, everything)
    assert positive.item() == pytest.approx(reference.pair_similarity(query, key, everything)[0], rel=1e-4)
    assert negative.isnan()
    positive, negative = pair_similarity(query, key, ~everything)
    assert positive.isnan()
    assert negative.isfinite()


def test_feature_std():
    query, _ = features()
    expected = reference.feature_std(query)
    assert feature_std(query).item() == pytest.approx(expected, rel=1e-5)
    assert feature_std(map_to_tokens(query)).item() == pytest.approx(expected, rel=1e-5)
    healthy = torch.randn(8, 64, 9, 9)
    assert feature_std(healthy).item() == pytest.approx(1 / math.sqrt(64), rel=0.02)
    collapsed = torch.randn(1, 64, 1, 1) * torch.rand(8, 1, 9, 9)
    assert feature_std(collapsed).item() == pytest.approx(0, abs=1e-6)


def test_effective_rank():
    query, _ = features()
    assert effective_rank(query).item() == pytest.approx(reference.effective_rank(query.double()), rel=1e-3)
    collapsed = torch.randn(1, 16, 1, 1) * torch.rand(4, 1, 7, 5)
    assert effective_rank(collapsed).item() == pytest.approx(1, abs=0.01)
    three = torch.randn(4, 35, 3) @ torch.eye(3, 16)
    assert 2.5 < effective_rank(three).item() < 3.001
    assert effective_rank(torch.eye(16).expand(2, 16, 16)).item() == pytest.approx(16, rel=1e-4)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_propagation_entropy(gamma):
    query, _ = features()
    expected = reference.propagation_entropy(query.double(), gamma, offset=1e-6 if gamma < 1 else 0.0)
    assert 0.05 < expected < 0.99
    assert propagation_entropy(query, gamma).item() == pytest.approx(expected, rel=1e-3)
    alone = torch.eye(6).expand(2, 6, 6)
    assert propagation_entropy(alone, gamma).item() == pytest.approx(0, abs=0.03 if gamma < 1 else 1e-6)
    assert propagation_entropy(torch.ones(2, 6, 6), gamma).item() == pytest.approx(1, abs=1e-5)


def test_entropy_looks_at_the_modules_own_weights():
    """One-hot cells: the module's output for identity g tells the weights themselves."""
    x = torch.rand(1, 4, 4)
    weights = PPM(nn.Identity(), normalize_values=False)(x) @ torch.linalg.inv(x)
    share = weights / weights.sum(-1, keepdim=True)
    entropy = -(share * share.log()).sum(-1).mean() / math.log(4)
    assert propagation_entropy(x).item() == pytest.approx(entropy.item(), abs=1e-3)


@pytest.mark.parametrize("meter", [feature_std, effective_rank, propagation_entropy])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_no_gradient(meter, dtype):
    x = (100 * torch.randn(2, 8, 3, 5)).to(dtype).requires_grad_()
    value = meter(x)
    assert not value.requires_grad
    assert value.item() == pytest.approx(meter(x.float()).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: positives_per_cell(torch.ones(2, 3, 4)), r"mask: expected bool \(B, Nq, Nk\), got torch\.float32 .*"),
        (
            lambda: positives_per_cell(torch.ones(2, 3, 4).bool(), torch.ones(2, 4).bool()),
            r"valid_q: expected bool \(B, Nq\) = \(2, 3\) or \(B, h, w\), got torch\.bool \(2, 4\)",
        ),
        (
            lambda: feature_std(torch.ones(2, 5, 1, 3), torch.ones(2, 3)),
            r"valid: expected bool \(B, N\) = \(2, 3\) or \(B, h, w\) = \(2, 1, 3\), got torch\.float32 \(2, 3\)",
        ),
        (lambda: unmatched_share(torch.ones(3, 4).bool()), r"mask: expected bool .* got torch\.bool \(3, 4\)"),
        (
            lambda: positives_per_cell(torch.ones(2, 3, 4).bool(), torch.ones(2).bool()),
            r"valid_q: expected bool \(B, Nq\) = \(2, 3\) or .* got torch\.bool \(2,\)",
        ),
        (lambda: feature_std(torch.ones(3, 4)), r"features: expected floating point .* \(3, 4\)"),
        (lambda: effective_rank(torch.ones(3, 4, 5).long()), r"features: .* got torch\.int64 \(3, 4, 5\)"),
        (
            lambda: propagation_entropy(torch.ones(2, 5, 1, 1)),
            r"features: expected at least 2 cells, got \(2, 5, 1, 1\)",
        ),
        (
            lambda: pair_similarity(torch.ones(2, 5, 1, 3), torch.ones(2, 5, 4, 1), torch.ones(2, 4, 3).bool()),
            r"mask: expected bool \(B, Nq, Nk\) = \(2, 3, 4\), got torch\.bool \(2, 4, 3\)",
        ),
        (
            lambda: pair_similarity(torch.ones(2, 5, 1, 3), torch.ones(2, 6, 4, 1), torch.ones(2, 3, 4).bool()),
            r"key: expected B = 2 images and C = 5 channels as query, got B = 2 and C = 6",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_rank_of_features_that_are_not_finite_is_nan():
    x = torch.randn(2, 8, 3, 5)
    x[0, 1, 2, 3] = torch.nan
    assert effective_rank(x).isnan()
    valid = torch.ones(2, 3, 5, dtype=torch.bool)
    valid[0, 2, 3] = False
    keep = map_to_tokens(x).flatten(0, 1)[valid.flatten()][None]
    assert effective_rank(x, valid).item() == pytest.approx(effective_rank(keep).item(), rel=1e-4)


@pytest.mark.parametrize("layout", ["strided", "sparse"])
def test_cells_without_positives_that_hold_nan_leave_the_similarity_of_pairs_alone(layout):
    query, key = features()
    mask = random_mask()
    mask[:, 2], mask[:, :, 11] = False, False
    mask[0, 0, 0] = True
    expected = pair_similarity(query, key, mask)[0]
    query[:, :, 0, 2], key[:, :, 2, 1] = torch.nan, torch.inf
    got = pair_similarity(query, key, mask if layout == "strided" else mask.to_sparse())[0]
    torch.testing.assert_close(got, expected)
