"""PixContrast's loss of each query cell without its logits: blocks of rows, computed once more in the backward pass.

These are operators of torch, so that ``torch.compile`` takes each as one node and does not unroll the loop over blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}  # logits held at once: on a CPU they stay in the cache

# Which of a block's logits are positive: a mask of the block's shape, or the row and column of each positive.
Positive = Tensor | tuple[Tensor, Tensor]


def cell_losses(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    ignored: Tensor | None,
    temperature: float,
) -> Tensor:
    """``log sum_j exp(<q_i, k_j> / t)`` over all valid keys not ignored, minus the same over the positive keys.

    It can be differentiated once, by q and k; memory grows with the number of cells and of positive pairs.

    Args:
        q: Unit tokens ``(B, Nq, C)``.
        k: Unit tokens ``(B, Nk, C)``.
        mask: Boolean tensor ``(B, Nq, Nk)``, or None.
        indices: Given instead of a mask: image, query and key cell of each pair, int64 ``(3, P)``, sorted, none twice.
        valid: Boolean tensor ``(B, Nk)``, True for the valid keys; None means all. Positives are among the valid keys.
        ignored: Pairs to leave out, none of them positive: bool ``(B, Nq, Nk)``, or as ``indices``; None means none.
        temperature: Divisor of the logits, above 0.

    Returns:
        Loss of each query cell ``(B, Nq)``; 0 where a cell has no positive.
    """
    return _forward(q, k, mask, indices, valid, ignored, temperature)[0]


def _blocks(
    q: Tensor, k: Tensor, mask: Tensor | None, indices: Tensor | None, ignored: Tensor | None
) -> Iterator[tuple[int, Tensor, Positive, Positive | None]]:
    """Image, rows of the flattened queries, positives and ignored pairs of each block.

    Rows without positives may be left out.
    """
    batch, n_query, n_key = *q.shape[:2], k.shape[1]
    step = max(1, _BLOCK.get(q.device.type, _BLOCK["cuda"]) // n_key)
    if mask is not None:
        rows = torch.arange(batch * n_query, device=q.device)
        cuts = _cuts([image * n_query for image in range(batch + 1)], step)
        others = _ignored_in(ignored, rows, cuts, n_query)
        for (image, start, stop), out in zip(cuts, others, strict=True):
            first = image * n_query
            yield image, rows[start:stop], mask[image, start - first : stop - first], out
        return
    if indices is None:
        return
    cell = indices[0] * n_query + indices[1]
    offsets = torch.searchsorted(cell, torch.arange(batch * n_query + 1, device=cell.device))
    rows = offsets.diff().nonzero()[:, 0]  # query cells that have positives
    rank = torch.searchsorted(rows, cell)  # of each pair, the place of its query cell among these
    cuts = _cuts(torch.searchsorted(rows, torch.arange(batch + 1, device=rows.device) * n_query).tolist(), step)
    pairs = torch.cat([offsets[rows], offsets[-1:]])[[0, *(stop for _, _, stop in cuts)]].tolist()
    others = _ignored_in(ignored, rows, cuts, n_query)
    for (image, start, stop), first, last, out in zip(cuts, pairs[:-1], pairs[1:], others, strict=True):
        yield image, rows[start:stop], (rank[first:last] - start, indices[2, first:last]), out


def _cuts(images: list[int], step: int) -> list[tuple[int, int, int]]:
    """Image, first row and end of each block; ``images`` holds the row at which each image begins, and the end."""
    return [
        (image, start, min(start + step, end))
        for image, (begin, end) in enumerate(pairwise(images))
        for start in range(begin, end, step)
    ]


def _ignored_in(
    ignored: Tensor | None, rows: Tensor, cuts: list[tuple[int, int, int]], n_query: int
) -> Iterator[Positive | None]:
    """The ignored pairs of each block, in the forms of ``Positive``."""
    if ignored is None or not cuts:
        yield from [None] * len(cuts)
    elif ignored.ndim == 3:
        for image, start, stop in cuts:
            yield ignored[image, rows[start:stop] - image * n_query]
    else:
        cell = ignored[0] * n_query + ignored[1]
        place = torch.searchsorted(rows, cell)
        there = rows[place.clamp(max=len(rows) - 1)] == cell
        place, column = place[there], ignored[2, there]
        edges = torch.tensor([0, *(stop for _, _, stop in cuts)], device=place.device)
        ends = torch.searchsorted(place, edges).tolist()
        for (_, start, _), first, last in zip(cuts, ends[:-1], ends[1:], strict=True):
            yield place[first:last] - start, column[first:last]


def _logits(q: Tensor, k: Tensor, valid: Tensor | None, out: Positive | None, image: int, temperature: float) -> Tensor:
    """Logits of some queries with all keys of an image; minus infinity for keys not valid and pairs left out."""
    logits = (q @ k[image].mT).div_(temperature)
    if valid is not None:
        logits.masked_fill_(~valid[image], -torch.inf)
    if isinstance(out, Tensor):
        logits.masked_fill_(out, -torch.inf)
    elif out is not None:
        logits[out] = -torch.inf
    return logits


def _positive_sum(logits: Tensor, positive: Positive) -> Tensor:
    """Log of the sum of exp over the positives of each row; infinite where there are none."""
    if isinstance(positive, Tensor):
        summed = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
        return torch.where(positive.any(1), summed, torch.inf)
    row, _ = positive
    values = logits[positive]
    top = values.new_full((len(logits),), -torch.inf).scatter_reduce_(0, row, values, "amax")
    return torch.zeros_like(top).index_add_(0, row, (values - top[row]).exp_()).log_().add_(top)


@torch.library.custom_op(
    "densessl::cell_losses",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor? mask, Tensor? indices, Tensor? valid, Tensor? ignored, float temperature) "
    "-> (Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    ignored: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the two logarithms, each (B, Nq); the latter infinite where there are no positives."""
    everything, among = q.new_full((2, q.shape[0] * q.shape[1]), torch.inf)
    with torch.autocast(q.device.type, enabled=False):
        flat = q.flatten(0, 1)
        for image, rows, positive, out in _blocks(q, k, mask, indices, ignored):
            logits = _logits(flat[rows], k, valid, out, image, temperature)
            among[rows] = _positive_sum(logits, positive)
            everything[rows] = logits.logsumexp(1)
    none = among == torch.inf
    loss = torch.where(none, 0.0, everything - among)
    # Both infinite there, so that the backward pass finds exp(-inf) = 0.
    everything = torch.where(none, torch.inf, everything)
    return loss.view(q.shape[:2]), everything, among.clone()


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    ignored: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    count = q.shape[0] * q.shape[1]
    return q.new_empty(q.shape[:2]), q.new_empty(count), q.new_empty(count)


