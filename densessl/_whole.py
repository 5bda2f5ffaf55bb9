"""Judges whether weights are those of a whole network when there is no model to compare them with."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_STAGE = re.compile(r"layer([1-4])\.(\d+)\.(.+)")
_NORM = re.compile(r"(.*\.|)(bn(\d)|downsample\.1)\.(weight|bias|running_mean|running_var)")
_PLAIN = re.compile(r"(conv1|bn1|layer[1-4]\.\d+\.(conv[123]|bn[123]|downsample\.[01]))\.\w+")


def is_whole(weights: Mapping[str, Tensor]) -> bool:
    """Whether a backbone can be whole.

    Networks with other names than a ResNet's are accepted as they are: only their own library can judge them. In a
    plain ResNet, including ones that torchvision does not have such as timm's ``resnet26``, all stages and blocks must
    be there, all blocks must be built alike, and norms must be as wide as the convolutions before them.

    Args:
        weights: Weights under the names of the backbone's own library.
    """
    if not all(_PLAIN.fullmatch(name) for name in weights):
        return True
    blocks: dict[tuple[int, int], set[str]] = {(0, 0): {n for n in weights if not n.startswith("layer")}}
    for name in weights:
        if found := _STAGE.fullmatch(name):
            blocks.setdefault((int(found[1]), int(found[2])), set()).add(found[3])
    counts = [len([block for stage, block in blocks if stage == number]) for number in (1, 2, 3, 4)]
    if not all(counts) or any(block >= counts[stage - 1] for stage, block in blocks if stage):
        return False
    stem = {"conv1.weight", *(f"bn1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var"))}
    plain = [{n for n in names if "downsample" not in n} for key, names in blocks.items() if key != (0, 0)]
    if not stem <= blocks[0, 0] or any(names != plain[0] for names in plain):
        return False
    return all(_as_wide(weights, found) for name in weights if (found := _NORM.fullmatch(name)))


def _as_wide(weights: Mapping[str, Tensor], norm: re.Match[str]) -> bool:
    before = f"{norm[1]}conv{norm[3]}.weight" if norm[3] else f"{norm[1]}downsample.0.weight"
    return before in weights and weights[norm[0]].shape == weights[before].shape[:1]
