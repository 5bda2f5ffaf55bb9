"""What a method returns, and what the methods share beside the library's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from densessl import MaskedView, View, cell_validity
from densessl.metrics import effective_rank, feature_std, pair_similarity, positives_per_cell, unmatched_share


class Step(NamedTuple):
    """What a method makes of a batch of two views.

    Attributes:
        loss: Scalar to be minimised.
        terms: The loss's parts by name, for the logs; empty where there is one part only.
        metrics: Computes the metrics of the run's health, by name. It is called in logged steps only.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: Callable[[], dict[str, Tensor]]


def check_step(step: object) -> None:
    """Refuses what a method's ``forward`` returns if the training cannot use it.

    Raises:
        ValueError: If it is no Step, or if its loss is no scalar tensor.
    """
    if isinstance(step, Step) and isinstance(step.loss, Tensor) and step.loss.ndim == 0:
        return
    got = type(step).__name__
    if isinstance(step, Step):
        loss = tuple(step.loss.shape) if isinstance(step.loss, Tensor) else type(step.loss).__name__
        got = f"a Step whose loss is {loss}"
    raise ValueError(f"method: expected forward to return a Step with a scalar loss, got {got}")


def valid_cells(view: View | MaskedView, size: tuple[int, int]) -> Tensor | None:
    """Which cells of a batch of views show something, bool ``(B, N)``; None, for all, where the views have no mask."""
    return cell_validity(view.mask, size) if isinstance(view, MaskedView) else None


def mean_over_cells(x: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of a map over its valid cells, ``(B, C)``; over all cells where ``valid`` is None.

    An image without a valid cell gives zeros.
    """
    if valid is None:
        return x.mean((2, 3))
    summed = x.masked_fill(~valid.view(len(x), 1, *x.shape[2:]), 0).sum((2, 3))
    return summed / valid.sum(1, keepdim=True).clamp(min=1)


def pair_metrics(
    query: Tensor, key: Tensor, mask: Tensor, valid_q: Tensor | None = None, valid_k: Tensor | None = None
) -> dict[str, Tensor]:
    """The metrics of the docs page "Concepts", under the names of the logs.

    Args:
        query: Projections of the online encoder, ``(B, C, h, w)`` or ``(B, Nq, C)``.
        key: Projections of the target encoder, ``(B, C, h', w')`` or ``(B, Nk, C)``.
        mask: Positive pairs, bool ``(B, Nq, Nk)``.
        valid_q: Query cells that count, bool ``(B, Nq)``; None: all.
        valid_k: Key cells that count, bool ``(B, Nk)``; None: all.
    """
    query, key = query.detach(), key.detach()
    positive, negative = pair_similarity(query, key, mask, valid_q, valid_k)
    channels = query.shape[1 if query.ndim == 4 else 2]
    return {
        "health/std_times_sqrt_c": feature_std(query, valid_q) * channels**0.5,
        "health/effective_rank": effective_rank(query, valid_q),
        "health/positives_per_cell": positives_per_cell(mask, valid_q),
        "health/images_without_match": unmatched_share(mask),
        "health/similarity_positive": positive,
        "health/similarity_negative": negative,
    }
