"""Procedurally drawn scenes with pixel labels: something to learn from without a download.

A class is a texture on a shape. Colours, positions, sizes, orientations and backgrounds are drawn at random, so colour
is no cue. A scene is a function of (seed, index) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Plane = np.ndarray
Pattern = Callable[[Plane, Plane, np.random.Generator], Plane]

# Textures: u and v run along and across the object, in periods; each returns how much of the second colour, 0..1.
TEXTURES: dict[str, Pattern] = {
    "stripes": lambda u, v, rng: u % 1 < 0.5,
    "checks": lambda u, v, rng: (np.floor(u) + np.floor(v)) % 2,
    "dots": lambda u, v, rng: np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3,
    "zigzag": lambda u, v, rng: (u + np.abs(v % 2 - 1)) % 1 < 0.5,
    "bricks": lambda u, v, rng: ((u / 2 + np.floor(v) / 2) % 1 < 0.1) | (v % 1 < 0.2),
    "waves": lambda u, v, rng: 0.5 + 0.5 * np.sin(2 * math.pi * (u / 2 + 0.4 * np.sin(math.pi * v))),
    "grain": lambda u, v, rng: rng.random(u.shape),
    "plain": lambda u, v, rng: np.zeros_like(u),
}
# Shapes: x and y in the object's own frame, radius 1; each returns where the object is.
SHAPES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disc": lambda x, y: np.hypot(x, y) < 0.95,
    "box": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.85,
    "triangle": lambda x, y: (y < 0.6) & (np.abs(x) * 1.7 < y + 1),
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.4) & (np.maximum(np.abs(x), np.abs(y)) < 1),
}
OBJECTS = (
    ("stripes", "disc"),
    ("checks", "box"),
    ("dots", "triangle"),
    ("zigzag", "cross"),
    ("bricks", "disc"),
    ("waves", "box"),
    ("grain", "triangle"),
    ("plain", "cross"),
)
CLASSES = ("background", *(f"{texture} {shape}" for texture, shape in OBJECTS))


def draw_scene(seed: int, index: int, size: int = 96) -> tuple[Tensor, Tensor]:
    """Draws one scene.

    Args:
        seed: Seed of the collection.
        index: Number of the scene in the collection, at least 0.
        size: Side of a scene in pixels.

    Returns:
        Image, uint8 ``(3, size, size)``; labels, int64 ``(size, size)``, an index into ``CLASSES``.
    """
    rng = np.random.default_rng((seed, index))
    y, x = np.mgrid[:size, :size] / size
    image = background(x, y, rng)
    labels = np.zeros((size, size), dtype=np.int64)
    for _ in range(rng.integers(4, 8)):
        kind = int(rng.integers(len(OBJECTS)))
        texture, shape = OBJECTS[kind]
        angle, radius = rng.uniform(0, 2 * math.pi), rng.uniform(0.14, 0.26)
        dx, dy = x - rng.uniform(0.05, 0.95), y - rng.uniform(0.05, 0.95)
        along = (dx * math.cos(angle) + dy * math.sin(angle)) / radius
        across = (dy * math.cos(angle) - dx * math.sin(angle)) / radius
        period = rng.uniform(0.06, 0.09) / radius
        share = TEXTURES[texture](along / period, across / period, rng)[None]
        first, second = two_colours(rng)
        where = SHAPES[shape](along, across)
        image[:, where] = (first * (1 - share) + second * share)[:, where]
        labels[where] = kind + 1
    image += rng.normal(0, 0.02, image.shape)
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)), torch.from_numpy(labels)


def background(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Slow waves between two colours."""
    share = np.zeros_like(x)
    for _ in range(4):
        angle, frequency = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 2.5)
        wave = frequency * (x * math.cos(angle) + y * math.sin(angle)) + rng.uniform(0, 1)
        share += np.sin(2 * math.pi * wave) / 8
    first, second = two_colours(rng)
    return first * (0.5 - share) + second * (0.5 + share)


def two_colours(rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Two colours (3, 1, 1) that can be told apart."""
    while True:
        pair = rng.random((2, 3, 1, 1))
        if np.abs(pair[0] - pair[1]).sum() > 0.9:
            return pair[0], pair[1]


class Scenes(Dataset):
    """A collection of scenes, drawn on access.

    Args:
        length: Number of scenes.
        seed: Seed of the collection; different seeds give different scenes.
        size: Side of a scene in pixels.
    """

    def __init__(self, length: int, seed: int = 0, size: int = 96) -> None:
        self.length, self.seed, self.size = length, seed, size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image, uint8 ``(3, size, size)``, and labels, int64 ``(size, size)``."""
        if not 0 <= index < self.length:
            raise IndexError(f"index: expected 0..{self.length - 1}, got {index}")
        return draw_scene(self.seed, index, self.size)
