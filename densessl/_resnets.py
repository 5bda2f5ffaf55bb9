"""Finds the torchvision ResNet that weights belong to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
import torchvision
from torch import Tensor

from densessl._mismatch import misfit
from densessl.checkpoints import CLASSIFIER

NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # in the order in which they run


def expected_of(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The entries of a torchvision ResNet for as many input channels as the weights take."""
    expected = dict(_entries(name))
    if "conv1.weight" in weights and weights["conv1.weight"].ndim == 4:
        shape = expected["conv1.weight"].shape
        expected["conv1.weight"] = torch.empty((shape[0], weights["conv1.weight"].shape[1], *shape[2:]), device="meta")
    return expected


def cut_from(weights: Mapping[str, Tensor]) -> tuple[list[str], str]:
    """The ResNets whose first stages these weights are, by name, and the last stage that they hold.

    ResNets of several depths begin alike, so there may be more than one name. Whole ResNets and other networks give no
    name and an empty stage.
    """
    tops = {name.partition(".")[0] for name in weights}
    last = PARTS[len(tops) - 1] if 3 <= len(tops) < len(PARTS) else ""
    if not last or tops != set(PARTS[: len(tops)]):
        return [], ""
    found = []
    for name in NAMES:
        begins = {key: value for key, value in expected_of(weights, name).items() if key.partition(".")[0] in tops}
        if misfit(weights, begins) is None:
            found.append(name)
    return found, last


@lru_cache
def _entries(name: str) -> Mapping[str, Tensor]:
    with torch.device("meta"):  # shapes, no values
        model = torchvision.models.get_model(name, weights=None)
    return {key: value for key, value in model.state_dict().items() if not CLASSIFIER.match(key)}
