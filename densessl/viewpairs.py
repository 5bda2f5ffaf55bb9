"""A loss over all pairs of more than two views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Query = TypeVar("Query")
Key = TypeVar("Key")


def mean_over_view_pairs(loss: Callable[[Query, Key], Tensor], queries: Sequence[Query], keys: Sequence[Key]) -> Tensor:
    """Mean of ``loss(queries[i], keys[j])`` over all ordered pairs of views with i != j.

    What stands for a view is up to the loss: a map, or a map with its coords. Views may differ in size. With two views
    it is the mean of the two directions.

    Args:
        loss: of one direction; its values have one shape.
        queries: one per view.
        keys: one per view, in the same order; or of the first views only, where the others give no keys (local views).

    Returns:
        What the loss returns, averaged.

    Raises:
        ValueError: if there are more keys than queries, or no two views.
    """
    if len(keys) > len(queries):
        raise ValueError(f"keys: expected at most as many views as queries, {len(queries)}, got {len(keys)}")
    values = [loss(query, key) for i, query in enumerate(queries) for j, key in enumerate(keys) if i != j]
    if not values:
        raise ValueError(f"queries, keys: expected two different views, got {len(queries)} and {len(keys)}")
    return torch.stack(values).mean(0)
