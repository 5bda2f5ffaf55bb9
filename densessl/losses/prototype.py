"""Cross entropy of two assignments of the same cells to prototypes: iBOT's loss, in one view or across views."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl._checks import as_tokens, as_valid
from densessl._tensors import check_number
from densessl.losses._reduce import NoMatch, Reduction, check_options, reduce_images


def prototype_loss(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None = None,
    *,
    center: Tensor | None = None,
    query_temperature: float = 0.1,
    key_temperature: float = 0.04,
    reduction: Reduction = "mean",
    no_match: NoMatch = "zero",
) -> Tensor:
    """Cross entropy of the key's and the query's shares of K prototypes, mean over the cells that count, then images.

    With scores s of the query and t of the key at the same place, the loss is ``-sum over k of softmax((t - center) /
    t_k)_k * log softmax(s / t_q)_k`` (iBOT, Zhou et al. 2022). In iBOT the cells that count are those that the student
    did not see, and the key is the teacher's cell of the same view. Across views, the key is the teacher's matched cell
    of the other view, gathered by ``NearestMatcher``'s pairs; cells without a match do not count.

    For a given centre this equals lightly's ``IBOTPatchLoss``, which takes the masked cells alone. That one is not used
    because it moves its centre by the masked cells only. Such a centre becomes NaN for good in a step where no cell
    counts, and differs between one process and several, because each process has another number of them. Move the
    centre by all cells of the key, as iBOT does: lightly's ``Center((1, K)).update(key)``.

    Args:
        query: Scores ``(B, K, h, w)`` or ``(B, N, K)`` of the online branch.
        key: Scores of the same cells by the other branch, in the same shape; no gradient flows to them.
        valid: Optional boolean tensor ``(B, N)`` or ``(B, h, w)``, True for the cells that count. What other cells
            hold, even NaN, is not read.
        center: Optional centre that is subtracted from the key's scores: K numbers in any shape such as ``(1, K)``.
        query_temperature: Divisor of the query's scores before the softmax, above 0.
        key_temperature: Divisor of the key's scores before the softmax, above 0; iBOT has 0.04, which rises to 0.07 in
            long runs.
        reduction: ``"mean"`` over images, or ``"none"`` for one value per image.
        no_match: How an image without a cell that counts enters the mean: as 0 (``"zero"``, as in iBOT) or not at all
            (``"skip"``).

    Returns:
        A float32 scalar (float64 for float64 scores), or ``(B,)`` without reduction, with 0 for images without a cell
        that counts.

    Raises:
        ValueError: If a shape, dtype, device or option is not as described.

    Examples:
        >>> loss = prototype_loss(torch.rand(2, 100, 7, 7), torch.rand(2, 100, 7, 7), valid=torch.rand(2, 7, 7) < 0.5)
    """
    _check_options(query_temperature, key_temperature, reduction, no_match)
    s, t = as_tokens(query, "query"), as_tokens(key, "key").detach()
    if s.shape != t.shape:
        raise ValueError(f"key: expected (B, N, K) = {tuple(s.shape)} as query, got {tuple(t.shape)}")
    if s.device != t.device:
        raise ValueError(f"key: expected a tensor on {s.device} as query, got {t.device}")
    if center is not None and center.numel() != s.shape[2]:
        raise ValueError(f"center: expected K = {s.shape[2]} numbers, got {tuple(center.shape)}")
    keep = None if valid is None else as_valid(valid, query, "valid")
    dtype = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    with torch.autocast(s.device.type, enabled=False):
        s, t = s.to(dtype), t.to(dtype)
        if keep is not None:
            s, t = (torch.where(keep[..., None], scores, 0.0) for scores in (s, t))
        if center is not None:
            t = t - center.detach().to(dtype).flatten()
        wanted = (t / key_temperature).softmax(2)
        per_cell = -(wanted * (s / query_temperature).log_softmax(2)).sum(2)
        if keep is None:
            return reduce_images(per_cell.mean(1), s.new_ones(len(s), dtype=torch.bool), reduction, no_match)
        count = keep.sum(1)
        per_image = torch.where(keep, per_cell, 0.0).sum(1) / count.clamp(min=1)
        return reduce_images(per_image, count > 0, reduction, no_match)


def _check_options(query_temperature: float, key_temperature: float, reduction: str, no_match: str) -> None:
    check_options(reduction, no_match)
    for name, value in (("query_temperature", query_temperature), ("key_temperature", key_temperature)):
        check_number(value, name, "a positive number", lambda value: value > 0)


class PrototypeLoss(nn.Module):
    """Cross entropy of two assignments to prototypes; see ``prototype_loss``.

    Args:
        query_temperature: Divisor of the query's scores before the softmax, above 0.
        key_temperature: Divisor of the key's scores before the softmax, above 0; 0.04 as in iBOT.
        reduction: ``"mean"`` over images, or ``"none"``.
        no_match: How an image without a cell that counts enters the mean: ``"zero"`` or ``"skip"``.

    Raises:
        ValueError: If an option is unknown, or a temperature is not positive.

    Examples:
        >>> loss = PrototypeLoss()(torch.rand(2, 100, 7, 7), torch.rand(2, 100, 7, 7))
    """

    def __init__(
        self,
        query_temperature: float = 0.1,
        key_temperature: float = 0.04,
        reduction: Reduction = "mean",
        no_match: NoMatch = "zero",
    ) -> None:
        super().__init__()
        _check_options(query_temperature, key_temperature, reduction, no_match)
        self.query_temperature, self.key_temperature = query_temperature, key_temperature
        self.reduction: Reduction = reduction
        self.no_match: NoMatch = no_match

    def extra_repr(self) -> str:
        return (
            f"query_temperature={self.query_temperature}, key_temperature={self.key_temperature}, "
            f"reduction={self.reduction!r}, no_match={self.no_match!r}"
        )

    def forward(self, query: Tensor, key: Tensor, valid: Tensor | None = None, center: Tensor | None = None) -> Tensor:
        """See ``prototype_loss``."""
        return prototype_loss(
            query,
            key,
            valid,
            center=center,
            query_temperature=self.query_temperature,
            key_temperature=self.key_temperature,
            reduction=self.reduction,
            no_match=self.no_match,
        )
