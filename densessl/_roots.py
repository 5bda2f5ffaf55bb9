"""Finds the backbones in a file by how their own names begin, whatever stands before these names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from densessl._naming import from_detectron2, from_huggingface, from_sequential
from densessl._reading import clean

# The first module of a backbone in torchvision, timm, detectron2, transformers and the published ConvNeXt.
_STEM = re.compile(
    r"conv_?[01]|conv_stem|stem\w*|patch_embeds?\d*|pixel_embed|embeds|base_layer|layer0|features|conv_proj"
    r"|[Cc]onv2d_1a\w*|downsample_layers|embedder|embeddings|body"
)
# Modules inside a backbone or a head: what lies below them is no backbone of its own.
_INNER = re.compile(
    r"bn\d|(layer|block|stage|level)s?_?\d*|encoder_layer\w*|decoder|neck|rpn|roi_heads|\w+_head|res[2-5]"
)
_MOMENTUM = re.compile(r"target\w*|momentum\w*|\w+_(momentum|target|k|ema)|ema|ema_\w+|key_\w+")
_LIBRARY = re.compile(r"(module\.|method\.)*encoder(_q)?\.")
# For backbones with a first module of another name: this library's recipes, MoCo and its relatives, OpenMMLab.
_USUAL = re.compile(r"(module\.|method\.)*(encoder\.0\.|encoder\.backbone\.|encoder_q\.|encoder\.|backbone\.)?")


class Root(NamedTuple):
    """A backbone in a file.

    Attributes:
        prefix: What stands before the backbone's names, with the dot at the end; may be empty.
        names: For everything below the prefix, the name in the backbone's own library mapped to the name in the file.
            For a ResNet this is torchvision's name, even if the file uses detectron2's or transformers' names, or
            counts.
    """

    prefix: str
    names: dict[str, str]


def is_momentum(name: str) -> bool:
    """Whether a name lies in a moving average of the trained network."""
    return any(_MOMENTUM.fullmatch(part) for part in name.split("."))


def spatial(value: Tensor) -> bool:
    """Whether a tensor is a convolution of more than one pixel: every backbone has one, projection heads have none."""
    return value.ndim == 4 and value.shape[-1] > 1


def find_roots(state: Mapping[str, Tensor]) -> list[Root]:
    """All backbones of a state dict, in its order.

    Args:
        state: Tensors by their cleaned names.
    """
    prefixes: dict[str, bool] = {}  # each prefix, and whether its modules are counted
    for name, value in state.items():
        parts = name.split(".")
        if name.endswith("4.0.conv1.weight") and (len(name) == 16 or name[-17] == "."):
            prefix = name[:-16]
            stem = state.get(f"{prefix}0.weight")
            if stem is not None and spatial(stem) and f"{prefix}1.running_mean" in state:
                prefixes[prefix] = True
        at = next((i for i in range(len(parts)) if _within(parts, i)), None)
        if at is not None and _STEM.fullmatch(parts[at]) and spatial(value):
            prefixes.setdefault("".join(f"{part}." for part in parts[:at]), False)
    outermost = [p for p in prefixes if not any(p != other and p.startswith(other) for other in prefixes)]
    if not outermost:
        usual = [_usual(name) for name, value in state.items() if spatial(value) and not is_momentum(name)]
        outermost = sorted(set(usual), key=len)[-1:]
    return [_root(state, prefix, prefixes.get(prefix, False)) for prefix in outermost]


def roots_of_model(state: Mapping[str, Tensor], own: Sequence[str]) -> list[Root]:
    """All places of a state dict where at least half of a model's names are.

    Args:
        state: Tensors by their cleaned names.
        own: The model's cleaned names.
    """
    prefixes: dict[str, None] = {}
    for anchor in own[:8]:
        for name in state:
            if name == anchor or name.endswith(f".{anchor}"):
                prefixes[name[: len(name) - len(anchor)]] = None
    enough = [p for p in prefixes if 2 * sum(f"{p}{name}" in state for name in own) >= len(own)]
    return [Root(prefix, _below(state, prefix)) for prefix in enough]


def choose(roots: Sequence[Root], wanted: str | None, path: object) -> list[Root]:
    """The roots that are meant: those at or below ``wanted``, or if that is None, the trained ones.

    Raises:
        ValueError: If there is no backbone at or below ``wanted``.
    """
    if wanted is not None:
        start = clean(f"{wanted.rstrip('.')}.") if wanted else ""
        exact = [root for root in roots if root.prefix == start]
        below = exact or [root for root in roots if start and root.prefix.startswith(start)]
        if not below:
            raise ValueError(f"root: expected one of {listed(roots)} of {path}, got {wanted!r}")
        roots = below
    online = [root for root in roots if not is_momentum(root.prefix)] or list(roots)
    library = [root for root in online if _LIBRARY.match(root.prefix)]
    return library if len(library) == 1 else online


def only(roots: Sequence[Root], path: object) -> Root:
    """The single root.

    Raises:
        ValueError: If there are several; the message names them.
    """
    if len(roots) > 1:
        raise ValueError(
            f"path: {path} holds {len(roots)} backbones, {listed(roots)}: choose one, as in root={roots[-1].prefix!r}"
        )
    return roots[0]


def listed(roots: Sequence[Root]) -> str:
    """The prefixes in words."""
    return ", ".join(dict.fromkeys(repr(root.prefix) for root in roots)) or "none"


def elsewhere(state: Mapping[str, Tensor], entry: str, root: Root) -> str | None:
    """The name under which an entry that a root lacks lies elsewhere in the file."""
    for name in state:
        prefix = name.removesuffix(entry)
        if prefix in (name, root.prefix) or prefix[-1:] not in ("", "."):
            continue
        between = prefix.removeprefix(root.prefix).split(".")
        if not any(_within(between, index) for index in range(len(between))):  # as against another block's entry
            return name
    return None


def _within(parts: Sequence[str], index: int) -> bool:
    part = parts[index]
    if part == "body" and index and parts[index - 1] == "backbone":  # torchvision's detectors
        return False
    return bool(_STEM.fullmatch(part) or _INNER.fullmatch(part))


def _usual(name: str) -> str:
    found = _USUAL.match(name)
    return found[0] if found else ""


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}


def _root(state: Mapping[str, Tensor], prefix: str, counted: bool) -> Root:
    names = _below(state, prefix)
    if counted:
        names = {from_sequential(short): name for short, name in names.items()}
    elif "stem.conv1.weight" in names and any(short.startswith("res2.") for short in names):
        names = {from_detectron2(short): name for short, name in names.items()}
    elif "embedder.embedder.convolution.weight" in names:
        names = {from_huggingface(short): name for short, name in names.items()}
    return Root(prefix, names)
