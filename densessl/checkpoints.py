"""Reads the backbone out of the files that pretraining leaves behind.

The published PixPro checkpoints, this library's, files of torchvision and timm, and detectors named as torchvision's.
Nothing that a file holds is ever run.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Where a query encoder lies in a file; the first that holds a backbone wins. The published PixPro checkpoints; this
# library's recipes, where backbone and projection head are items of one Sequential, or the backbone has two heads; MoCo
# and its relatives; OpenMMLab; a bare model.
_ROOTS = (
    *("module.encoder.", "encoder.0.", "encoder.backbone."),
    *("module.encoder_q.", "encoder.", "backbone.", "module.", ""),
)
CLASSIFIER = re.compile(r"(fc|head|heads|classifier)\.")
_PART = re.compile(r"backbone\.fpn\.|head\.(classification|regression)_head\.conv\.")
_WHY = tuple(
    (re.compile(pattern), why)
    for pattern, why in (
        (r"(module\.)?(target|\w+_k)\.", "momentum encoder: the query encoder is the one that transfers"),
        (
            r"rpn\.|roi_heads\.|neck\.|(rpn|bbox|mask|decode|auxiliary)_head\.",
            "part of a detector other than torchvision's FCOS",
        ),
        (r"(.*\.)?(cls_logits|bbox_reg|bbox_ctrness)\.", "predicts the classes and boxes of one data set"),
        (CLASSIFIER.pattern, "classifier"),
        ("", "serves pretraining only, such as projection head and predictor"),
    )
)


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        weights: the query encoder's backbone by the names of its own library: ``conv1.weight``,
            ``layer1.0.conv1.weight`` and so on for a ResNet, as in ``torchvision.models.resnet50``.
        parts: FPN and FCOS towers, named as in torchvision's ``fcos_resnet50_fpn`` (``backbone.fpn.*``,
            ``head.classification_head.conv.*``, ``head.regression_head.conv.*``); empty where there are none.
        dropped: name of every other entry in the file's state dict, with the reason.
    """

    weights: dict[str, Tensor]
    parts: dict[str, Tensor]
    dropped: dict[str, str]


def read_backbone(path: str | Path) -> Weights:
    """Reads the query encoder's backbone, on the CPU, by ``weights_only`` loading.

    Args:
        path: ``*.safetensors``, or under any other suffix what ``torch.save`` wrote: a state dict, or a dict that
            holds one as ``"state_dict"`` or ``"model"``.

    Raises:
        ValueError: if the file is missing or damaged, holds objects other than tensors and plain values, or no
            backbone.
        ImportError: on ``*.safetensors`` without that package.
    """
    path = Path(path)
    entries = _load(path)
    state = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    body, parts = "backbone.body.", {}
    found = next((root for root in _ROOTS if any(name.startswith(root + body) for name in state)), None)
    if found is not None:  # a detector
        inner = {name.removeprefix(found): name for name in state if name.startswith(found)}
        parts = {short: name for short, name in inner.items() if _PART.match(short)}
        kept = {short.removeprefix(body): name for short, name in inner.items() if short.startswith(body)}
    else:
        for root in _ROOTS:
            inner = {name.removeprefix(root): name for name in state if name.startswith(root)}
            # Every backbone has a convolution of more than one pixel, projection heads have none.
            if any(state[name].ndim == 4 and state[name].shape[-1] > 1 for name in inner.values()):
                found, kept = root, {short: name for short, name in inner.items() if not CLASSIFIER.match(short)}
                break
    if found is None:
        names = ", ".join(list(state)[:3]) or "none"
        raise ValueError(
            f"path: {path} holds no backbone: no spatial convolution among its {len(state)} tensors: {names}"
        )
    used = {*kept.values(), *parts.values()}
    return Weights(
        {short: state[name] for short, name in kept.items()},
        {short: state[name] for short, name in parts.items()},
        {name: _why(name, found) for name in entries if name not in used},
    )


def load_backbone(model: nn.Module, path: str | Path) -> Weights:
    """Loads a checkpoint's backbone into a torchvision or timm model, or into a ``FeatureMap`` of one.

    A classifier of the model stays as it is. Whole top modules that the model lacks are left out, such as ``layer4``
    where it was cut after ``layer3``.

    Args:
        model: changed in place.
        path: as for ``read_backbone``.

    Returns:
        What was loaded.

    Raises:
        ValueError: as ``read_backbone`` does, and if the file is of another architecture.
        ImportError: as ``read_backbone`` does.
    """
    read, own = read_backbone(path), model.state_dict()
    tops = {name.partition(".")[0] for name in own}
    fitting = {name: value for name, value in read.weights.items() if name.partition(".")[0] in tops}
    problem = misfit(fitting, {name: value for name, value in own.items() if not CLASSIFIER.match(name)})
    if problem is not None:
        raise ValueError(f"path: {path} does not fit the {type(model).__name__}: {problem}")
    model.load_state_dict(fitting, strict=False)
    left = {name: "the model has no such module" for name in read.weights if name not in fitting}
    return Weights(fitting, read.parts, read.dropped | left)


def load_parts(model: nn.Module, path: str | Path) -> Weights:
    """Loads a checkpoint's FPN and FCOS towers into a model that names them as ``fcos_resnet50_fpn`` does.

    Args:
        model: changed in place.
        path: as for ``read_backbone``.

    Returns:
        What was loaded, as ``parts``; nothing where the file holds none or the model has no place for them.

    Raises:
        ValueError: as ``read_backbone`` does, and if an entry has another shape than the model's.
        ImportError: as ``read_backbone`` does.
    """
    read, own = read_backbone(path), model.state_dict()
    fitting = {name: value for name, value in read.parts.items() if name in own}
    problem = misfit(fitting, {name: own[name] for name in fitting})
    if problem is not None:
        raise ValueError(f"path: {path} does not fit the {type(model).__name__}: {problem}")
    model.load_state_dict(fitting, strict=False)
    left = {name: f"not in the {type(model).__name__}" for name in read.parts if name not in fitting}
    return Weights({}, fitting, left)


def _load(path: Path) -> dict[str, Any]:
    """The file's state dict, out of whatever it is wrapped in."""
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors().load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # the published code saves its options so
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # each reader has errors of its own for damaged files, some without a text
        unsafe = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        if unsafe is not None:
            raise ValueError(f"path: {path} holds a {unsafe[1]}; only tensors and plain values load") from error
        detail = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise ValueError(f"path: {path} is no checkpoint, or is damaged ({detail})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"path: {path}: expected a dict of tensors, got {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def safetensors() -> Any:
    """The package, imported on use."""
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("files *.safetensors need that package: pip install 'densessl[export]'") from error


def _why(name: str, root: str) -> str:
    short = name.removeprefix(root)
    return next(why for pattern, why in _WHY if pattern.match(name) or pattern.match(short))


def misfit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first entry too much, of another shape or missing, in words; None if all fit.

    Counters of batches may be missing, or too many: older files and frozen norms have none, and nothing reads them.
    """
    for name, value in weights.items():
        if name not in expected and not name.endswith("num_batches_tracked"):
            return f"there is no place for entry {name!r}"
        if name in expected and value.shape != expected[name].shape:
            return f"entry {name!r} is {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
    missing = (name for name in expected if name not in weights and not name.endswith("num_batches_tracked"))
    first = next(missing, None)
    return None if first is None else f"entry {first!r} is missing"
