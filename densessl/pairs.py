"""From pairs to a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from densessl.matching import Pairs


def pairs_to_mask(pairs: Pairs, shape: tuple[int, int]) -> Tensor:
    """Aligned pairs as a mask, for the losses and meters that take one.

    Args:
        pairs: of a matcher such as ``NearestMatcher``.
        shape: ``(Nq, Nk)``, cells of the query and of the key map. Pairs beyond it are an error of the indexing.

    Returns:
        bool ``(B, Nq, Nk)``, strided: True where a valid pair is.

    Raises:
        ValueError: on other shapes or dtypes.
    """
    query, key, valid = pairs
    if query.ndim != 2 or query.dtype != torch.int64:
        raise ValueError(f"pairs.query: expected int64 (B, K), got {query.dtype} {tuple(query.shape)}")
    if key.shape != query.shape or key.dtype != torch.int64:
        raise ValueError(f"pairs.key: expected int64 (B, K) = {tuple(query.shape)}, got {key.dtype} {tuple(key.shape)}")
    if valid.shape != query.shape or valid.dtype != torch.bool:
        raise ValueError(
            f"pairs.valid: expected bool (B, K) = {tuple(query.shape)}, got {valid.dtype} {tuple(valid.shape)}"
        )
    n_query, n_key = shape
    if n_query < 1 or n_key < 1:
        raise ValueError(f"shape: expected two positive numbers of cells (Nq, Nk), got {shape}")
    count = n_query * n_key
    flat = torch.zeros(len(query), count + 1, dtype=torch.bool, device=query.device)
    # Unused slots have index 0, where a valid pair may be: they go to a place of their own, which is cut off.
    flat.scatter_(1, torch.where(valid, query * n_key + key, count), True)
    return flat[:, :count].reshape(-1, n_query, n_key)
