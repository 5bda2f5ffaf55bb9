"""What frozen features are worth on dense tasks: four probes, each for any backbone and any stride.

A probe takes ``features``, a function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any
device; normalising the images is part of it.
"""

from densessl.evaluation.clustering import cluster_segmentation
from densessl.evaluation.correspondence import correspondence_accuracy
from densessl.evaluation.linear import linear_segmentation
from densessl.evaluation.neighbors import nearest_neighbor_segmentation

__all__ = [
    "cluster_segmentation",
    "correspondence_accuracy",
    "linear_segmentation",
    "nearest_neighbor_segmentation",
]
