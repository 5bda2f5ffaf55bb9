"""Measurements: speed and memory of the parts, and studies of the methods."""
