"""Coords as torchvision tv_tensors: where the pixels of a view lie in its source image."""

from densessl.coords._kernels import DenseCoords, ViewCoords

__all__ = ["DenseCoords", "ViewCoords"]
