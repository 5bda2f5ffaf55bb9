"""PixContrast on a folder of images: the paper's other pretext task, which the authors' code does not have.

    python examples/pretrain/pixcontrast.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/pixcontrast_r50_100ep.yaml
"""

from torch import nn

from densessl import EMA, ConvMLP, DistanceMatcher, MaskedView, PixContrastLoss, View
from examples.pretrain.common.step import Step, pair_metrics, valid_cells


class PixContrast(nn.Module):
    """InfoNCE between the cells of two views (Xie et al., CVPR 2021, Eq. 2).

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layer of the projection head, at least 1.
        dim: Number of channels of the projections, which are the output of the projection head; at least 1.
        threshold: Distance of the centres below which cells match, in diagonals of the larger cell; 0.7 as published.
        temperature: Temperature of the softmax over cells, above 0; a smaller one weighs similar negatives more.
        pixel_distances: Whether distances between cells are measured in pixels of the source image. If false, as
            published, x is divided by the image's width and y by its height; set it to true for images far from square.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        hidden_dim: int = 4096,
        dim: int = 256,
        threshold: float = 0.7,
        temperature: float = 0.3,
        pixel_distances: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(backbone, ConvMLP(width, hidden_dim, dim))
        self.target = EMA(self.encoder)
        self.match, self.loss = DistanceMatcher(threshold), PixContrastLoss(temperature)
        self.pixel_distances = pixel_distances

    def forward(self, view1: View | MaskedView, view2: View | MaskedView) -> Step:
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        size, source_size = z1.shape[-2:], view1.source_size if self.pixel_distances else None
        valid1, valid2 = valid_cells(view1, size), valid_cells(view2, size)
        mask = self.match(view1.coords, view2.coords, size, size, source_size, valid1, valid2)
        loss = 0.5 * (self.loss(z1, t2, mask, valid2) + self.loss(z2, t1, mask.mT, valid1))  # "also averaged"
        return Step(loss, {}, lambda: pair_metrics(z1, t2, mask, valid1, valid2))


def recipe():
    from examples.pretrain.common.cli import Recipe  # Lightning comes in here, not with the method

    return Recipe(PixContrast)


if __name__ == "__main__":
    recipe().run()
