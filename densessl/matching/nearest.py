"""Matching by any cost: NearestMatcher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl._tensors import check_number, check_tensor
from densessl.matching.pairs import Pairs


class NearestMatcher(nn.Module):
    """Pairs each query cell with its nearest key cell, by any cost.

    Args:
        keep: Number of pairs of least cost to keep per image; None keeps one per query cell.
        mutual: Whether to keep only pairs whose cells are each other's nearest. In one run of
            ``examples/compose_your_own.py`` that left 0.2 to 0.3 pairs for each cell; far fewer say that the features
            are alike everywhere, or that the views hardly overlap.

    Raises:
        ValueError: If ``keep`` is below 1.

    Examples:
        >>> cost = torch.tensor([[[0.1, 0.9], [0.8, 0.2]]])
        >>> NearestMatcher()(cost).key
        tensor([[0, 1]])
    """

    def __init__(self, keep: int | None = None, *, mutual: bool = False) -> None:
        super().__init__()
        if keep is not None:
            check_number(keep, "keep", "a whole number of at least 1, or None", lambda value: value >= 1, whole=True)
        self.keep = keep
        self.mutual = mutual

    def extra_repr(self) -> str:
        return f"keep={self.keep}, mutual={self.mutual}"

    @torch.no_grad()
    def forward(self, cost: Tensor, valid: Tensor | None = None) -> Pairs:
        """Picks pairs.

        Args:
            cost: Cost of each pair ``(B, Nq, Nk)``, floating point; lower is nearer. A distance or a negative
                similarity, for instance. NaN and infinite costs never pair.
            valid: Optional boolean tensor that broadcasts to ``(B, Nq, Nk)``, True for the pairs that are allowed.

        Returns:
            Pairs whose parts are ``(B, keep or Nq)``, sorted by cost if ``keep`` is given, otherwise by query cell.

        Raises:
            ValueError: If a shape, dtype or device is not as described, or ``keep`` is above Nq.
        """
        check_tensor(cost, "cost", "floating point (B, Nq, Nk)")
        if cost.ndim != 3 or not cost.is_floating_point() or cost.shape[2] == 0:
            raise ValueError(f"cost: expected floating point (B, Nq, Nk), got {cost.dtype} {tuple(cost.shape)}")
        if self.keep is not None and self.keep > cost.shape[1]:
            raise ValueError(f"keep: expected at most the number of query cells, {cost.shape[1]}, got {self.keep}")
        cost = torch.where(cost.isfinite(), cost, torch.inf)
        if valid is not None:
            _check_valid(valid, cost)
            cost = torch.where(valid, cost, torch.inf)
        nearest, key = cost.min(2)
        usable = nearest.isfinite()
        query = torch.arange(cost.shape[1], device=cost.device).expand_as(key)
        if self.mutual:
            usable = usable & (cost.argmin(1).gather(1, key) == query)
        if self.keep is not None:
            order = torch.where(usable, nearest, torch.inf).sort(dim=1, stable=True).indices[:, : self.keep]
            query, key, usable = query.gather(1, order), key.gather(1, order), usable.gather(1, order)
        return Pairs(torch.where(usable, query, 0), torch.where(usable, key, 0), usable)


def _check_valid(valid: Tensor, cost: Tensor) -> None:
    check_tensor(valid, "valid", f"bool, broadcastable to (B, Nq, Nk) = {tuple(cost.shape)}")
    fits = valid.ndim <= 3 and all(
        have in (1, want) for have, want in zip(reversed(valid.shape), reversed(cost.shape), strict=False)
    )
    if valid.dtype != torch.bool or not fits:
        raise ValueError(
            f"valid: expected bool, broadcastable to (B, Nq, Nk) = {tuple(cost.shape)}, "
            f"got {valid.dtype} {tuple(valid.shape)}"
        )
    if valid.device != cost.device:
        raise ValueError(f"valid: expected a tensor on {cost.device} as cost, got {valid.device}")
