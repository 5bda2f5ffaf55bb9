"""Where the pixels of a view lie in its source image: tv_tensors that follow transforms, and coords from elsewhere."""

from densessl.coords._kernels import DenseCoords, ViewCoords
from densessl.coords._labels import MovingMask as MovingMask
from densessl.coords.sources import coords_from_depth, coords_from_disparity, coords_from_flow, coords_from_points

__all__ = [
    "DenseCoords",
    "ViewCoords",
    "coords_from_depth",
    "coords_from_disparity",
    "coords_from_flow",
    "coords_from_points",
]
