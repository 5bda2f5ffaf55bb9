"""Draws moving scenes with exact optical flow, and writes them as a folder of frames with a folder of flow.

    python examples/quickstart/moving.py FOLDER --pairs 200

writes ``FOLDER/frames/00000/0.png``, ``.../1.png`` and ``FOLDER/flow/00000/0.flo``: where the pixels of frame 0 lie in
frame 1, unknown where they are hidden there. ``examples/pretrain/pixpro_video.py`` trains on the two folders.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.io import write_png

from examples.pretrain.common.data.flow import write_flow
from examples.quickstart.scenes import OBJECTS, SHAPES, TEXTURES, Plane, background, two_colours


class Frames(NamedTuple):
    """Two frames of a scene, and where the pixels of the first lie in the second.

    Attributes:
        first: The first frame, uint8 ``(3, size, size)``.
        second: The second frame, uint8 ``(3, size, size)``.
        flow: Optical flow, float32 ``(2, size, size)``, x and y in pixels, from the first frame to the second.
        visible: Tensor of bool ``(size, size)``; False where another object hides the pixel in the second frame.
    """

    first: Tensor
    second: Tensor
    flow: Tensor
    visible: Tensor


class _Pose(NamedTuple):
    """Where an object is: its centre and radius in sides of the frame, and its angle."""

    x: float
    y: float
    angle: float
    radius: float

    def moved(self, rng: np.random.Generator, shift: float, turn: float, zoom: float) -> _Pose:
        dx, dy = rng.uniform(-shift, shift, 2)
        scale = math.exp(rng.uniform(-zoom, zoom))
        return _Pose(self.x + dx, self.y + dy, self.angle + rng.uniform(-turn, turn), self.radius * scale)

    def inside(self, x: Plane, y: Plane) -> tuple[Plane, Plane]:
        """Positions in the frame to positions in the object, whose radius is 1."""
        dx, dy, cos, sin = x - self.x, y - self.y, math.cos(self.angle), math.sin(self.angle)
        return (dx * cos + dy * sin) / self.radius, (dy * cos - dx * sin) / self.radius

    def outside(self, along: Plane, across: Plane) -> tuple[Plane, Plane]:
        """The way back."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return (
            self.x + self.radius * (along * cos - across * sin),
            self.y + self.radius * (along * sin + across * cos),
        )


class _Object(NamedTuple):
    """What moves: a texture on a shape; its poses in both frames."""

    kind: int
    poses: tuple[_Pose, _Pose]
    period: float
    colours: tuple[Plane, Plane]
    seed: int

    def covers(self, x: Plane, y: Plane, frame: int) -> Plane:
        return SHAPES[OBJECTS[self.kind][1]](*self.poses[frame].inside(x, y))

    def colour(self, x: Plane, y: Plane, frame: int) -> Plane:
        along, across = (place / self.period for place in self.poses[frame].inside(x, y))
        texture, rng = OBJECTS[self.kind][0], np.random.default_rng(self.seed)
        # Grain is drawn pixel by pixel in a still scene; here it has to move with the object.
        share = _grain(along, across, rng) if texture == "grain" else TEXTURES[texture](along, across, rng)
        return self.colours[0] * (1 - share) + self.colours[1] * share


def _grain(u: Plane, v: Plane, rng: np.random.Generator) -> Plane:
    table = rng.random((64, 64))
    return table[np.floor(8 * v).astype(int) % 64, np.floor(8 * u).astype(int) % 64]


def draw_frames(seed: int, index: int, size: int = 96) -> Frames:
    """Draws two frames of one scene, a function of (seed, index) alone.

    Args:
        seed: Of the collection.
        index: Of the scene in it, at least 0.
        size: Side in pixels.
    """
    rng = np.random.default_rng((seed, index, 1))  # other scenes than the still ones
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    whole = _Pose(0.5, 0.5, 0.0, 1.0)
    camera = whole, whole.moved(rng, 0.05, 0.1, 0.08)
    behind = int(rng.integers(2**32))
    objects = [_drawn(rng) for _ in range(rng.integers(4, 8))]
    frames = []
    for frame in range(2):
        image = background(*camera[frame].inside(x, y), np.random.default_rng(behind))
        for thing in objects:
            where = thing.covers(x, y, frame)
            image[:, where] = thing.colour(x, y, frame)[:, where]
        image = image + rng.normal(0, 0.02, image.shape)
        frames.append(torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)))
    there = camera[1].outside(*camera[0].inside(x, y))
    top = np.full(x.shape, -1)
    for number, thing in enumerate(objects):
        where = thing.covers(x, y, 0)
        moved = thing.poses[1].outside(*thing.poses[0].inside(x, y))
        there = tuple(np.where(where, new, old) for new, old in zip(moved, there, strict=True))
        top[where] = number
    visible = np.ones(x.shape, bool)
    for number, thing in enumerate(objects):
        visible &= ~(thing.covers(*there, 1) & (number > top))
    flow = np.stack([there[0] - x, there[1] - y]) * size
    return Frames(*frames, torch.from_numpy(flow).float(), torch.from_numpy(visible))


def _drawn(rng: np.random.Generator) -> _Object:
    pose = _Pose(*rng.uniform(0.05, 0.95, 2), rng.uniform(0, 2 * math.pi), rng.uniform(0.14, 0.26))
    period = rng.uniform(0.06, 0.09) / pose.radius
    poses = pose, pose.moved(rng, 0.12, 0.5, 0.2)
    return _Object(int(rng.integers(len(OBJECTS))), poses, period, two_colours(rng), int(rng.integers(2**32)))


def write_frames(folder: Path, pairs: int, seed: int = 0, size: int = 96) -> None:
    """Writes ``frames`` and ``flow`` below a folder, a sub-folder a scene."""
    for index in range(pairs):
        drawn = draw_frames(seed, index, size)
        frames, flow = folder / "frames" / f"{index:05}", folder / "flow" / f"{index:05}"
        for path in (frames, flow):
            path.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate((drawn.first, drawn.second)):
            write_png(image, str(frames / f"{number}.png"))
        write_flow(flow / "0.flo", torch.where(drawn.visible, drawn.flow, torch.nan))


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the folders that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder to write to.")
    parser.add_argument("--pairs", type=int, default=200, help="Number of pairs of frames (%(default)s).")
    parser.add_argument("--size", type=int, default=96, help="Side of the frames in pixels (%(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the scenes (%(default)s).")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.size < 1:
        parser.error(f"--pairs, --size: expected at least 1, got {args.pairs} and {args.size}")
    write_frames(args.folder, args.pairs, args.seed, args.size)


if __name__ == "__main__":
    main()
