"""PaKA on a folder of images: post-training by patch kernel alignment.

    python examples/pretrain/paka.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/paka_dinov2_s14.yaml
"""

from torch import nn

from densessl import EMA, ConvMLP, DistanceMatcher, KernelAlignmentLoss, View, align
from examples.pretrain.common.step import Step, pair_metrics


class PaKA(nn.Module):
    """Patch kernel alignment (Yeo et al., arXiv:2509.05606): both views see the same structure among shared places.

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map, pretrained.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layer of the projection head, at least 1.
        dim: Number of channels of the projections.
        grid: Number of cells along each side of the grid over what the two views share; 7 as published.
    """

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int = 2048, dim: int = 256, grid: int = 7) -> None:
        super().__init__()
        if grid < 2:
            raise ValueError(f"method.grid: expected at least 2, got {grid}")
        self.encoder = nn.Sequential(backbone, ConvMLP(width, hidden_dim, dim))
        self.target = EMA(self.encoder)
        self.loss, self.grid = KernelAlignmentLoss(no_match="zero"), (grid, grid)
        self.match = DistanceMatcher(0.7)  # for the metrics alone

    def forward(self, view1: View, view2: View) -> Step:
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        c1, c2, size = view1.coords, view2.coords, z1.shape[-2:]
        (q1, valid), (k1, _) = (align(x, c1, c2, self.grid) for x in (z1, t1))
        (q2, _), (k2, _) = (align(x, c2, c1, self.grid) for x in (z2, t2))
        loss = 0.5 * (self.loss(q1, k2, valid) + self.loss(q2, k1, valid))
        return Step(loss, {}, lambda: pair_metrics(z1, t2, self.match(c1, c2, size)))


def recipe():
    from examples.pretrain.common.cli import WITHOUT_MASKS, Recipe
    from examples.pretrain.common.optimizers import BackboneAdamW

    defaults = {"backbone.name": "vit_small_patch14_reg4_dinov2.lvd142m", "backbone.layer": "norm"}
    defaults["backbone.init"] = "imagenet"
    return Recipe(PaKA, BackboneAdamW, momentum=(0.9995, 1.0), without=WITHOUT_MASKS, defaults=defaults)


if __name__ == "__main__":
    recipe().run()
