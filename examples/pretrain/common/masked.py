"""The encoder of masked prediction, and what its method draws."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densessl import BlockMask, MaskToken, PrototypeHead, View, cell_distance, gather_tokens, map_to_tokens
from examples.pretrain.common.draws import of_this_process


class MaskedEncoder(nn.Module):
    """A ViT with a token in place of masked patches; the likeness of each cell, and of their mean, to prototypes."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int, prototypes: int) -> None:
        super().__init__()
        self.backbone, self.token = backbone, MaskToken(backbone)
        self.head = PrototypeHead(width, hidden_dim, dim, prototypes)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The backbone's map, the cells' scores ``(B, N, K)``, and those of the cells' mean ``(B, 1, K)``."""
        features = self.token(self.backbone, image, mask)
        mean = features.mean((2, 3), keepdim=True)
        return features, map_to_tokens(self.head(features)), map_to_tokens(self.head(mean))


def drawn_blocks(draw: BlockMask, features: Tensor) -> Tensor:
    """Masks ``(B, h, w)`` for this process's images, out of those that all processes draw for all images."""
    return of_this_process(lambda images: draw(images, features.shape[-2:]), len(features)).to(features.device)


def matched_cells(
    match: nn.Module,
    nearest: nn.Module,
    views: tuple[View, View],
    maps: tuple[Tensor, Tensor],
    scores: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What the other view shows at the place of each cell.

    Returns:
        All positive pairs of the two views; then for view 1 and for view 2 the scores ``(B, N, K)`` of the other
        view's nearest matching cell, and which cells have one, ``(B, N)``.
    """
    (one, other), sizes = views, [x.shape[-2:] for x in maps]
    mask = match(one.coords, other.coords, *sizes, one.source_size)
    distance = cell_distance(one.coords, other.coords, *sizes, source_size=one.source_size)
    there, back = nearest(distance, mask), nearest(distance.mT, mask.mT)
    return mask, (gather_tokens(scores[1], there.key), there.valid), (gather_tokens(scores[0], back.key), back.valid)


@torch.no_grad()
def prototypes_in_use(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Exponential of the entropy of the prototypes' mean shares: 1 where all cells have the same one, at most K."""
    share = ((scores.float() - center.float()) / temperature).softmax(2).mean((0, 1))
    return torch.special.entr(share).sum().exp()
