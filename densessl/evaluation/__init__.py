"""What frozen features are worth on dense tasks, for any backbone and any stride.

The tensor functions are the exact part of the published protocols, on features that are already there. A probe takes
``features``, a function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device;
normalising the images is part of it.
"""

from densessl.evaluation._processes import alone
from densessl.evaluation.clustering import cluster_segmentation
from densessl.evaluation.correspondence import correspondence_accuracy
from densessl.evaluation.in_context import FAST, HUMMINGBIRD, HUMMINGBIRD_OPEN, InContext, in_context_segmentation
from densessl.evaluation.keypoint_pairs import SPAIR, KeypointPair, KeypointSettings, keypoint_correspondence
from densessl.evaluation.keypoints import KeypointAccuracy, keypoint_accuracy
from densessl.evaluation.label_propagation import propagate_labels
from densessl.evaluation.linear import DINOV3, LEOPART, LinearProbe, linear_overlaps, linear_segmentation
from densessl.evaluation.matched import matched_iou
from densessl.evaluation.neighbors import nearest_neighbor_segmentation
from densessl.evaluation.overclustering import (
    LEOPART_CLUSTERS,
    ClusterScore,
    OverclusterSettings,
    overcluster_segmentation,
)
from densessl.evaluation.patch import CAPI, PatchScores, PatchSettings, patch_probe
from densessl.evaluation.retrieval import rare_first_cells, retrieve_shares
from densessl.evaluation.shares import class_shares
from densessl.evaluation.store import StoredFeatures, shared_features, store_features
from densessl.evaluation.tokens import outlier_tokens, position_share, remove_position
from densessl.evaluation.video import DAVIS, VideoScores, VideoSettings, video_segmentation

__all__ = [
    "CAPI",
    "DAVIS",
    "DINOV3",
    "FAST",
    "HUMMINGBIRD",
    "HUMMINGBIRD_OPEN",
    "LEOPART",
    "LEOPART_CLUSTERS",
    "SPAIR",
    "ClusterScore",
    "InContext",
    "KeypointAccuracy",
    "KeypointPair",
    "KeypointSettings",
    "LinearProbe",
    "OverclusterSettings",
    "PatchScores",
    "PatchSettings",
    "StoredFeatures",
    "VideoScores",
    "VideoSettings",
    "alone",
    "class_shares",
    "cluster_segmentation",
    "correspondence_accuracy",
    "in_context_segmentation",
    "keypoint_accuracy",
    "keypoint_correspondence",
    "linear_overlaps",
    "linear_segmentation",
    "matched_iou",
    "nearest_neighbor_segmentation",
    "outlier_tokens",
    "overcluster_segmentation",
    "patch_probe",
    "position_share",
    "propagate_labels",
    "rare_first_cells",
    "remove_position",
    "retrieve_shares",
    "shared_features",
    "store_features",
    "video_segmentation",
]
