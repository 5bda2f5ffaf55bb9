"""Composable parts for dense (pixel-level) self-supervised learning in PyTorch.

The names below are the library, in the order of a pipeline. They meet only through tensors: views carry coords,
matchers turn the coords of two views into a mask, and losses take two feature maps and a mask. Beside them stand
``densessl.metrics``, ``densessl.plots``, ``densessl.evaluation``, ``densessl.checkpoints``, ``densessl.export`` and
``densessl.hub``.
"""

# Views
from densessl.augment import (
    BatchAugment,
    MaskedView,
    MultiView,
    View,
    byol_photometric,
    byol_views,
    mocov2_photometric,
    mocov2_views,
    multichannel_photometric,
    multichannel_views,
    multicrop_photometric,
    multicrop_views,
    simclr_photometric,
    simclr_views,
)
from densessl.coords import (
    DenseCoords,
    ViewCoords,
    coords_from_depth,
    coords_from_disparity,
    coords_from_flow,
    coords_from_points,
)
from densessl.geometry import (
    align,
    cell_centers,
    cell_diagonal,
    cell_distance,
    coords_from_boxes,
    coords_from_kornia,
    inside,
    overlap_coords,
    relative_coords,
    warp,
)
from densessl.block_mask import BlockMask
from densessl.tracking import TrackingReport, check_tracking
from densessl.masks import cell_labels, cell_validity, pool_regions, same_region, sample_labels

# Matching
from densessl.matching import DistanceMatcher, NearestMatcher, Pairs, feature_distance, gather_tokens, pairs_to_mask

# Backbone and heads
from densessl.backbone import FeatureMap, MaskToken
from densessl.features import map_to_tokens, tokens_to_map
from densessl.heads import MLP, ConvMLP, PrototypeHead

# Propagation
from densessl.propagation import PPM

# Target
from densessl.ema import EMA
from densessl.queue import KeyQueue

# Losses
from densessl.losses import (
    GramLoss,
    InfoNCELoss,
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    KernelAlignmentLoss,
    MaskedInfoNCELoss,
    NeighborOrderLoss,
    PixContrastLoss,
    PixProLoss,
    PrototypeLoss,
    gram_loss,
    info_nce_loss,
    instance_consistency_loss,
    instance_contrast_loss,
    kernel_alignment_loss,
    masked_info_nce_loss,
    neighbor_order_loss,
    pixcontrast_loss,
    pixpro_loss,
    prototype_loss,
)

# Levels
from densessl.multilevel import PerLevel, level_mean, level_sizes

# Tools
from densessl.optim import LARS, param_groups

__version__ = "0.1.0"

__all__ = [
    # Views
    "BatchAugment",
    "MaskedView",
    "MultiView",
    "View",
    "byol_photometric",
    "byol_views",
    "mocov2_photometric",
    "mocov2_views",
    "multichannel_photometric",
    "multichannel_views",
    "multicrop_photometric",
    "multicrop_views",
    "simclr_photometric",
    "simclr_views",
    "DenseCoords",
    "ViewCoords",
    "coords_from_depth",
    "coords_from_disparity",
    "coords_from_flow",
    "coords_from_points",
    "align",
    "cell_centers",
    "cell_diagonal",
    "cell_distance",
    "coords_from_boxes",
    "coords_from_kornia",
    "inside",
    "overlap_coords",
    "relative_coords",
    "warp",
    "BlockMask",
    "TrackingReport",
    "check_tracking",
    "cell_labels",
    "cell_validity",
    "pool_regions",
    "same_region",
    "sample_labels",
    # Matching
    "DistanceMatcher",
    "NearestMatcher",
    "Pairs",
    "feature_distance",
    "gather_tokens",
    "pairs_to_mask",
    # Backbone and heads
    "FeatureMap",
    "MaskToken",
    "map_to_tokens",
    "tokens_to_map",
    "MLP",
    "ConvMLP",
    "PrototypeHead",
    # Propagation
    "PPM",
    # Target
    "EMA",
    "KeyQueue",
    # Losses
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
    # Levels
    "PerLevel",
    "level_mean",
    "level_sizes",
    # Tools
    "LARS",
    "param_groups",
]
