"""Losses: query and key features and a mask in, a scalar out."""

from densessl.losses.info_nce import InfoNCELoss, info_nce_loss
from densessl.losses.instance import (
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    instance_consistency_loss,
    instance_contrast_loss,
)
from densessl.losses.masked_info_nce import MaskedInfoNCELoss, masked_info_nce_loss
from densessl.losses.pixcontrast import PixContrastLoss, pixcontrast_loss
from densessl.losses.pixpro import PixProLoss, pixpro_loss

__all__ = [
    "InfoNCELoss",
    "InstanceConsistencyLoss",
    "InstanceContrastLoss",
    "MaskedInfoNCELoss",
    "PixContrastLoss",
    "PixProLoss",
    "info_nce_loss",
    "instance_consistency_loss",
    "instance_contrast_loss",
    "masked_info_nce_loss",
    "pixcontrast_loss",
    "pixpro_loss",
]