@torch.library.custom_op(
    "densessl::cell_losses_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor everything, Tensor among, Tensor q, Tensor k, Tensor? mask, Tensor? indices, "
    "Tensor? valid, Tensor? ignored, float temperature, bool for_key) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    everything: Tensor,
    among: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    ignored: Tensor | None,
    temperature: float,
    for_key: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and, if asked for, of k."""
    scale = (grad / temperature).flatten()
    flat, grad_q = q.flatten(0, 1), torch.zeros_like(q).flatten(0, 1)
    grad_k = torch.zeros_like(k) if for_key else k.new_empty(0)
    with torch.autocast(q.device.type, enabled=False):
        for image, rows, positive, out in _blocks(q, k, mask, indices, ignored):
            logits = _logits(flat[rows], k, valid, out, image, temperature)
            if isinstance(positive, Tensor):
                wanted = torch.where(positive, (logits - among[rows, None]).exp_(), 0.0)
                share = logits.sub_(everything[rows, None]).exp_().sub_(wanted)
            else:
                wanted = (logits[positive] - among[rows][positive[0]]).exp_()
                share = logits.sub_(everything[rows, None]).exp_()
                share[positive] -= wanted  # no pair comes twice
            share.mul_(scale[rows, None])
            grad_q[rows] = share @ k[image]
            if for_key:
                grad_k[image].addmm_(share.mT, flat[rows])
    return grad_q.view_as(q), grad_k


@_backward.register_fake
def _(
    grad: Tensor,
    everything: Tensor,
    among: Tensor,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    valid: Tensor | None,
    ignored: Tensor | None,
    temperature: float,
    for_key: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k) if for_key else k.new_empty(0)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, temperature = inputs
    ctx.save_for_backward(*output[1:], *tensors)
    ctx.temperature = temperature


def _gradients(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple:
    for_key = ctx.needs_input_grad[1]
    grad_q, grad_k = _backward(grad, *ctx.saved_tensors, ctx.temperature, for_key)
    return grad_q, grad_k if for_key else None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
