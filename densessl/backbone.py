"""Backbones as feature maps."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from densessl.tokens import tokens_to_map


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

    _extractor: Any  # a GraphModule

    def __init__(self, model: nn.Module, layer: str = "layer4") -> None:
        super().__init__()
        extractor = _cut(model, layer)
        # Sharing the registries, not nesting the extractor, keeps the model's names. The extractor itself is held
        # outside of them, or every parameter would be there twice.
        self._parameters = extractor._parameters
        self._buffers = extractor._buffers
        self._modules = extractor._modules
        self._non_persistent_buffers_set = {name for name in self._buffers if name.startswith("_tensor_constant")}
        self.__dict__["_extractor"] = extractor
        self.layer = layer
        self._patch = _patch_size(model)
        self._channels_last = getattr(model, "output_fmt", None) == "NHWC"  # timm's Swin and relatives

    def extra_repr(self) -> str:
        return f"layer={self.layer!r}"

    def train(self, mode: bool = True) -> FeatureMap:
        """Sets training mode, here and in the traced graph, which differs between training and evaluation."""
        super().train(mode)
        self._extractor.train(mode)
        return self

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
        out = self._extractor(image)["map"]
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
    if type(model).__module__.startswith("timm."):
        # timm knows which of its own modules must stay whole in a traced graph.
        library = importlib.import_module("timm.models")
    else:
        library = importlib.import_module("torchvision.models.feature_extraction")
    if layer not in dict(model.named_modules()):
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"layer: {type(model).__name__} has no {layer!r}; its top modules are {names}")
    try:
        return library.create_feature_extractor(model, {layer: "map"})
    except Exception as error:  # torch.fx raises whatever the traced code does
        raise ValueError(
            f"model: the graph of {type(model).__name__} cannot be cut after {layer!r}: {error}. Any module that maps "
            "images to (B, C, h, w) serves in FeatureMap's place"
        ) from error


def _patch_size(model: nn.Module) -> tuple[int, int] | None:
    embedding = getattr(model, "patch_embed", None)  # timm
    patch = getattr(embedding, "patch_size", None) or getattr(model, "patch_size", None)  # torchvision
    if patch is None:
        return None
    return (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
