"""Reads the backbone out of the files that pretraining leaves behind.

It reads the published checkpoints of PixPro, MoCo, VICReg, SwAV, DINO and BYOL, this library's own, files of
torchvision, timm, transformers, detectron2 and OpenMMLab, and detectors named as torchvision's. Nothing that a file
holds is ever run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from densessl._mismatch import differences, misfit, missing
from densessl._reading import clean, read_entries
from densessl._roots import Root, choose, elsewhere, find_roots, is_momentum, listed, only, roots_of_model

CLASSIFIER = re.compile(r"(fc|head|heads|classifier|head_dist|aux_head|classif|last_linear)\.")
# In timm, these are kept with num_classes=0.
_BEFORE_CLASSIFIER = re.compile(r"head\.(norm|in_conv|pre_logits|pre_classifier|last_conv|fc1|classifier\.[01])\.")
_PRETRAINING = re.compile(r"(project|proto|predict|proj_|dino_|ibot_|mlp_head|queue)\w*(\.|$)")
_BODY = "backbone.body."
_PART = re.compile(r"backbone\.fpn\.|head\.(classification|regression)_head\.conv\.")
_WHY = (
    (
        r"rpn\.|roi_heads\.|neck\.|(rpn|bbox|mask|decode|auxiliary)_head\.",
        "part of a detector other than torchvision's FCOS",
    ),
    (r"(.*\.)?(cls_logits|bbox_reg|bbox_ctrness)\.", "predicts the classes and boxes of one data set"),
    (CLASSIFIER, "classifier"),
    ("", "serves pretraining only, such as projection head and predictor"),
)


class Weights(NamedTuple):
    """What a file holds.

    Attributes:
        weights: The backbone's weights under the names of its own library. For a ResNet these are the names of
            ``torchvision.models.resnet50`` (``conv1.weight``, ``layer1.0.conv1.weight``), even if the file uses
            detectron2's or transformers' names, or counts its modules as ``nn.Sequential`` does.
        parts: Weights of FPN and FCOS towers, named as in torchvision's ``fcos_resnet50_fpn`` (``backbone.fpn.*``,
            ``head.classification_head.conv.*``, ``head.regression_head.conv.*``); empty if there are none.
        dropped: Name of every other entry in the file's state dict, with the reason why it was left out.

    Examples:
        >>> sorted(read_backbone("checkpoint.pth").dropped)
        ['fc.bias', 'fc.weight']
    """

    weights: dict[str, Tensor]
    parts: dict[str, Tensor]
    dropped: dict[str, str]


class _File(NamedTuple):
    """A file's entries.

    Attributes:
        path: The file, for messages.
        state: Tensors by their cleaned names.
        origin: For every entry, its cleaned name mapped to its name in the file.
    """

    path: Path
    state: dict[str, Tensor]
    origin: dict[str, str]


def read_backbone(path: str | Path, root: str | None = None) -> Weights:
    """Reads the trained encoder's backbone, on the CPU, by ``weights_only`` loading.

    The backbone is found by its own names, whatever stands before them. If a file holds the trained network and its
    moving average (``target``, ``momentum_encoder``, ``encoder_k``), the trained one is read.

    Args:
        path: A ``*.safetensors`` file, detectron2's ``*.pkl``, or under any other suffix a file that ``torch.save``
            wrote: a state dict, or a dict that holds one, under ``"state_dict"``, ``"model"`` or another name.
        root: What stands before the backbone's names, for instance ``"teacher"`` or ``"teacher.backbone."``; None means
            the only backbone in the file.

    Raises:
        ValueError: If the file is missing or damaged; if it is refused because it holds objects other than tensors and
            plain values; or if it holds no backbone, or several, which the message names.
        ImportError: If the file is ``*.safetensors`` and that package is not installed.

    Examples:
        >>> "layer4.1.conv2.weight" in read_backbone("checkpoint.pth").weights
        True
    """
    file = _read(path, root)
    roots = find_roots(file.state)
    if not roots:
        raise _no_backbone(file)
    return _weights(file, only(choose(roots, root, path), path), roots)


def load_backbone(model: nn.Module, path: str | Path, root: str | None = None, *, name: str | None = None) -> Weights:
    """Loads a checkpoint's backbone into a torchvision or timm model, or into a ``FeatureMap`` of one.

    A classifier of the model stays as it is. Top modules that the model lacks as a whole are left out, such as
    ``layer4`` if the model was cut after ``layer3``. If the file holds several backbones, those of another architecture
    are ignored.

    Args:
        model: Model to load into; it is changed in place.
        path: File to read, as in ``read_backbone``.
        root: What stands before the backbone's names, as in ``read_backbone``.
        name: What errors call the model; None means the name of its class.

    Returns:
        The weights that were loaded.

    Raises:
        ValueError: If ``read_backbone`` raises it, or the file is of another architecture; the message then shows names
            that the file lacks, and those of the file that are most like them.
        ImportError: If ``read_backbone`` raises it.

    Examples:
        >>> from torchvision.models import resnet18
        >>> loaded = load_backbone(resnet18(), "checkpoint.pth")
        >>> sorted(loaded.dropped)
        ['fc.bias', 'fc.weight']
    """
    own = model.state_dict()

    def expect(names: Collection[str]) -> dict[str, Tensor]:
        return {n: v for n, v in own.items() if not CLASSIFIER.match(n) or (_BEFORE_CLASSIFIER.match(n) and n in names)}

    original = {_plain(entry, model): entry for entry in own}
    own = {_plain(entry, model): value for entry, value in own.items()}
    read = match_backbone(own, path, root, expect, f"the {_class_of(model)}" if name is None else name)
    model.load_state_dict({original[short]: v for short, v in read.weights.items() if short in own}, strict=False)
    return read


def _class_of(model: nn.Module) -> str:
    """The class of the model, or of the one that a ``FeatureMap`` is of: a user knows only that."""
    layouts = getattr(model, "_layouts", None)
    return layouts[0].name if layouts else type(model).__name__


def _plain(name: str, model: nn.Module) -> str:
    """A model's name for an entry without what compiling it, or cutting it by timm's ``features_only``, did to it."""
    if type(model).__module__ == "timm.models._features":
        name = re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", name.removeprefix("model."))  # stages_0 was stages.0
    return clean(name)


def match_backbone(
    own: Mapping[str, Tensor],
    path: str | Path,
    root: str | None,
    expect: Callable[[Collection[str]], dict[str, Tensor]],
    model: str,
) -> Weights:
    """What of a file goes into a model whose names are known.

    Args:
        own: The model's state dict, by cleaned names.
        path: File to read, as in ``read_backbone``.
        root: What stands before the backbone's names, as in ``read_backbone``.
        expect: Function from the file's names to those entries of ``own`` that the file has to hold.
        model: What messages call the model, as ``"the ResNet"``.

    Returns:
        The weights that fit, as from ``load_backbone``.

    Raises:
        ValueError: If the file cannot be read, or is of another architecture.
        ImportError: If ``read_backbone`` raises it.
    """
    file = _read(path, root)
    roots = find_roots(file.state)
    roots += [found for found in roots_of_model(file.state, list(expect(()))) if found not in roots]
    if not roots:
        raise _no_backbone(file)
    tops = {name.partition(".")[0] for name in own}
    fitting = [(found, *_fit(file, found, tops, expect(found.names))) for found in choose(roots, root, path)]
    right = [found for found, _, problem in fitting if problem is None]
    if not right:
        best, kept, problem = min(fitting, key=lambda entry: len(own.keys() ^ entry[1].keys()))
        expected = expect(best.names)
        if len(fitting) > 3 and 2 * len(kept) < len(expected):  # these are blocks of one network with other names
            shared = os.path.commonprefix([found.prefix for found in roots])  # noqa: RUF071  by characters
            best, kept, problem = Root(shared[: shared.rfind(".") + 1], {}), {}, misfit({}, expected)
            roots = []
        loaded = {best.names[short] for short in kept}
        unused = {name: value for name, value in file.state.items() if name not in loaded}
        others = [found for found in roots if found.prefix != best.prefix]
        also = f"; it also holds {listed(others)}, which root=... chooses" if others and root is None else ""
        apart = differences(kept, expected, unused, best.prefix)
        raise ValueError(f"path: {path} does not fit {model}: {problem}{apart}{also}")
    best = only(right, path)
    weights = next(weights for found, weights, _ in fitting if found is best)
    read, loaded = _weights(file, best, roots), {file.origin[best.names[name]] for name in weights}
    left = {name: "the model has no such module" for name in read.weights if name not in weights}
    dropped = {name: why for name, why in read.dropped.items() if name not in loaded}
    return Weights(weights, read.parts, dropped | left)


def load_parts(model: nn.Module, path: str | Path, root: str | None = None) -> Weights:
    """Loads a checkpoint's FPN and FCOS towers into a model that names them as ``fcos_resnet50_fpn`` does.

    Args:
        model: Model to load into; it is changed in place.
        path: File to read, as in ``read_backbone``.
        root: What stands before the backbone's names, as in ``read_backbone``.

    Returns:
        The weights that were loaded, as ``parts``; none if the file holds none or the model has no place for them.

    Raises:
        ValueError: If ``read_backbone`` raises it, or an entry has another shape than in the model.
        ImportError: If ``read_backbone`` raises it.

    Examples:
        >>> from torchvision.models import resnet18
        >>> load_parts(resnet18(), "checkpoint.pth").parts
        {}
    """
    read, own = read_backbone(path, root), model.state_dict()
    fitting = {name: value for name, value in read.parts.items() if name in own}
    problem = misfit(fitting, {name: own[name] for name in fitting})
    if problem is not None:
        raise ValueError(f"path: {path} does not fit the {type(model).__name__}: {problem}")
    model.load_state_dict(fitting, strict=False)
    left = {name: f"not in the {type(model).__name__}" for name in read.parts if name not in fitting}
    return Weights({}, fitting, left)


def _read(path: str | Path, root: str | None) -> _File:
    entries = read_entries(Path(path), root)
    names = {name: clean(name) for name in entries}
    if len(set(names.values())) < len(names):  # a file with a network and the same one compiled: keep them apart
        names = {name: name for name in names}
    state = {names[name]: value for name, value in entries.items() if isinstance(value, Tensor)}
    return _File(Path(path), state, {short: name for name, short in names.items()})


def _no_backbone(file: _File) -> ValueError:
    names = ", ".join(list(file.state)[:3]) or "none"
    return ValueError(
        f"path: {file.path} holds no backbone: no spatial convolution among its {len(file.state)} tensors: {names}"
    )


def _fit(
    file: _File, root: Root, tops: Collection[str], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str | None]:
    """What of a root goes into a model with these top modules, and why it does not fit."""
    kept = {
        short: file.state[name]
        for short, name in root.names.items()
        if short.partition(".")[0] in tops and (short in expected or not CLASSIFIER.match(short))
    }
    problem = misfit(kept, expected)
    lacking = next(iter(missing(kept, expected)), None)
    if problem is not None and lacking is not None and f"entry {lacking!r} is missing" in problem:
        other = elsewhere(file.state, lacking, root)
        if other is not None:
            problem = f"entry {lacking!r} is not below {root.prefix!r}, but the file has {file.origin[other]!r}"
    return kept, problem if problem is not None or kept else "no entry has a place in it"


def _classifies(name: str) -> bool:
    return bool(CLASSIFIER.match(name)) and not _BEFORE_CLASSIFIER.match(name)


def _weights(file: _File, root: Root, roots: list[Root]) -> Weights:
    kept = {
        short: name for short, name in root.names.items() if not _classifies(short) and not _PRETRAINING.match(short)
    }
    parts = {}
    outer = root.prefix.removesuffix(_BODY)
    if outer != root.prefix:  # a detector
        inner = {name.removeprefix(outer): name for name in file.state if name.startswith(outer)}
        parts = {short: name for short, name in inner.items() if _PART.match(short)}
    used = {*kept.values(), *parts.values()}
    others = [other.prefix for other in roots if other.prefix not in ("", root.prefix)]
    return Weights(
        {short: file.state[name] for short, name in kept.items()},
        {short: file.state[name] for short, name in parts.items()},
        {name: _why(short, outer, others) for short, name in file.origin.items() if short not in used},
    )


def _why(name: str, root: str, others: list[str]) -> str:
    if is_momentum(name):
        return "momentum encoder: the query encoder is the one that transfers"
    other = next((other for other in others if name.startswith(other)), None)
    if other is not None:
        return f"another copy of the backbone, which root={other!r} reads in place of this one"
    return next(why for pattern, why in _WHY if re.match(pattern, name) or re.match(pattern, name.removeprefix(root)))
