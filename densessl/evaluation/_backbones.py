"""Backbones by the words of the command line: ``timm/NAME``, ``torchvision/NAME``, ``hf/NAME`` or a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from densessl._resnets import cut_from
from densessl.backbone import FeatureMap
from densessl.backbone._layout import patch_size
from densessl.checkpoints import Weights, load_backbone, read_backbone
from densessl.evaluation._batches import Features
from densessl.export import architecture

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What timm's classes call the argument that lets a model take images of any size.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class Backbone(NamedTuple):
    """A model as a feature map, with what is done to its images.

    Attributes:
        model: Model from images, floating point ``(B, 3, H, W)``, to a map.
        layer: Name of the layer after which the model was cut.
        patch: Height and width in pixels of which the sides of images must be multiples; 1 where any side is taken.
        mean: Mean of each channel, subtracted from the images in 0..1.
        std: Standard deviation of each channel, by which the images are divided then.
        notes: What the weights are, in words.
    """

    model: nn.Module
    layer: str
    patch: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: str


def make_backbone(name: str, weights: str = "default", layer: str | None = None) -> Backbone:
    """The backbone of a name.

    Args:
        name: ``timm/NAME``, ``torchvision/NAME``, ``hf/NAME`` or a folder of that library, or a checkpoint of a ResNet.
        weights: "default", those that the library has under the name; "none", the initial ones; or a file.
        layer: Name of the layer to cut after; None: the last that gives a map, behind the final norm in vision
            transformers.

    Raises:
        ValueError: If the name is unknown, or the weights or the layer do not fit.
        ImportError: If the library is not installed.
    """
    kind, _, rest = name.partition("/")
    makers = {"timm": _from_timm, "torchvision": _from_torchvision, "hf": _from_huggingface}
    if kind in makers and rest:
        model, layers, mean, std = makers[kind](rest, weights == "default")
    elif Path(name).is_file():
        if weights not in ("default", name):
            raise ValueError(f"--weights: expected none beside the file {name}, got {weights}")
        model, layers, mean, std, weights = _from_file(name), ["layer4"], _MEAN, _STD, name
    elif (Path(name) / "config.json").is_file():
        model, layers, mean, std = _from_huggingface(name, weights == "default")
    else:
        raise ValueError(f"--backbone: expected timm/NAME, torchvision/NAME, hf/NAME or a file, got {name!r}")
    # Before the model is cut: a file of the whole model has entries that the part has no place for.
    if weights not in ("default", "none"):
        if not Path(weights).is_file():
            raise ValueError(f"--weights: expected default, none or a file, got {weights!r}: no such file")
        cut, chosen, read = _with_weights(model, weights, [layer] if layer is not None else layers, name)
        notes = f"{len(read.weights)} entries of {weights}, {len(read.dropped)} left out"
    else:
        cut, chosen = _cut(model, [layer] if layer is not None else layers)
        notes = "as the library initialises them" if weights == "none" else "the library's own"
    cut.eval().requires_grad_(False)
    return Backbone(cut, chosen, patch_size(model) or (1, 1), tuple(mean), tuple(std), notes)


def features_of(backbone: Backbone, device: torch.device) -> Features:
    """From images, uint8 ``(B, 3, H, W)``, to the backbone's maps on the device."""
    model = backbone.model.to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return model(prepared(backbone, images.to(device)))

    return features


def prepared(backbone: Backbone, images: Tensor) -> Tensor:
    """Images, uint8 ``(B, 3, H, W)``, as the backbone's model takes them."""
    scaled = F.to_dtype(images, torch.float32, scale=True)
    return F.normalize(scaled, list(backbone.mean), list(backbone.std))


_Made = tuple[nn.Module, Sequence[str], Sequence[float], Sequence[float]]


