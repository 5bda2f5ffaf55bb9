"""Distances in feature space, against the loop."""

import re

import pytest
import torch
from reference import cosine, tokens
from test_contract import NoHostReads

from densessl import feature_distance, map_to_tokens

QUERY, KEY = (2, 6, 3, 5), (2, 6, 7, 2)
METRIC = pytest.mark.parametrize("metric", ["cosine", "euclidean"])


@METRIC
def test_equals_the_loop(metric):
    query, key = 3 * torch.randn(QUERY, dtype=torch.float64), 0.2 * torch.randn(KEY, dtype=torch.float64)
    q, k = tokens(query), tokens(key)
    expected = torch.zeros(2, 15, 14, dtype=torch.float64)
    for b in range(2):
        for i in range(15):
            for j in range(14):
                a, c = q[b, i], k[b, j]
                expected[b, i, j] = 1 - cosine(a, c) if metric == "cosine" else ((a - c) ** 2).sum().sqrt()
    with NoHostReads():
        got = feature_distance(query, key, metric=metric)
    torch.testing.assert_close(got, expected)
    assert torch.equal(feature_distance(map_to_tokens(query), key, metric=metric), got)


@METRIC
def test_autocast_and_half_precision_leave_it_in_float32(metric):
    query, key = torch.randn(QUERY), torch.randn(KEY)
    expected = feature_distance(query, key, metric=metric)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feature_distance(query, key, metric=metric), expected)
    half = query.bfloat16()
    assert torch.equal(feature_distance(half, key, metric=metric), feature_distance(half.float(), key, metric=metric))


def test_near_cells_keep_their_order_far_from_the_origin():
    """By scalar products, distances of 0.001 at a length of 1,000 are noise."""
    query = torch.full((1, 1, 4), 500.0)
    key = query + torch.tensor([3e-3, 1e-3, 2e-3])[:, None]
    assert feature_distance(query, key, metric="euclidean").argsort(2).tolist() == [[[1, 2, 0]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: feature_distance(q, k, metric="dot"), "metric: expected 'cosine' or 'euclidean', got 'dot'"),
        (lambda q, k: feature_distance(q[0, 0], k), "query: expected floating point features"),
        (lambda q, k: feature_distance(q, k.long()), "key: expected floating point features"),
        (
            lambda q, k: feature_distance(q, k[:, :4]),
            "key: expected B = 2 images and C = 6 channels as query, got B = 2",
        ),
        (lambda q, k: feature_distance(q, k[:1]), "got B = 1 and C = 6"),
        (lambda q, k: feature_distance(q, k.to("meta")), "key: expected a tensor on cpu as query, got meta"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.rand(QUERY), torch.rand(KEY))
