"""Statistics of batch norm from the images that a backbone is scored on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset

from densessl.evaluation._backbones import Backbone, prepared


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model has a batch norm that keeps statistics."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def fill_statistics(backbone: Backbone, images: Dataset[Tensor], batch_size: int, device: torch.device) -> None:
    """Sets mean and variance of every batch norm to those of the images, and leaves all weights as they are.

    A run at learning rate 0 ends with such a network, which is what a trained one is to be compared with. Before, batch
    norm has the mean 0 and the variance 1, which no training ever used.

    Args:
        backbone: The backbone, whose model is changed in place.
        images: Images uint8 ``(3, H, W)`` of one size.
        batch_size: Number of images that are encoded at once.
        device: Device of the work.
    """
    model = backbone.model.to(device)
    update_bn(_batches(backbone, images, batch_size, device), model)
    model.eval()


def _batches(backbone: Backbone, images: Dataset[Tensor], batch_size: int, device: torch.device) -> Iterator[Tensor]:
    for start in range(0, len(images), batch_size):  # type: ignore[arg-type]
        held = [images[i] for i in range(start, min(start + batch_size, len(images)))]  # type: ignore[arg-type]
        yield prepared(backbone, torch.stack(held).to(device))