def _from_timm(name: str, pretrained: bool) -> _Made:
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm/NAME needs that package: pip install 'densessl[timm]'") from error
    if not timm.is_model(name):
        raise ValueError(f"--backbone: timm knows no model {name!r}; close: {_close(name, timm.list_models())}")
    for sized in _ANY_SIZE:
        try:
            model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)
            break
        except TypeError:  # the class has no such argument
            continue
    else:
        raise ValueError(f"--backbone: timm cannot make {name!r}")
    levels = [entry["module"] for entry in model.feature_info]
    is_vit = levels[-1].startswith("blocks.") and patch_size(model) is not None
    layers = ["norm", levels[-1]] if is_vit and hasattr(model, "norm") else [levels[-1]]
    return model, layers, model.pretrained_cfg.get("mean", _MEAN), model.pretrained_cfg.get("std", _STD)


def _from_torchvision(name: str, pretrained: bool) -> _Made:
    known = torchvision.models.list_models(torchvision.models)
    if name not in known:
        raise ValueError(f"--backbone: torchvision knows no model {name!r}; close: {_close(name, known)}")
    model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    weights = torchvision.models.get_model_weights(name)
    preset = next(iter(weights)).transforms() if len(weights) else None
    tops = dict(model.named_children())
    layers = [layer for layer in ("layer4", "permute", "features") if layer in tops] or ["encoder.ln"]
    return model, layers, getattr(preset, "mean", _MEAN), getattr(preset, "std", _STD)


def _from_huggingface(name: str, pretrained: bool) -> _Made:
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
    except ImportError as error:
        raise ImportError("hf/NAME needs transformers: pip install 'densessl[transformers]'") from error
    try:
        if pretrained:
            model: Any = AutoModel.from_pretrained(name)
        else:
            model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"--backbone: transformers cannot open {name!r}: {error}") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        mean, std = processor.image_mean, processor.image_std
    except (OSError, ValueError, AttributeError):  # a folder without the processor's file
        mean, std = _MEAN, _STD
    return model, list(_huggingface_layers(model)), mean, std


def _huggingface_layers(model: Any) -> Iterator[str]:
    names = dict(model.named_modules())
    depths = getattr(model.config, "depths", None)
    if depths is not None:
        yield from (f"{place}.{len(depths) - 1}" for place in ("encoder.stages", "encoder.layers"))
    yield from (norm for norm in ("layernorm", "norm", "post_layernorm") if norm in names)
    lists = [name for name, module in names.items() if isinstance(module, nn.ModuleList) and len(module)]
    yield from (f"{name}.{len(names[name]) - 1}" for name in lists)


def _from_file(path: str) -> nn.Module:
    read = read_backbone(path)
    try:
        name = architecture(read.weights)
    except ValueError as error:
        names, last = cut_from(read.weights)
        if names:
            raise ValueError(
                f"--backbone: expected a whole ResNet, got {path}, a {' or '.join(names)} up to {last}: name it, as in "
                f"--backbone torchvision/{names[0]} --layer {last} --weights {path}"
            ) from error
        raise ValueError(
            f"--backbone: {path} alone does not tell what it is of ({error}): name the model and pass the file as "
            f"--weights, as in --backbone timm/NAME --weights {path}"
        ) from error
    return torchvision.models.get_model(name, weights=None)


def _cut(model: nn.Module, layers: Sequence[str]) -> tuple[FeatureMap, str]:
    """The model cut after the first of the layers that it has."""
    problems = []
    for layer in layers:
        try:
            return FeatureMap(model, layer), layer
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(f"--layer: {problems[0] if problems else 'found no layer to cut after; name one'}")


def _with_weights(model: nn.Module, path: str, layers: Sequence[str], name: str) -> tuple[FeatureMap, str, Weights]:
    """The model cut, with the weights of a file: of the whole model, or of what lies before the cut."""
    try:
        read = load_backbone(model, path, name=f"--backbone {name}")
    except ValueError as whole:
        cut, chosen = _cut(model, layers)
        try:
            return cut, chosen, load_backbone(cut, path, name=f"--backbone {name} cut after {chosen}")
        except ValueError as error:
            raise ValueError(f"--weights: {str(error).removeprefix('path: ')}") from whole
    return *_cut(model, layers), read


def _close(name: str, known: Sequence[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, known)) or "none"
