"""What knowing nothing but the place in the image scores: python -m benchmarks.place_alone --help.

Each pixel gets the class that the images to learn from have most often at its place. A score of features that is no
higher says nothing of what they see.
"""

from __future__ import annotations

import argparse

import torch

from densessl.evaluation._sources import parse_source
from densessl.evaluation.data import resized
from densessl.evaluation.matched import class_ious, overlap_of


def place_alone(fit: list[torch.Tensor], test: list[torch.Tensor], classes: int) -> float:
    """Mean intersection over union, 0..1, over the classes that occur in labels or answers.

    Args:
        fit: Labels to learn from, int64 ``(H, W)`` each, all of one size; what is no class is ignored.
        test: Labels to score on, in the same form and size.
        classes: Number of classes.
    """
    counts = torch.zeros(classes, *fit[0].shape, dtype=torch.int64)
    for labels in fit:
        for number in range(classes):
            counts[number] += labels == number
    guess = counts.argmax(0)
    known = [labels.masked_fill((labels < 0) | (labels >= classes), -1) for labels in test]
    return float(class_ious(sum(overlap_of(guess, labels, classes, classes) for labels in known)).nanmean())


def main() -> None:
    """Prints the score of the place alone, and how many images it was learnt from and scored on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--data", required=True, help="Kind and folder, as of python -m densessl.evaluation.")
    parser.add_argument("--size", default="240x320", help="Height and width of the labels in pixels, as HxW.")
    chosen = parser.parse_args()
    _, source, folder = parse_source(chosen.data)
    height, width = map(int, chosen.size.split("x"))
    splits = [source.open(folder, split) for split in (source.fit, source.test)]
    fit, test = (
        [data[index][1] for index in range(len(data))] for data in (resized(s, (height, width)) for s in splits)
    )
    score = place_alone(fit, test, splits[0].classes)
    print(f"place alone: mIoU {score:.4f}, {len(fit)} + {len(test)} images")


if __name__ == "__main__":
    main()
