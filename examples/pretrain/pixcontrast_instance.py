"""PixContrast with an instance branch, on a folder of images; adapt.py goes on from pretrained weights with it.

    python examples/pretrain/pixcontrast_instance.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/pixcontrast_instance_r50_100ep.yaml
"""

from torch import nn

from densessl import EMA, DistanceMatcher, InstanceContrastLoss, MaskedView, PixContrastLoss, View
from examples.pretrain.common.step import Step, mean_over_cells, pair_metrics, valid_cells
from examples.pretrain.pixpro_instance import TwoHeads


class PixContrastInstance(nn.Module):
    """``L = L_PixContrast + alpha * L_instance``: InfoNCE between the cells of two views, and between images.

    Not a published method: it joins PixPro's instance branch (Xie et al., CVPR 2021, Eq. 6) to the paper's second
    pretext task (Eq. 2).

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        alpha: Weight of the loss between images, beside that between cells; at least 0. PixPro's paper has 1.
        hidden_dim: Number of channels of the hidden layers of the projection heads, at least 1.
        dim: Number of channels of the projections, which are the output of the projection head; at least 1.
        threshold: Two cells are a positive pair if their centres lie less than this distance apart in the source image,
            in diagonals of the larger cell; above 0. The published value is 0.7.
        temperature: Temperature of the softmax over cells, above 0; a smaller one weighs the most similar negatives
            more.
        pixel_distances: Whether distances between cells are measured in pixels of the source image. If false, as
            published, x is divided by the image's width and y by its height; set it to true for images far from square.
    """

    in_words = "PixContrast with an instance loss"  # in logs and reports

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        alpha: float = 1.0,
        hidden_dim: int = 4096,
        dim: int = 256,
        threshold: float = 0.7,
        temperature: float = 0.3,
        pixel_distances: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = TwoHeads(backbone, width, hidden_dim, dim)
        self.target = EMA(self.encoder)
        self.match, self.pixel_loss = DistanceMatcher(threshold), PixContrastLoss(temperature)
        self.instance_loss = InstanceContrastLoss(gather_distributed=True)
        self.alpha, self.pixel_distances = alpha, pixel_distances

    def forward(self, view1: View | MaskedView, view2: View | MaskedView) -> Step:
        (z1, w1), (z2, w2) = self.encoder(view1.image), self.encoder(view2.image)
        (t1, v1), (t2, v2) = self.target(view1.image), self.target(view2.image)
        size, source_size = z1.shape[-2:], view1.source_size if self.pixel_distances else None
        valid1, valid2 = valid_cells(view1, size), valid_cells(view2, size)
        mask = self.match(view1.coords, view2.coords, size, size, source_size, valid1, valid2)
        pixel = 0.5 * (self.pixel_loss(z1, t2, mask, valid2) + self.pixel_loss(z2, t1, mask.mT, valid1))

        w1, v1 = (mean_over_cells(x, valid1) for x in (w1, v1))
        w2, v2 = (mean_over_cells(x, valid2) for x in (w2, v2))
        instance = 0.5 * (self.instance_loss(w1, v2) + self.instance_loss(w2, v1))
        terms = {"pixel": pixel, "instance": instance}
        return Step(pixel + self.alpha * instance, terms, lambda: pair_metrics(z1, t2, mask, valid1, valid2))


def recipe():
    from examples.pretrain.common.cli import Recipe  # Lightning comes in here, not with the method

    return Recipe(PixContrastInstance)


if __name__ == "__main__":
    recipe().run()
