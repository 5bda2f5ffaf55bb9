"""Whether a recipe fits the weights that a run begins from."""

from __future__ import annotations

import logging

from jsonargparse import Namespace
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from examples.pretrain.common.optimizers import LinearLARS, SquareRootLARS
from examples.pretrain.common.scores import has_seen_nothing

log = logging.getLogger(__name__)

LARS_RATES = (SquareRootLARS, LinearLARS)


def check_start(options: Namespace, backbone: nn.Module, optimizer: object) -> None:
    """Looks at the start of a run that begins, and warns of what made backbones worse.

    Args:
        options: The options ``backbone.*``.
        backbone: The backbone that they give.
        optimizer: The settings of the optimiser.

    Raises:
        ValueError: If batch norm's statistics are to be kept, and the weights are random.
    """
    from_random = options.get("init", "random") == "random"
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    keeps = options.get("freeze_statistics") and norms
    if keeps and from_random:
        raise ValueError(
            "backbone.freeze_statistics: expected weights in backbone.init, got random, whose batch norm has seen no "
            "image; from random weights take pixpro.py with own_images_random.yaml, or add "
            "--backbone.freeze_statistics false"
        )
    if keeps and any(map(has_seen_nothing, norms)):
        log.warning(
            "backbone.freeze_statistics: batch norms of %s have seen no image (mean 0 and variance 1) and keep these "
            "values; take other weights, or add --backbone.freeze_statistics false",
            options.init,
        )
    if not from_random and isinstance(optimizer, LARS_RATES):
        log.warning(
            "optimizer: LARS at rates for random weights made pretrained ones worse wherever that was measured "
            "(docs/adapt.md); adapt.py goes on from pretrained CNNs, vit_posttrain.py from ViTs"
        )
