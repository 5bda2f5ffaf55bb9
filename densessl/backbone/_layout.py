"""Turns what a layer returns into a map."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from densessl.features import tokens_to_map


class Layout:
    """Turns what a layer returns into ``(B, C, h, w)``: maps with channels first or last, and tokens of a ViT.

    Args:
        model: The layer's model, which is asked for its patches, its prefix tokens and its layout.
        layer: The layer's name.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.layer = layer
        self.name = type(model).__name__
        self.patch = patch_size(model)
        self.fixed = _fixed_size(model)
        self.whole = _needs_whole_patches(model)
        self.prefix = prefix_tokens(model)
        self.channels_last = _is_channels_last(model, layer)
        # Found only once: a layer keeps its layout, and comparing sizes again would disturb a compiler that treats them
        # as symbols.
        self._last_axis: bool | None = None

    def __call__(self, out: Any, size: tuple[int, int]) -> Tensor:
        """Returns the map.

        Args:
            out: What the layer returned.
            size: Height and width of the images in pixels.

        Raises:
            ValueError: If ``out`` is no map or has a single cell, or if the axis of the channels cannot be told.
        """
        features = self._as_map(out, size)
        if features.shape[2] * features.shape[3] == 1:
            raise ValueError(
                f"image: layer {self.layer!r} shrinks {size[0]}x{size[1]} pixels to a 1x1 map, which has no cells to "
                "tell apart: use larger views or an earlier layer"
            )
        return features

    def refuse_size(self, size: tuple[int, int]) -> None:
        """Refuses images that the model's patches do not take.

        Args:
            size: Height and width of the images in pixels.

        Raises:
            ValueError: If the model takes one size only and this is another, or the patches do not fill the image.
        """
        if self.fixed is not None and self.fixed != size:
            raise ValueError(
                f"image: {self.name} was made for {self.fixed[0]}x{self.fixed[1]} pixels, got {size[0]}x{size[1]}: "
                "make the model for that size (img_size= in timm, image_size= in torchvision), or with "
                "dynamic_img_size=True where its class has that"
            )
        if self.whole is not None and any(side % step for side, step in zip(size, self.whole, strict=True)):
            raise ValueError(
                f"image: expected sides that are multiples of {self.name}'s patch of {self.whole[0]}x{self.whole[1]} "
                f"pixels, got {size[0]}x{size[1]}: cells would lie elsewhere than their coords say"
            )

    def _as_map(self, out: Any, size: tuple[int, int]) -> Tensor:
        if isinstance(out, Tensor) and out.ndim == 4:
            if self._last_axis is None:
                self._last_axis = self._last(out, size)
            return out.permute(0, 3, 1, 2) if self._last_axis else out
        if isinstance(out, Tensor) and out.ndim == 3 and self.patch is not None:
            grid = (size[0] // self.patch[0], size[1] // self.patch[1])
            if out.shape[1] == self.prefix + grid[0] * grid[1]:
                return tokens_to_map(out[:, self.prefix :], grid)
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"layer: expected {self.layer!r} to give a map (B, C, h, w) or the tokens of a ViT, got {got}")

    def _last(self, out: Tensor, size: tuple[int, int]) -> bool:
        first = _is_grid((out.shape[2], out.shape[3]), size)
        last = _is_grid((out.shape[1], out.shape[2]), size)
        if first and last and self.channels_last is None:
            raise ValueError(
                f"layer: it cannot be told which axis of {tuple(out.shape)} holds the channels of {self.layer!r} at "
                f"{size[0]}x{size[1]} pixels: use a stage that timm names in the model's feature_info, or another size"
            )
        if first != last:
            return last
        return bool(self.channels_last)


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """``(height, width)`` of a ViT's patches in pixels; None for other models."""
    embedding = getattr(model, "patch_embed", None)  # timm
    patch = getattr(embedding, "patch_size", None) or getattr(model, "patch_size", None)  # torchvision
    if patch is None:
        return None
    return (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """``(H, W)`` of the only images that the model takes; None if it takes several sizes."""
    embedding: Any = getattr(model, "patch_embed", None)
    own = getattr(embedding, "img_size", None)
    if own is not None and getattr(embedding, "strict_img_size", False):
        return (int(own[0]), int(own[1]))
    side = getattr(model, "image_size", None)
    if type(model).__module__ == "torchvision.models.vision_transformer" and isinstance(side, int):
        return (side, side)
    return None


def _needs_whole_patches(model: nn.Module) -> tuple[int, int] | None:
    """The patches of timm's embedding, which cuts the image or pads it where they do not fill it."""
    embedding: Any = getattr(model, "patch_embed", None)
    return patch_size(model) if hasattr(embedding, "dynamic_img_pad") else None


def prefix_tokens(model: nn.Module) -> int:
    """Class and register tokens, which come before those of the patches."""
    own = getattr(model, "num_prefix_tokens", None)  # timm
    if isinstance(own, int):
        return own
    return int(getattr(model, "class_token", None) is not None)  # torchvision


def _is_grid(cells: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether one stride, up to the rounding of each side, leads from the image's size to the cells."""
    if cells[0] > size[0] or cells[1] > size[1]:
        return False
    low = max(side / (n + 1) for side, n in zip(size, cells, strict=True))
    high = min(side / (n - 1) if n > 1 else float("inf") for side, n in zip(size, cells, strict=True))
    return low < high


def _is_channels_last(model: nn.Module, layer: str) -> bool | None:
    """What the model says about its layout; None if a timm model says nothing about this layer."""
    module = type(model).__module__
    if module == "torchvision.models.swin_transformer":
        return layer.split(".")[0] in ("features", "norm")
    if getattr(model, "output_fmt", None) == "NHWC":  # timm's Swin and relatives
        return True
    return None if module.startswith("timm.") else False
