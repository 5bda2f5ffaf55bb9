"""PixPro on a feature pyramid: pretrains backbone, FPN and FCOS's towers, with the pixel task at every level.

    python examples/pretrain/pixpro_fpn.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/pixpro_fpn_r50.yaml

The paper reports such a pretraining (Xie et al., CVPR 2021, "aligning pre-training to downstream networks"); its
settings were not published as code and were not found. Levels, heads and weights here are our choice: docs, page "FPN
and head". What comes out loads into torchvision's ``fcos_resnet50_fpn`` and ``examples/transfer/detection.py``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from densessl import (
    EMA,
    PPM,
    ConvMLP,
    DistanceMatcher,
    MaskedView,
    PerLevel,
    PixProLoss,
    View,
    level_mean,
    level_sizes,
)
from examples.pretrain.common.collapsed import RANK, STD, worst
from examples.pretrain.common.step import Step, pair_metrics, valid_cells


class PixProFPN(nn.Module):
    """PixPro's loss at every level of a pyramid, mean over levels; parts and settings otherwise as in pixpro.py.

    Args:
        backbone: Images to a map per level; see common/fcos_trunk.py.
        width: Number of channels of each map.
        propagation: One pixel propagation module (PPM) for all levels, or one per level. The projection is shared.
        hidden_dim: Number of channels of the hidden layers of the projection heads, at least 1.
        dim: Number of channels of the projections, which are the output of the projection head; at least 1.
        threshold: Two cells of a level are a positive pair if their centres lie less than this distance apart in the
            source image, in diagonals of the larger cell; above 0. PixPro's published value is 0.7.
        pixel_distances: Whether distances between cells are measured in pixels of the source image. If false, as
            published, x is divided by the image's width and y by its height; set it to true for images far from square.
    """

    in_words = "PixPro at every level of a pyramid"  # in logs and reports

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        propagation: Literal["shared", "per_level"] = "shared",
        hidden_dim: int = 4096,
        dim: int = 256,
        threshold: float = 0.7,
        pixel_distances: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(backbone, PerLevel(ConvMLP(width, hidden_dim, dim)))
        if propagation == "shared":
            self.ppm = PerLevel(PPM(nn.Conv2d(dim, dim, 1)))
        else:
            self.ppm = PerLevel({level: PPM(nn.Conv2d(dim, dim, 1)) for level in backbone.levels})
        self.target = EMA(self.encoder)
        self.match, self.loss = PerLevel(DistanceMatcher(threshold)), PerLevel(PixProLoss())
        self.pixel_distances = pixel_distances

    def forward(self, view1: View | MaskedView, view2: View | MaskedView) -> Step:
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        sizes, source_size = level_sizes(z1), view1.source_size if self.pixel_distances else None
        valid1, valid2 = ({level: valid_cells(v, size) for level, size in sizes.items()} for v in (view1, view2))
        masks = self.match(view1.coords, view2.coords, sizes, sizes, source_size, valid1, valid2)
        back = {level: mask.mT for level, mask in masks.items()}
        one, other = self.loss(self.ppm(z1, valid1), t2, masks), self.loss(self.ppm(z2, valid2), t1, back)
        losses = {level: 2 * (one[level] + other[level]) for level in masks}
        return Step(level_mean(losses), losses, lambda: metrics_of_levels(z1, t2, masks, valid1, valid2))


def metrics_of_levels(*parts):
    """The metrics of every level; deviation and rank of the worst level stand for all, since they stop a run."""
    found = {level: pair_metrics(*(part[level] for part in parts)) for level in parts[0]}
    stds, ranks = (torch.stack([metrics[name] for metrics in found.values()]) for name in (STD, RANK))
    chosen = worst(stds, ranks)
    return {f"{name}/{level}": value for level, of in found.items() for name, value in of.items()} | {
        STD: stds[chosen],
        RANK: ranks[chosen],
    }


def recipe():
    from examples.pretrain.common.cli import WITHOUT_ANCHOR, Recipe
    from examples.pretrain.common.fcos_trunk import make_trunk

    return Recipe(PixProFPN, backbone=make_trunk, without=WITHOUT_ANCHOR)


if __name__ == "__main__":
    recipe().run()
