"""The options of the quickstart's command line, and what its help says of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

TIME = """\
The defaults, 2 seeds of 500 steps of 32 images, take 2 to 3 minutes on two free CPU cores. The time of
training is about proportional to --seeds, --steps and --batch-size; a larger --size takes longer as well."""


def make_parser(description: str | None, methods: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, without the checks of values.

    Args:
        description: What the program does, as it is printed above the options.
        methods: Names for ``--method``.
    """
    parser = argparse.ArgumentParser(
        description=description, epilog=TIME, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="Folder of photos to train on, which is searched with its sub-folders. "
        "Without it the program trains on scenes that it draws.")  # fmt: skip
    add("--probe-data", metavar="FOLDER", help="Folder of labelled images for the linear probe. It holds photos in "
        "images/train and images/test, and in labels/train and labels/test a PNG of the same name and size for each, "
        "whose grey values are class numbers: 0 to 10, and 11 or 255 where a pixel is ignored, as in CamVid. All "
        "images have one size. Without it drawn scenes are the labelled images, or with --data the score is the share "
        "of points found again in warped photos, which needs no labels.")  # fmt: skip
    add("--method", choices=tuple(methods), default="pixpro+instance", help="What is trained: pixpro compares cells "
        "that show the same place, pixcontrast also pushes other cells away, and pixpro+instance adds a loss between "
        "whole images to pixpro (default: %(default)s).")  # fmt: skip
    add("--steps", type=int, default=500, help="Number of training steps of each seed, at least 1 (default: "
        "%(default)s).")  # fmt: skip
    add("--batch-size", type=int, default=32, help="Number of images in a step, at least 2 (default: %(default)s).")
    add("--size", type=int, default=64, help="Side of the square views in pixels, at least 9: a cell of the feature "
        "map stands for 8 x 8 pixels, and one cell alone cannot be trained (default: %(default)s).")  # fmt: skip
    add("--lr", type=float, default=1.0, help="Highest learning rate of the optimiser LARS, above 0 (default: "
        "%(default)s).")  # fmt: skip
    add("--seeds", type=int, default=2, help="Number of runs, each with another seed, from which the report takes "
        "the spread; at least 1 (default: %(default)s).")  # fmt: skip
    add("--images", type=int, default=2000, help="With --data, at most so many photos are read; without it, so "
        "many scenes are drawn. At least 1 (default: %(default)s).")  # fmt: skip
    add("--probe-images", type=int, default=200, help="Number of drawn scenes that the probe learns from, and as many "
        "others that it is scored on; at least 1. It has no effect with --data or --probe-data (default: "
        "%(default)s).")  # fmt: skip
    add("--out", type=Path, default=Path("runs/quickstart"), help="Folder that the report, the figures and the "
        "backbone are written to (default: %(default)s).")  # fmt: skip
    return parser
