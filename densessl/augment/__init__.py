"""Views with coords: drawn per image (torchvision v2), changed per batch (kornia); the published view pipelines."""

from densessl.augment.batch import BatchAugment
from densessl.augment.multichannel import multichannel_photometric, multichannel_views
from densessl.augment.multicrop import multicrop_photometric, multicrop_views
from densessl.augment.presets import (
    byol_photometric,
    byol_views,
    mocov2_photometric,
    mocov2_views,
    simclr_photometric,
    simclr_views,
)
from densessl.augment.views import MaskedView, MultiView, View

__all__ = [
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
]
