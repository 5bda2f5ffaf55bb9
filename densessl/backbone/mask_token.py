"""A learned token in place of the patches that a ViT is not allowed to see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_EMBEDDINGS = ("patch_embed", "embeddings.patch_embeddings", "conv_proj")  # timm and DINO, Hugging Face, torchvision


class MaskToken(nn.Module):
    """Replaces embedded patches by one learned token before the position embedding, for masked image modelling.

    timm's ViTs have no hook for this, so the token is put in at the output of the patch embedding. ViTs of torch.hub
    (DINO), Hugging Face and torchvision are treated in the same way. The backbone keeps its parameters and their names.
    A copy of a module that holds both the backbone and this token, such as a target encoder, works on its own backbone.

    Args:
        backbone: A ViT's ``FeatureMap``, or another module whose patch embedding has one of the known names. Models
            whose patches are smaller than their cells (Swin) are masked by whole cells.

    Attributes:
        token: The learned token ``(C,)``; zeros at first, as in iBOT and DINOv2.

    Raises:
        ValueError: If the backbone has no patch embedding of a known name.

    Examples:
        >>> from torchvision.models import VisionTransformer
        >>> vit = VisionTransformer(64, 16, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64)
        >>> backbone = densessl.FeatureMap(vit, layer="encoder.ln")
        >>> MaskToken(backbone)(backbone, torch.rand(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.5).shape
        torch.Size([2, 32, 4, 4])
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        embedding = _embedding(backbone)
        self.token = nn.Parameter(torch.zeros(_width(embedding)))
        self._cells: Tensor | None = None
        embedding.register_forward_hook(self._replace)

    def forward(self, backbone: nn.Module, image: Tensor, mask: Tensor | None = None) -> Any:
        """Encodes.

        Args:
            backbone: The backbone given at construction; in a copy of the module, the copied backbone.
            image: Batch of images ``(B, C, H, W)``, floating point.
            mask: Boolean tensor ``(B, h, w)``, True for the cells of the map that are hidden; None hides none.

        Returns:
            The output of the backbone.

        Raises:
            ValueError: If the mask has another shape, or its cells are not made of whole patches.
        """
        if mask is None:
            return backbone(image)
        if mask.ndim != 3 or mask.dtype != torch.bool or len(mask) != len(image):
            raise ValueError(
                f"mask: expected bool (B, h, w) with B = {len(image)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        self._cells = mask.to(image.device)
        try:
            return backbone(image)
        finally:
            self._cells = None

    def _replace(self, module: nn.Module, args: Any, out: Any) -> Any:
        if self._cells is None:
            return out
        if isinstance(out, tuple):  # Hugging Face's Swin returns the grid as well
            return (self._placed(out[0], self._cells), *out[1:])
        return self._placed(out, self._cells)

    def _placed(self, patches: Tensor, mask: Tensor) -> Tensor:
        h, w = mask.shape[1:]
        token = self.token.to(patches.dtype)
        if patches.ndim == 3:
            mask = _by_patches(mask, patches.shape[1], (None, None)).flatten(1)
            return torch.where(mask[..., None], token, patches)
        last = patches.shape[3] == len(token)
        if last and patches.shape[1] == len(token):  # the axis that is no side of the grid
            last = patches.shape[1] * w == patches.shape[2] * h
        grid = (patches.shape[1], patches.shape[2]) if last else (patches.shape[2], patches.shape[3])
        mask = _by_patches(mask, grid[0] * grid[1], grid)
        if last:
            return torch.where(mask[..., None], token, patches)
        return torch.where(mask[:, None], token[:, None, None], patches)


def _by_patches(mask: Tensor, count: int, grid: tuple[int | None, int | None]) -> Tensor:
    """The mask of cells as one of patches, each cell some patches wide and high."""
    h, w = mask.shape[1:]
    times = round((count / (h * w)) ** 0.5)
    if times < 1 or count != h * w * times**2 or grid not in ((None, None), (h * times, w * times)):
        patches = f"{count} patches" if grid[0] is None else f"{grid[0]}x{grid[1]} patches"
        raise ValueError(f"mask: expected cells made of whole patches, got {h}x{w} cells of {patches}")
    return mask if times == 1 else mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _embedding(backbone: nn.Module) -> nn.Module:
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"backbone: expected a module, got {type(backbone).__name__}")
    modules = dict(backbone.named_modules())
    for name in _EMBEDDINGS:
        if name in modules:
            return modules[name]
    raise ValueError(
        f"backbone: expected a ViT with a patch embedding named {', '.join(_EMBEDDINGS)}, "
        f"got {type(backbone).__name__} with {', '.join(name for name, _ in backbone.named_children())}"
    )


def _width(embedding: nn.Module) -> int:
    convolutions = [module for module in embedding.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ValueError(f"backbone: expected a patch embedding by a convolution, got {type(embedding).__name__}")
    return convolutions[-1].out_channels
