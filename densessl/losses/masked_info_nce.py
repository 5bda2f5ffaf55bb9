"""InfoNCE with any number of positives, where two masks say which pairs are positive and which negative."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl._normalize import normalized
from densessl._tensors import check_tensor
from densessl.losses._reduce import NoMatch, Reduction, check_options, check_temperature, reduce_images


def masked_info_nce_loss(
    query: Tensor,
    key: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    temperature: float = 0.1,
    reduction: Reduction = "mean",
    no_match: NoMatch = "zero",
) -> Tensor:
    """Each query is compared with keys of the whole batch; two masks name its positives and its negatives.

    The loss of a query is the mean over its positives of ``-log(exp(q.k / t) / sum over positives and negatives of
    exp(q.n / t))``, averaged over queries. If all keys that are not positive are negative, this is SupCon's ``L_out``
    (Khosla et al. 2020, Eq. 2). If a region's own region in its own view is neither, this is DetCon (Henaff et al.
    2021, as in their code). PixContrast takes the mean inside the logarithm: see ``densessl.pixcontrast_loss``.

    Query and key are L2-normalised here. Gradients flow to every input that asks for them. The loss takes memory for a
    few times ``N * M`` floats.

    Args:
        query: Query vectors of all images together, ``(N, C)``; N may be 0.
        key: Key vectors of all images together, ``(M, C)``.
        positive: Boolean tensor ``(N, M)``, True for positive pairs.
        negative: Boolean tensor ``(N, M)``, True for negative pairs. A pair in neither mask does not count; a pair in
            both is positive.
        temperature: Divisor t of the similarities, above 0; 0.1 as in SupCon and DetCon.
        reduction: ``"mean"`` over queries, or ``"none"`` for one value per query.
        no_match: How a query without a positive counts in the mean: as 0 (``"zero"``) or not at all (``"skip"``).

    Returns:
        A float32 scalar, or ``(N,)`` without reduction, with 0 for queries without a positive. Without any query, the
        scalar is a 0 whose gradients are 0.

    Raises:
        ValueError: If a shape, dtype, device or option is not as described.

    Examples:
        >>> same = torch.eye(6, dtype=torch.bool)
        >>> loss = masked_info_nce_loss(torch.rand(6, 32), torch.rand(6, 32), positive=same, negative=~same)
    """
    check_options(reduction, no_match)
    check_temperature(temperature)
    _check(query, key, positive, negative)
    with torch.autocast(query.device.type, enabled=False):
        count = positive.sum(1)
        matched = count > 0
        allowed = positive | negative
        # What no counting pair reads, even NaN, reaches no gradient.
        query = query.masked_fill(~matched[:, None], 0)
        key = key.masked_fill(~(allowed & matched[:, None]).any(0)[:, None], 0)
        wide = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
        logits = normalized(query.to(wide)) @ normalized(key.to(wide)).mT / temperature
        against = logits.masked_fill(~allowed, -torch.inf).logsumexp(1)
        toward = torch.where(positive, logits, 0.0).sum(1) / count.clamp(min=1)
        return reduce_images(torch.where(matched, against - toward, 0.0), matched, reduction, no_match)


def _check(query: Tensor, key: Tensor, positive: Tensor, negative: Tensor) -> None:
    for name, x in (("query", query), ("key", key)):
        check_tensor(x, name, "floating point vectors, (N, C) and (M, C)")
        if x.ndim != 2 or not x.is_floating_point() or x.shape[1] != query.shape[1]:
            raise ValueError(
                f"{name}: expected floating point {'(N, C)' if name == 'query' else '(M, C) with the C of query'}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    expected = (len(query), len(key))
    for name, mask in (("positive", positive), ("negative", negative)):
        check_tensor(mask, name, f"bool (N, M) = {expected}")
        if mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(f"{name}: expected bool (N, M) = {expected}, got {mask.dtype} {tuple(mask.shape)}")
        if mask.layout != torch.strided:
            raise ValueError(f"{name}: expected a strided mask, got {mask.layout}")
    if not query.device == key.device == positive.device == negative.device:
        raise ValueError(
            f"query, key, positive, negative: expected one device, got {query.device}, {key.device}, "
            f"{positive.device} and {negative.device}"
        )


class MaskedInfoNCELoss(nn.Module):
    """InfoNCE with two masks, as a module; see ``masked_info_nce_loss``.

    Args:
        temperature: Divisor t of the similarities, above 0; 0.1 as in SupCon and DetCon.
        reduction: ``"mean"`` over queries, or ``"none"``.
        no_match: How a query without a positive counts in the mean: ``"zero"`` or ``"skip"``.

    Raises:
        ValueError: If an option is unknown, or the temperature is not positive.

    Examples:
        >>> same = torch.eye(6, dtype=torch.bool)
        >>> loss = MaskedInfoNCELoss()(torch.rand(6, 32), torch.rand(6, 32), same, ~same)
    """

    def __init__(self, temperature: float = 0.1, reduction: Reduction = "mean", no_match: NoMatch = "zero") -> None:
        super().__init__()
        check_options(reduction, no_match)
        check_temperature(temperature)
        self.temperature, self.reduction, self.no_match = temperature, reduction, no_match

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, no_match={self.no_match!r}"

    def forward(self, query: Tensor, key: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """See ``masked_info_nce_loss``."""
        return masked_info_nce_loss(
            query,
            key,
            positive,
            negative,
            temperature=self.temperature,
            reduction=self.reduction,
            no_match=self.no_match,
        )
