"""A loss over all ordered pairs of views."""

import re

import pytest
import torch
from torch import Tensor

from densessl import DistanceMatcher, coords_from_boxes, mean_over_view_pairs, pixpro_loss

SIZES = [(3, 5), (4, 2), (2, 2)]


def test_all_ordered_pairs_of_different_views():
    seen = []

    def loss(query: str, key: int) -> Tensor:
        seen.append((query, key))
        return torch.tensor(10.0 * "abc".index(query) + key)

    value = mean_over_view_pairs(loss, "abc", [0, 1, 2])
    assert seen == [("a", 1), ("a", 2), ("b", 0), ("b", 2), ("c", 0), ("c", 1)]
    assert value == (1 + 2 + 10 + 12 + 20 + 21) / 6


def test_local_views_give_no_keys():
    seen = []
    mean_over_view_pairs(lambda q, k: torch.tensor(float(seen.append((q, k)) is None)), "abcd", [0, 1])
    assert seen == [("a", 1), ("b", 0), ("c", 0), ("c", 1), ("d", 0), ("d", 1)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dense_loss_over_three_views_of_different_size(reduction):
    start = torch.rand(3, 2, 2) / 3
    coords = [coords_from_boxes(torch.cat([x, x + 0.6], 1)) for x in start]
    maps = [torch.randn(2, 4, *size, requires_grad=True) for size in SIZES]
    match = DistanceMatcher(0.7)

    def loss(query: tuple[Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
        (z, c1), (t, c2) = query, key
        mask = match(c1, c2, z.shape[-2:], t.shape[-2:])
        return pixpro_loss(z, t.detach(), mask, reduction=reduction)

    views = list(zip(maps, coords, strict=True))
    expected = sum(loss(views[i], views[j]) for i in range(3) for j in range(3) if i != j) / 6
    got = mean_over_view_pairs(loss, views, views)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert all(z.grad.any() for z in maps)


@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ("ab", "abc", "keys: expected at most as many views as queries, 2, got 3"),
        ("a", "a", "queries, keys: expected two different views, got 1 and 1"),
        ("abc", "", "queries, keys: expected two different views, got 3 and 0"),
    ],
)
def test_bad_input_is_named(queries, keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mean_over_view_pairs(lambda query, key: torch.zeros(()), queries, keys)
