"""The pixel propagation module, and the roads by which it sums."""

from densessl.propagation.ppm import PPM, propagation_weights

__all__ = ["PPM", "propagation_weights"]
