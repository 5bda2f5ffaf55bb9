"""Coords as torchvision tv_tensors: where the pixels of a view lie in its source image."""

from densessl.coords._kernels import DenseCoords, ViewCoords
from densessl.coords._labels import MovingMask as MovingMask

__all__ = ["DenseCoords", "ViewCoords"]
