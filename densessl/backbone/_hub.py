"""Layers of the ViTs that torch.hub gives for DINO, DINOv2 and DINOv3."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from densessl.backbone._layout import patch_size
from densessl.backbone._tree import cut_after, without
from densessl.features import tokens_to_map


class DinoRun:
    """Runs ``get_intermediate_layers``, in the form of DINO or of its successors.

    Args:
        layers: Names of the layers, in the order of the maps.
        depths: Index of each layer's block.
        norm: Whether the maps are taken after the final norm.
        reshapes: Whether the model makes maps itself, as DINOv2 and DINOv3 do.
        patch: Height and width of the patches in pixels.
    """

    def __init__(
        self, layers: list[str], depths: list[int], norm: bool, reshapes: bool, patch: tuple[int, int]
    ) -> None:
        self.layers = layers
        self.depths = depths
        self.norm = norm
        self.reshapes = reshapes
        self.patch = patch

    def __call__(self, model: nn.Module, image: Tensor) -> list[Tensor]:
        """The maps, each ``(B, C, h, w)``."""
        height, width = image.shape[2], image.shape[3]
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(
                f"image: expected sides that are multiples of the patch of {self.patch[0]}x{self.patch[1]} pixels, got "
                f"{height}x{width}"
            )
        taken = sorted(set(self.depths))
        if self.reshapes:
            forward: Any = model.get_intermediate_layers
            maps = forward(image, n=taken, reshape=True, norm=self.norm)
            return [maps[taken.index(depth)] for depth in self.depths]
        states: dict[int, Tensor] = {}
        prepare: Any = model.prepare_tokens
        tokens = prepare(image)
        for depth, block in enumerate(model.get_submodule("blocks").children()):
            tokens = block(tokens)
            if depth in taken:
                states[depth] = model.get_submodule("norm")(tokens) if self.norm else tokens
        grid = (height // self.patch[0], width // self.patch[1])
        return [tokens_to_map(states[depth][:, 1:], grid) for depth in self.depths]  # the first is the class token


def prepare(model: nn.Module, layers: list[str]) -> tuple[nn.Module, DinoRun] | None:
    """The part of the model that the layers need, and what runs it; None for other models.

    Args:
        model: Any model.
        layers: ``"blocks.11"``, or ``"norm"`` for the last block after the final norm.

    Raises:
        ValueError: If a layer is none of these.
    """
    forward = getattr(model, "get_intermediate_layers", None)
    patch = patch_size(model)
    if forward is None or patch is None or type(model).__module__.startswith("timm."):
        return None
    reshapes = "reshape" in inspect.signature(forward).parameters
    if not reshapes and not hasattr(model, "prepare_tokens"):
        return None
    blocks = _blocks(model)
    norm = layers == ["norm"] * len(layers)
    wrong = [name for name in layers if not norm and name not in blocks]
    if wrong:
        raise ValueError(
            f"layer: expected a block of {type(model).__name__} ({blocks[0]!r} to {blocks[-1]!r}), or 'norm' alone, "
            f"got {wrong[0]!r}"
        )
    depths = [len(blocks) - 1 if norm else blocks.index(name) for name in layers]
    part = without(model, ("head",))
    chunked = blocks[0].count(".") > 1  # counts on all of its blocks
    if not norm and not chunked:
        part = cut_after(part, blocks[max(depths)], ("norm",))
    return part, DinoRun(layers, depths, norm, reshapes, patch)


def _blocks(model: nn.Module) -> list[str]:
    """Names of the blocks in their order; in chunks, a block's name ends in its number among all of them."""
    names: list[str] = []
    for name, item in model.get_submodule("blocks").named_children():
        if isinstance(item, nn.ModuleList):
            inner = [n for n, block in item.named_children() if not isinstance(block, nn.Identity)]
            names += [f"blocks.{name}.{n}" for n in inner]
        else:
            names.append(f"blocks.{name}")
    return names
