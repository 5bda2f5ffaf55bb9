"""Composable parts for dense (pixel-level) self-supervised learning in PyTorch.

The names below are the library. They meet only through tensors: views carry coords, matchers turn two views' coords
into a mask, losses take two feature maps and a mask.
"""

from densessl.audit import TrackingReport, check_tracking
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
    simclr_photometric,
    simclr_views,
)
from densessl.backbone import FeatureMap
from densessl.coords import DenseCoords, ViewCoords
from densessl.ema import EMA
from densessl.geometry import (
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
from densessl.heads import MLP, ConvMLP
from densessl.losses import (
    InfoNCELoss,
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    MaskedInfoNCELoss,
    PixContrastLoss,
    PixProLoss,
    info_nce_loss,
    instance_consistency_loss,
    instance_contrast_loss,
    masked_info_nce_loss,
    pixcontrast_loss,
    pixpro_loss,
)
from densessl.matching import (
    DistanceMatcher,
    NearestMatcher,
    Pairs,
    feature_distance,
    gather_tokens,
    pairs_to_mask,
)
from densessl.multilevel import PerLevel, level_mean, level_sizes
from densessl.optim import LARS, param_groups
from densessl.propagation import PPM
from densessl.queue import KeyQueue
from densessl.regions import cell_labels, pool_regions, sample_labels
from densessl.tokens import map_to_tokens, tokens_to_map
from densessl.validity import cell_validity
from densessl.viewpairs import mean_over_view_pairs

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "LARS",
    "MLP",
    "PPM",
    "BatchAugment",
    "ConvMLP",
    "DenseCoords",
    "DistanceMatcher",
    "FeatureMap",
    "InfoNCELoss",
    "InstanceConsistencyLoss",
    "InstanceContrastLoss",
    "KeyQueue",
    "MaskedInfoNCELoss",
    "MaskedView",
    "MultiView",
    "NearestMatcher",
    "Pairs",
    "PerLevel",
    "PixContrastLoss",
    "PixProLoss",
    "TrackingReport",
    "View",
    "ViewCoords",
    "byol_photometric",
    "byol_views",
    "cell_centers",
    "cell_diagonal",
    "cell_distance",
    "cell_labels",
    "cell_validity",
    "check_tracking",
    "coords_from_boxes",
    "coords_from_kornia",
    "feature_distance",
    "gather_tokens",
    "info_nce_loss",
    "inside",
    "instance_consistency_loss",
    "instance_contrast_loss",
    "level_mean",
    "level_sizes",
    "map_to_tokens",
    "masked_info_nce_loss",
    "mean_over_view_pairs",
    "mocov2_photometric",
    "mocov2_views",
    "multichannel_photometric",
    "multichannel_views",
    "overlap_coords",
    "pairs_to_mask",
    "param_groups",
    "pixcontrast_loss",
    "pixpro_loss",
    "pool_regions",
    "relative_coords",
    "sample_labels",
    "simclr_photometric",
    "simclr_views",
    "tokens_to_map",
    "warp",
]
