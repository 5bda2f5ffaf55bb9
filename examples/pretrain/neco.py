"""NeCo on a folder of images: post-training by the order of nearest cells. Needs the extra ``neighbors``.

    python examples/pretrain/neco.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/neco_dinov2_s14.yaml
"""

import torch
from torch import Tensor, nn

from densessl import EMA, ConvMLP, DistanceMatcher, KeyQueue, NeighborOrderLoss, View, align
from examples.pretrain.common.draws import of_this_process
from examples.pretrain.common.step import Step, pair_metrics


class NeCo(nn.Module):
    """Patch neighbour consistency (Pariza et al., ICLR 2025): both views rank cells of other images alike.

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map, pretrained.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layer of the projection head, at least 1.
        dim: Number of channels of the projections.
        grid: Number of cells along each side of the grid over what the two views share, and the root of the number of
            references; 7 as published.
        queue: Number of cells of earlier images that references are drawn from; 8,192 as published.
        steepness: How sharply the sorting network compares; 100 as published.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        hidden_dim: int = 2048,
        dim: int = 256,
        grid: int = 7,
        queue: int = 8192,
        steepness: float = 100.0,
    ) -> None:
        super().__init__()
        if not 2 <= grid * grid <= queue:
            raise ValueError(f"method.grid: expected at least 2 and at most the root of method.queue, got {grid}")
        self.encoder = nn.Sequential(backbone, ConvMLP(width, hidden_dim, dim))
        self.target = EMA(self.encoder)
        self.queue, self.loss, self.grid = KeyQueue(queue, dim), NeighborOrderLoss("cosine", steepness), (grid, grid)
        self.match = DistanceMatcher(0.7)  # for the metrics alone

    def forward(self, view1: View, view2: View) -> Step:
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        c1, c2, size = view1.coords, view2.coords, z1.shape[-2:]
        (q1, valid), (k1, _) = (align(x, c1, c2, self.grid) for x in (z1, t1))
        (q2, _), (k2, _) = (align(x, c2, c1, self.grid) for x in (z2, t2))
        one, other = (self.chosen(self.queue.keys.expand(len(z1), -1, -1), self.grid[0] ** 2) for _ in range(2))
        loss = 0.5 * (self.loss(q1, k2, one, valid) + self.loss(q2, k1, other, valid))
        for cells in (t1, t2):  # ten of each image, as published
            self.queue.push(self.chosen(cells.flatten(2).mT, 10).flatten(0, 1))
        return Step(loss, {}, lambda: pair_metrics(z1, t2, self.match(c1, c2, size)))

    def chosen(self, cells: Tensor, count: int) -> Tensor:
        """Some of the cells ``(B, N, C)`` of each image, drawn at random: ``(B, count, C)``."""
        index = of_this_process(lambda images: torch.randint(cells.shape[1], (images, count)), len(cells))
        return cells[torch.arange(len(cells))[:, None], index.to(cells.device)]


def recipe():
    from examples.pretrain.common.cli import WITHOUT_MASKS, Recipe
    from examples.pretrain.common.optimizers import BackboneAdamW

    defaults = {"backbone.name": "vit_small_patch14_dinov2.lvd142m", "backbone.layer": "norm"}
    defaults["backbone.init"] = "imagenet"
    return Recipe(NeCo, BackboneAdamW, momentum=(0.9995, 1.0), without=WITHOUT_MASKS, defaults=defaults)


if __name__ == "__main__":
    recipe().run()
