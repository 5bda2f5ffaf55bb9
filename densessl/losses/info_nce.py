"""InfoNCE between aligned pairs, with negatives from elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl._normalize import normalized
from densessl._tensors import check_tensor
from densessl.losses._reduce import NoMatch, Reduction, check_options, check_temperature, reduce_images


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    valid: Tensor | None = None,
    *,
    temperature: float = 0.2,
    reduction: Reduction = "mean",
    no_match: NoMatch = "zero",
) -> Tensor:
    """Contrasts cells with a queue: each query must tell its own key from negatives that all queries share.

    Source: MoCo, Eq. 1; DenseCL, Eq. 2. For a contrast of whole images with each other see ``instance_contrast_loss``.

    The loss of a pair is ``-log(exp(q.k / t) / (exp(q.k / t) + sum over negatives of exp(q.n / t)))``, averaged over an
    image's pairs, then over images. All vectors are L2-normalised here. Gradients flow to every input that asks for
    them; the published methods detach keys and negatives. The logits take ``B * K * M`` floats.

    Args:
        query: Query vectors ``(B, K, C)``; for one vector per image, K = 1.
        key: Key vectors ``(B, K, C)``, the positive of each query.
        negatives: Negative keys ``(M, C)``, for instance ``KeyQueue.keys``.
        valid: Boolean tensor ``(B, K)`` as in ``Pairs``, True for the pairs that count; None means all.
        temperature: Divisor t of the similarities, above 0; 0.2 as in MoCo v2 and DenseCL.
        reduction: ``"mean"`` over images, or ``"none"`` for one value per image.
        no_match: How an image without a valid pair counts in the mean: as 0 (``"zero"``) or not at all (``"skip"``).

    Returns:
        A float32 scalar of at least 0, or ``(B,)`` without reduction, with 0 for images without a valid pair.

    Raises:
        ValueError: If a shape, dtype, device or option is not as described.

    Examples:
        >>> query, key, negatives = torch.rand(2, 5, 32), torch.rand(2, 5, 32), torch.rand(100, 32)
        >>> loss = info_nce_loss(query, key, negatives)
    """
    check_options(reduction, no_match)
    check_temperature(temperature)
    _check(query, key, negatives, valid)
    with torch.autocast(query.device.type, enabled=False):
        if valid is not None:  # pairs that do not count reach no gradient, even if they hold NaN
            query, key = (x.masked_fill(~valid[..., None], 0) for x in (query, key))
        wide = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
        q, k, n = (normalized(x.to(wide)) for x in (query, key, negatives))
        positive = (q * k).sum(2) / temperature
        against = (q @ n.mT / temperature).logsumexp(2)
        per_pair = F.softplus(against - positive)  # of the fraction above, and it cannot overflow
        if valid is None:
            valid = torch.ones_like(per_pair, dtype=torch.bool)
        pairs = valid.sum(1)
        per_image = torch.where(valid, per_pair, 0.0).sum(1) / pairs.clamp(min=1)
        return reduce_images(per_image, pairs > 0, reduction, no_match)


def _check(query: Tensor, key: Tensor, negatives: Tensor, valid: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key), ("negatives", negatives)):
        check_tensor(x, name, "floating point (M, C)" if name == "negatives" else "floating point (B, K, C)")
    if query.ndim != 3 or not query.is_floating_point():
        raise ValueError(f"query: expected floating point (B, K, C), got {query.dtype} {tuple(query.shape)}")
    if key.shape != query.shape or not key.is_floating_point():
        raise ValueError(
            f"key: expected floating point (B, K, C) = {tuple(query.shape)} as query, "
            f"got {key.dtype} {tuple(key.shape)}"
        )
    channels = query.shape[2]
    if (
        negatives.ndim != 2
        or not negatives.is_floating_point()
        or negatives.shape[0] < 1
        or negatives.shape[1] != channels
    ):
        raise ValueError(
            f"negatives: expected floating point (M, C) with M > 0 and C = {channels} as query, "
            f"got {negatives.dtype} {tuple(negatives.shape)}"
        )
    if valid is not None:
        check_tensor(valid, "valid", f"bool (B, K) = {tuple(query.shape[:2])}")
    if valid is not None and (valid.dtype != torch.bool or valid.shape != query.shape[:2]):
        raise ValueError(
            f"valid: expected bool (B, K) = {tuple(query.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
        )
    devices = [x.device for x in (query, key, negatives, valid) if x is not None]
    if len(set(devices)) > 1:
        raise ValueError(f"query, key, negatives, valid: expected one device, got {', '.join(map(str, devices))}")


class InfoNCELoss(nn.Module):
    """Contrast of cells with negatives that all queries share, as a module; see ``info_nce_loss``.

    Args:
        temperature: Divisor t of the similarities, above 0; 0.2 as in MoCo v2 and DenseCL.
        reduction: ``"mean"`` over images, or ``"none"``.
        no_match: How an image without a valid pair counts in the mean: ``"zero"`` or ``"skip"``.

    Raises:
        ValueError: If an option is not as described.

    Examples:
        >>> query, key, negatives = torch.rand(2, 5, 32), torch.rand(2, 5, 32), torch.rand(100, 32)
        >>> loss = InfoNCELoss(temperature=0.2)(query, key, negatives)
    """

    def __init__(self, temperature: float = 0.2, reduction: Reduction = "mean", no_match: NoMatch = "zero") -> None:
        super().__init__()
        check_options(reduction, no_match)
        check_temperature(temperature)
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.no_match: NoMatch = no_match

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, no_match={self.no_match!r}"

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor, valid: Tensor | None = None) -> Tensor:
        """See ``info_nce_loss``."""
        return info_nce_loss(
            query,
            key,
            negatives,
            valid,
            temperature=self.temperature,
            reduction=self.reduction,
            no_match=self.no_match,
        )
