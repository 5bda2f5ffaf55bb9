"""Instance-level losses, the second branch of PixPro + instance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl._tensors import check_tensor
from densessl.losses._reduce import check_temperature


def _check(query: Tensor, key: Tensor) -> None:
    for name, vectors in (("query", query), ("key", key)):
        check_tensor(vectors, name, "floating point vectors (B, C), one per image")
        if vectors.ndim != 2 or not vectors.is_floating_point():
            raise ValueError(
                f"{name}: expected floating point vectors (B, C), one per image, "
                f"got {vectors.dtype} {tuple(vectors.shape)}"
            )
    if query.shape != key.shape:
        raise ValueError(f"key: expected the shape of query, {tuple(query.shape)}, got {tuple(key.shape)}")
    if query.device != key.device:
        raise ValueError(f"key: expected a tensor on {query.device} as query, got {key.device}")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def instance_consistency_loss(query: Tensor, key: Tensor) -> Tensor:
    """``-2 cos``, averaged over images: BYOL's ``2 - 2 cos`` without its constant, in one direction.

    This is the instance branch of PixPro's published code (the paper's branch is contrastive).

    Args:
        query: Predictions of the online branch, ``(B, C)``.
        key: Projections of the target, ``(B, C)``.

    Returns:
        A float32 scalar in [-2, 2].

    Raises:
        ValueError: If a shape, dtype or device is not as described.

    Examples:
        >>> instance_consistency_loss(torch.ones(2, 4), torch.ones(2, 4))
        tensor(-2.)
    """
    _check(query, key)
    with torch.autocast(query.device.type, enabled=False):
        return -2 * nn.functional.cosine_similarity(_wide(query), _wide(key), dim=1).mean()


def instance_contrast_loss(
    query: Tensor, key: Tensor, *, temperature: float = 0.2, gather_distributed: bool = False
) -> Tensor:
    """Contrasts whole images with the other images of the batch: NT-Xent on one vector for each image.

    This is our form of the paper's SimCLR*, SimCLR with a momentum encoder. The recipes and results call it the
    instance loss in InfoNCE's form. It is lightly's NTXentLoss on ``(query, key.detach())``. We could not find the
    paper's temperature. For a contrast of cells with a queue see ``info_nce_loss``.

    Args:
        query: Projections of the online branch, ``(B, C)``.
        key: Projections of the target, ``(B, C)``; no gradient flows to them.
        temperature: Divisor of the similarities, above 0.
        gather_distributed: Whether negatives are also taken from all other processes.

    Returns:
        A float32 scalar of at least 0.

    Raises:
        ValueError: If a shape, dtype, device or the temperature is not as described, or the batch is a single image,
            which has no negatives.

    Examples:
        >>> loss = instance_contrast_loss(torch.rand(4, 32), torch.rand(4, 32))
    """
    from lightly.loss import NTXentLoss

    _check(query, key)
    check_temperature(temperature)
    if query.shape[0] < 2 and not gather_distributed:
        raise ValueError(f"query: expected at least 2 images, whose others are the negatives, got {query.shape[0]}")
    with torch.autocast(query.device.type, enabled=False):
        loss = NTXentLoss(temperature=temperature, gather_distributed=gather_distributed)
        return loss(_wide(query), _wide(key).detach())


class InstanceConsistencyLoss(nn.Module):
    """Instance consistency as a module; see ``instance_consistency_loss``.

    Examples:
        >>> InstanceConsistencyLoss()(torch.ones(2, 4), torch.ones(2, 4))
        tensor(-2.)
    """

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """See ``instance_consistency_loss``."""
        return instance_consistency_loss(query, key)


class InstanceContrastLoss(nn.Module):
    """Instance contrast as a module; see ``instance_contrast_loss``.

    Args:
        temperature: Divisor of the similarities, above 0.
        gather_distributed: Whether negatives are also taken from all other processes.

    Raises:
        ValueError: If the temperature is not positive.

    Examples:
        >>> loss = InstanceContrastLoss(temperature=0.2)(torch.rand(4, 32), torch.rand(4, 32))
    """

    def __init__(self, temperature: float = 0.2, gather_distributed: bool = False) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """See ``instance_contrast_loss``."""
        return instance_contrast_loss(
            query, key, temperature=self.temperature, gather_distributed=self.gather_distributed
        )
