"""PixPro with an instance branch, on a folder of images.

    python examples/pretrain/pixpro_instance.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/pixpro_instance_r50_100ep.yaml

Two instance losses: ``consistency``, the BYOL form of the authors' code (a predictor, no negatives; switched off in
their released scripts), and ``contrast``, our form of the paper's SimCLR*: InfoNCE with keys of the target encoder.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from densessl import (
    EMA,
    PPM,
    ConvMLP,
    DistanceMatcher,
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    MaskedView,
    PixProLoss,
    View,
)
from examples.pretrain.common.step import Step, mean_over_cells, pair_metrics, valid_cells


class TwoHeads(nn.Module):
    """A backbone with a projection head for cells and one for the image; both see the whole map."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.per_cell = ConvMLP(width, hidden_dim, dim)
        self.per_image = ConvMLP(width, hidden_dim, dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(image)
        return self.per_cell(features), self.per_image(features)


class PixProInstance(nn.Module):
    """``L = L_PixPro + alpha * L_instance`` (Xie et al., CVPR 2021, Eq. 6).

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        instance: Form of the instance loss: ``"consistency"`` (published code) or ``"contrast"`` (paper, in our form).
        alpha: Weight of the instance term, 1 in the paper.
        hidden_dim: Number of channels of the hidden layers of the projection heads, at least 1.
        dim: Number of channels of the projections, which are the output of the projection head; at least 1.
        threshold: Two cells are a positive pair if their centres lie less than this distance apart in the source image,
            in diagonals of the larger cell; above 0. The published value is 0.7.
        pixel_distances: Whether distances between cells are measured in pixels of the source image. If false, as
            published, x is divided by the image's width and y by its height; set it to true for images far from square.
    """

    in_words = "PixPro with an instance loss"  # in logs and reports

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        instance: Literal["consistency", "contrast"] = "consistency",
        alpha: float = 1.0,
        hidden_dim: int = 4096,
        dim: int = 256,
        threshold: float = 0.7,
        pixel_distances: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = TwoHeads(backbone, width, hidden_dim, dim)
        self.ppm = PPM(nn.Conv2d(dim, dim, 1))
        # The predictor is BYOL's guard against collapse; contrast has negatives instead.
        self.predictor = ConvMLP(dim, hidden_dim, dim) if instance == "consistency" else nn.Identity()
        self.target = EMA(self.encoder)
        self.match, self.pixel_loss = DistanceMatcher(threshold), PixProLoss()
        self.instance_loss = (
            InstanceConsistencyLoss() if instance == "consistency" else InstanceContrastLoss(gather_distributed=True)
        )
        self.alpha, self.pixel_distances = alpha, pixel_distances

    def forward(self, view1: View | MaskedView, view2: View | MaskedView) -> Step:
        (z1, w1), (z2, w2) = self.encoder(view1.image), self.encoder(view2.image)
        (t1, v1), (t2, v2) = self.target(view1.image), self.target(view2.image)
        size, source_size = z1.shape[-2:], view1.source_size if self.pixel_distances else None
        valid1, valid2 = valid_cells(view1, size), valid_cells(view2, size)
        mask = self.match(view1.coords, view2.coords, size, size, source_size, valid1, valid2)
        y1, y2 = self.ppm(z1, valid1), self.ppm(z2, valid2)
        pixel = 2 * (self.pixel_loss(y1, t2, mask) + self.pixel_loss(y2, t1, mask.mT))

        # As published the predictor comes before the pooling. Ours pools the whole map, theirs a fixed 7x7.
        p1, v1 = (mean_over_cells(x, valid1) for x in (self.predictor(w1), v1))
        p2, v2 = (mean_over_cells(x, valid2) for x in (self.predictor(w2), v2))
        instance = self.instance_loss(p1, v2) + self.instance_loss(p2, v1)
        loss = pixel + self.alpha * instance
        terms = {"pixel": pixel, "instance": instance}
        return Step(loss, terms, lambda: pair_metrics(z1, t2, mask, valid1, valid2))


def recipe():
    from examples.pretrain.common.cli import Recipe

    return Recipe(PixProInstance)


if __name__ == "__main__":
    recipe().run()
