"""Pretraining recipes: a method a file."""
