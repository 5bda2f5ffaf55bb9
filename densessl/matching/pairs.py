"""Pairs of cells, and what can be made of them: picked tokens, or a mask."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from densessl._tensors import check_tensor


class Pairs(NamedTuple):
    """Pairs of cells, aligned: entry k of ``query`` belongs to entry k of ``key``.

    Attributes:
        query: Row-major index of each query cell, int64 ``(B, K)``.
        key: Row-major index of its key cell, int64 ``(B, K)``.
        valid: Boolean tensor ``(B, K)``. Unused slots are False and have index 0.

    Examples:
        >>> pairs = Pairs(torch.tensor([[0, 1]]), torch.tensor([[2, 0]]), torch.tensor([[True, False]]))
        >>> pairs.key[pairs.valid]
        tensor([2])
    """

    query: Tensor
    key: Tensor
    valid: Tensor


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Picks tokens by index.

    Args:
        tokens: Tokens ``(B, N, C)``.
        index: Indices as in ``Pairs``, int64 ``(B, K)``.

    Returns:
        The picked tokens ``(B, K, C)``.

    Raises:
        ValueError: If a shape, dtype or device is not as described; on a CPU also if an index is out of range.

    Examples:
        >>> tokens = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> gather_tokens(tokens, torch.tensor([[2, 0]]))[..., 0]
        tensor([[3., 1.]])
    """
    check_tensor(tokens, "tokens", "(B, N, C)")
    check_tensor(index, "index", f"int64 (B, K) with B = {tokens.shape[0]}")
    if tokens.ndim != 3:
        raise ValueError(f"tokens: expected (B, N, C), got {tuple(tokens.shape)}")
    if index.ndim != 2 or index.dtype != torch.int64 or index.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"index: expected int64 (B, K) with B = {tokens.shape[0]}, got {index.dtype} {tuple(index.shape)}"
        )
    if index.device != tokens.device:
        raise ValueError(f"index: expected a tensor on {tokens.device} as tokens, got {index.device}")
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= tokens.shape[1]:
            raise ValueError(f"index: expected indices from 0 to {tokens.shape[1] - 1}, got {low} to {high}")
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


def pairs_to_mask(pairs: Pairs, shape: tuple[int, int]) -> Tensor:
    """Turns aligned pairs into a mask, for the losses and metrics that take one.

    Args:
        pairs: Pairs from a matcher such as ``NearestMatcher``.
        shape: Numbers of cells ``(Nq, Nk)`` of the query and of the key map. Valid pairs beyond them are refused on a
            CPU; on other devices, where the check would wait for the device, they are left out.

    Returns:
        Mask ``(B, Nq, Nk)``, boolean and strided, True where a valid pair is.

    Raises:
        ValueError: If there are no pairs, or a shape or dtype is not as described; on a CPU also if a valid pair has an
            index out of range.

    Examples:
        >>> pairs = Pairs(torch.tensor([[0, 1]]), torch.tensor([[1, 0]]), torch.tensor([[True, False]]))
        >>> pairs_to_mask(pairs, (2, 2))
        tensor([[[False,  True],
                 [False, False]]])
    """
    if not isinstance(pairs, (tuple, list)) or len(pairs) != 3:
        raise ValueError(f"pairs: expected Pairs(query, key, valid), got {type(pairs).__name__}")
    sizes = shape if isinstance(shape, (tuple, list)) else ()
    if len(sizes) != 2 or not all(isinstance(size, (Integral, torch.SymInt)) and size > 0 for size in sizes):
        raise ValueError(f"shape: expected two positive numbers of cells (Nq, Nk), such as (h * w, h * w), got {shape}")
    query, key, valid = pairs
    for part, name in ((query, "query"), (key, "key"), (valid, "valid")):
        check_tensor(part, f"pairs.{name}", "(B, K)")
    if query.ndim != 2 or query.dtype != torch.int64:
        raise ValueError(f"pairs.query: expected int64 (B, K), got {query.dtype} {tuple(query.shape)}")
    if key.shape != query.shape or key.dtype != torch.int64:
        raise ValueError(f"pairs.key: expected int64 (B, K) = {tuple(query.shape)}, got {key.dtype} {tuple(key.shape)}")
    if valid.shape != query.shape or valid.dtype != torch.bool:
        raise ValueError(
            f"pairs.valid: expected bool (B, K) = {tuple(query.shape)}, got {valid.dtype} {tuple(valid.shape)}"
        )
    n_query, n_key = shape
    for index, size, name in ((query, n_query, "pairs.query"), (key, n_key, "pairs.key")):
        beyond = valid & ((index < 0) | (index >= size))
        if index.device.type == "cpu" and not torch.compiler.is_compiling() and bool(beyond.any()):
            raise ValueError(
                f"{name}: expected indices from 0 to {size - 1}, got {int(index[beyond][0])}; shape is (Nq, Nk), the "
                "numbers of cells of both maps"
            )
        valid = valid & ~beyond
    count = n_query * n_key
    flat = torch.zeros(len(query), count + 1, dtype=torch.bool, device=query.device)
    # Unused slots have index 0, where a valid pair may be: they go to a place of their own, which is cut off.
    flat.scatter_(1, torch.where(valid, query * n_key + key, count), True)
    return flat[:, :count].reshape(-1, n_query, n_key)
