"""Backbones as feature maps."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models.feature_extraction import create_feature_extractor

from densessl.features import tokens_to_map

_REGISTRIES = ("_parameters", "_buffers", "_modules")


class FeatureMap(nn.Module):
    """Any torchvision or timm model as an encoder from images to a feature map.

    Cuts the model's graph after ``layer``; what comes later (pooling, classifier) is dropped, so no parameter stays
    without gradient. Parameter and buffer names stay the model's own: ``state_dict()`` loads into the plain model
    (``strict=False`` for the dropped head), and the other way round.

    Tokens of a ViT become a map; class and register tokens, which come first, are dropped.

    Args:
        model: a torchvision or timm model, or any module that ``torch.fx`` can trace.
        layer: name of the module to cut after. Default ``"layer4"``, the C5 map of a ResNet. ``"blocks.11"`` or
            ``"norm"`` for timm's ViTs, ``"encoder.ln"`` for torchvision's, ``"features"`` for torchvision's ConvNeXt,
            ``"permute"`` for its Swin.

    Attributes:
        layer: as given.

    Raises:
        ValueError: if the model has no such layer, or its graph cannot be traced.
    """

    _programs: tuple[GraphModule, GraphModule]

    def __init__(self, model: nn.Module, layer: str = "layer4") -> None:
        super().__init__()
        modes = {name: module.training for name, module in model.named_modules()}
        extractor = _cut(model, layer)
        # Traced code differs between evaluation and training.
        self.__dict__["_programs"] = tuple(
            GraphModule(extractor, extractor.train(mode).graph) for mode in (False, True)
        )
        # Having the registries, not nesting the extractor, keeps the model's names.
        for registry in _REGISTRIES:
            self.__dict__[registry] = getattr(extractor, registry)
        self._non_persistent_buffers_set = {name for name in self._buffers if name.startswith("_tensor_constant")}
        self._share()
        for root in (model, self):  # cutting puts all modules in one mode, frozen norms too
            for name, module in root.named_modules():
                module.training = modes.get(name, module.training)
        self.layer = layer
        self._patch = _patch_size(model)
        self._channels_last = _is_channels_last(model, layer)

    def _share(self) -> None:
        """Makes the programs run on this module's own parameters, buffers and modules."""
        for program in self._programs:
            for registry in _REGISTRIES:
                program.__dict__[registry] = self.__dict__[registry]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # copied and unpickled programs come with modules of their own

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}"

    def forward(self, image: Tensor) -> Tensor:
        """Encodes.

        Args:
            image: floating point ``(B, 3, H, W)``.

        Returns:
            ``(B, C, h, w)``.

        Raises:
            ValueError: on another shape or integer images; if the map is a single cell, or no map comes out.
        """
        if image.ndim != 4 or not image.is_floating_point():
            raise ValueError(
                f"image: expected floating point images (B, C, H, W), got {image.dtype} {tuple(image.shape)}"
                + ("; scale uint8 to 0..1 and normalise it first" if not image.is_floating_point() else "")
            )
        out = self._programs[self.training](image)["map"]
        size = (image.shape[2], image.shape[3])
        features = self._as_map(out, size)
        if features.shape[2] * features.shape[3] == 1:
            raise ValueError(
                f"image: layer {self.layer!r} shrinks {size[0]}x{size[1]} pixels to a 1x1 map, which has no cells to "
                "tell apart: use larger views or an earlier layer"
            )
        return features

    def _as_map(self, out: Any, size: tuple[int, int]) -> Tensor:
        if isinstance(out, Tensor) and out.ndim == 4:
            return out.permute(0, 3, 1, 2) if self._channels_last else out
        if isinstance(out, Tensor) and out.ndim == 3 and self._patch is not None:
            grid = (size[0] // self._patch[0], size[1] // self._patch[1])
            prefix = out.shape[1] - grid[0] * grid[1]
            if prefix >= 0:
                return tokens_to_map(out[:, prefix:], grid)
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"layer: expected {self.layer!r} to give a map (B, C, h, w) or the tokens of a ViT, got {got}")


def _cut(model: nn.Module, layer: str) -> Any:
    if layer not in dict(model.named_modules()):
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"layer: {type(model).__name__} has no {layer!r}; its top modules are {names}")
    try:
        with warnings.catch_warnings():
            # Training and evaluation may trace differently; a module's name means its output in both.
            warnings.filterwarnings("ignore", message="NOTE: The nodes obtained by tracing", category=UserWarning)
            return create_feature_extractor(model, {layer: "map"}, tracer_kwargs=_tracing(model))
    except Exception as error:  # torch.fx raises whatever the traced code does
        raise ValueError(
            f"model: the graph of {type(model).__name__} cannot be cut after {layer!r}: {error}. Any module that maps "
            "images to (B, C, h, w) serves in FeatureMap's place"
        ) from error


def _tracing(model: nn.Module) -> dict[str, Any]:
    """What must stay whole in the traced graph."""
    if not type(model).__module__.startswith("timm."):
        return {}
    models, layers = importlib.import_module("timm.models"), importlib.import_module("timm.layers")
    # timm knows its own, but for these: torch.fx would drop some of the former two's steps in place as unused, and
    # older torch cannot trace the latter two's attention.
    names = ("DropPath", "DropBlock2d", "Attention", "AttentionRope")
    whole = [getattr(layers, name) for name in names if hasattr(layers, name)]
    return {
        "leaf_modules": [*models.get_notrace_modules(), *whole],
        "autowrap_functions": models.get_notrace_functions(),
    }


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    embedding = getattr(model, "patch_embed", None)  # timm
    patch = getattr(embedding, "patch_size", None) or getattr(model, "patch_size", None)  # torchvision
    if patch is None:
        return None
    return (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))


def _is_channels_last(model: nn.Module, layer: str) -> bool:
    if type(model).__module__ == "torchvision.models.swin_transformer":
        return layer.split(".")[0] in ("features", "norm")
    return getattr(model, "output_fmt", None) == "NHWC"  # timm's Swin and relatives
