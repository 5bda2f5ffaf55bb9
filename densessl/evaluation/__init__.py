"""What frozen features are worth on dense tasks, for any backbone and any stride.

The tensor functions are the exact part of the published protocols, on features that are already there. A probe takes
``features``, a function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device;
normalising the images is part of it.
"""

from densessl.evaluation.clustering import cluster_segmentation
from densessl.evaluation.correspondence import correspondence_accuracy
from densessl.evaluation.in_context import FAST, HUMMINGBIRD, HUMMINGBIRD_OPEN, InContext, in_context_segmentation
from densessl.evaluation.keypoints import KeypointAccuracy, keypoint_accuracy
from densessl.evaluation.label_propagation import propagate_labels
from densessl.evaluation.linear import linear_segmentation
from densessl.evaluation.matched import matched_iou
from densessl.evaluation.neighbors import nearest_neighbor_segmentation
from densessl.evaluation.retrieval import rare_first_cells, retrieve_shares
from densessl.evaluation.shares import class_shares
from densessl.evaluation.tokens import outlier_tokens, position_share, remove_position

__all__ = [
    "FAST",
    "HUMMINGBIRD",
    "HUMMINGBIRD_OPEN",
    "InContext",
    "KeypointAccuracy",
    "class_shares",
    "cluster_segmentation",
    "correspondence_accuracy",
    "in_context_segmentation",
    "keypoint_accuracy",
    "linear_segmentation",
    "matched_iou",
    "nearest_neighbor_segmentation",
    "outlier_tokens",
    "position_share",
    "propagate_labels",
    "rare_first_cells",
    "remove_position",
    "retrieve_shares",
]
