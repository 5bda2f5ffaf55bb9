"""A tiny folder, a tiny file of weights and the command line on them, for the tests of the evaluation."""

import json
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from densessl.evaluation._command import main


def camvid_folder(root: Path) -> Path:
    """Four images to learn from and three to score, in CamVid's layout."""
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            labels = random.integers(0, 12, (4, 5), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            noise = random.integers(0, 20, (64, 80, 3))
            shades = (labels[..., None] * [20, 7, 11] + noise).astype(np.uint8)
            Image.fromarray(shades).save(root / "images" / split / f"{number}.png")
            Image.fromarray(labels).save(root / "labels" / split / f"{number}.png")
    return root


def resnet_file(path: Path) -> Path:
    """Random weights of a ResNet-18."""
    torch.manual_seed(3)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def run(folder: Path, weights: Path, out: Path, *options: str, protocols: str) -> int:
    """The command on the folder at 64 x 96 pixels; its exit code."""
    return main(
        ["--backbone", str(weights), "--data", f"camvid:{folder}", "--protocols", protocols, "--size", "64x96",
         "--layer", "layer1", "--out", str(out), "--device", "cpu", *options]
    )  # fmt: skip


def scores_of(out: Path) -> dict[str, dict[str, float]]:
    """The scores in a file of results, by protocol and data."""
    return {key: result["scores"] for key, result in json.loads(out.read_text())["results"].items()}
