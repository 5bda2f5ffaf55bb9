"""The encoder of masked prediction, and what its method draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl import BlockMask, MaskToken, Pairs, PrototypeHead, View, cell_distance, map_to_tokens
from examples.pretrain.common.draws import of_this_process


class MaskedEncoder(nn.Module):
    """A ViT with a token in place of masked patches, and each cell's likeness to prototypes."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int, prototypes: int) -> None:
        super().__init__()
        self.backbone, self.token = backbone, MaskToken(backbone)
        self.head = PrototypeHead(width, hidden_dim, dim, prototypes)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The backbone's map, and scores ``(B, N, K)``."""
        features = self.token(self.backbone, image, mask)
        return features, map_to_tokens(self.head(features))


def drawn_blocks(draw: BlockMask, features: Tensor) -> Tensor:
    """Masks ``(B, h, w)`` for this process's images, out of those that all processes draw for all images."""
    return of_this_process(lambda images: draw(images, features.shape[-2:]), len(features)).to(features.device)


def matched_cells(
    match: nn.Module, nearest: nn.Module, view1: View, view2: View, *sizes: torch.Size
) -> tuple[Tensor, Pairs, Pairs]:
    """All positive pairs of two views, and of each cell the nearest one, from view 1 and from view 2."""
    source_size = view1.source_size
    mask = match(view1.coords, view2.coords, *sizes, source_size)
    distance = cell_distance(view1.coords, view2.coords, *sizes, source_size=source_size)
    return mask, nearest(distance, mask), nearest(distance.mT, mask.mT)


@torch.no_grad()
def prototypes_in_use(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Exponential of the entropy of the prototypes' mean shares: 1 where all cells have the same one, at most K."""
    share = ((scores.float() - center.float()) / temperature).softmax(2).mean((0, 1))
    return torch.special.entr(share).sum().exp()
