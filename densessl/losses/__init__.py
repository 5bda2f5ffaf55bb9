"""Dense losses: each takes the features of query and key and a mask of positive pairs, and returns a scalar."""

from densessl.losses.gram import GramLoss, gram_loss
from densessl.losses.info_nce import InfoNCELoss, info_nce_loss
from densessl.losses.instance import (
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    instance_consistency_loss,
    instance_contrast_loss,
)
from densessl.losses.kernel_alignment import KernelAlignmentLoss, kernel_alignment_loss
from densessl.losses.masked_info_nce import MaskedInfoNCELoss, masked_info_nce_loss
from densessl.losses.neighbor_order import NeighborOrderLoss, neighbor_order_loss
from densessl.losses.pixcontrast import PixContrastLoss, pixcontrast_loss
from densessl.losses.pixpro import PixProLoss, pixpro_loss
from densessl.losses.prototype import PrototypeLoss, prototype_loss

__all__ = [
    "GramLoss",
    "InfoNCELoss",
    "InstanceConsistencyLoss",
    "InstanceContrastLoss",
    "KernelAlignmentLoss",
    "MaskedInfoNCELoss",
    "NeighborOrderLoss",
    "PixContrastLoss",
    "PixProLoss",
    "PrototypeLoss",
    "gram_loss",
    "info_nce_loss",
    "instance_consistency_loss",
    "instance_contrast_loss",
    "kernel_alignment_loss",
    "masked_info_nce_loss",
    "neighbor_order_loss",
    "pixcontrast_loss",
    "pixpro_loss",
    "prototype_loss",
]
