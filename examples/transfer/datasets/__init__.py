"""Labelled data sets: boxes, masks and classes, checked before the first step."""
