"""The pixel propagation module, and the ways in which it sums."""

from densessl.propagation.ppm import PPM, propagation_weights

__all__ = ["PPM", "propagation_weights"]
