"""VICRegL on a folder of images.

    python examples/pretrain/vicregl.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/vicregl_r50_300ep.yaml

No target encoder and no negatives: variance and covariance keep the features from collapsing.
"""

from __future__ import annotations

import torch
from lightly.loss import VICRegLoss
from torch import Tensor, nn

from densessl import (
    NearestMatcher,
    Pairs,
    View,
    cell_distance,
    feature_distance,
    gather_tokens,
    map_to_tokens,
    pairs_to_mask,
)
from examples.pretrain.common.step import Step, pair_metrics


def expander(width: int, dim: int) -> nn.Sequential:
    """Three layers of one width; as 1x1 convolutions it serves maps, and pooled maps of one cell."""
    return nn.Sequential(
        nn.Conv2d(width, dim, 1),
        nn.BatchNorm2d(dim),
        nn.ReLU(inplace=True),
        nn.Conv2d(dim, dim, 1),
        nn.BatchNorm2d(dim),
        nn.ReLU(inplace=True),
        nn.Conv2d(dim, dim, 1),
    )


class Encoder(nn.Module):
    """A backbone with an expander for its cells and one for their mean."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.per_cell, self.per_image = expander(width, dim), expander(width, hidden_dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(image)
        return self.per_cell(features), self.per_image(features.mean((2, 3), keepdim=True)).flatten(1)


class VICRegL(nn.Module):
    """VICReg between images, and between cells matched by position and by feature (Bardes et al., NeurIPS 2022).

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        hidden_dim: Width of the images' expander.
        dim: Width of the cells' expander.
        keep: How many pairs of least distance in the source image to keep per image, gamma: from view 1 to view 2, and
            back. The defaults are the authors' code's; the paper has 20 for views of 224 px.
        keep_by_feature: How many pairs of most similar cells to keep per image, in both directions. All of them (null)
            is the default of the authors' code.
        alpha: Share of the images' loss, in 0..1.

    Raises:
        ValueError: If ``alpha`` or ``keep`` is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        hidden_dim: int = 8192,
        dim: int = 512,
        keep: tuple[int, int] = (20, 4),
        keep_by_feature: int | None = None,
        alpha: float = 0.75,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"method.alpha: expected a number in 0..1, got {alpha}")
        self.encoder = Encoder(backbone, width, hidden_dim, dim)
        self.by_place = [NearestMatcher(number) for number in keep]
        self.by_feature, self.alpha = NearestMatcher(keep_by_feature), alpha
        # The authors' code halves the covariance term of VICReg's, as lightly's VICRegLLoss notes.
        self.vicreg = VICRegLoss(lambda_param=25, mu_param=25, nu_param=0.5, gather_distributed=True)

    def forward(self, view1: View, view2: View) -> Step:
        (z1, w1), (z2, w2) = self.encoder(view1.image), self.encoder(view2.image)
        with torch.autocast(z1.device.type, enabled=False):
            instance = self.vicreg(w1.float(), w2.float())
            local, located = self.local_loss(z1.float(), z2.float(), view1, view2)
        loss = self.alpha * instance + (1 - self.alpha) * local
        cells = (z1[0, 0].numel(), z2[0, 0].numel())
        terms = {"local": local, "instance": instance}
        return Step(loss, terms, lambda: pair_metrics(z1.float(), z2.float(), pairs_to_mask(located, cells)))

    def local_loss(self, z1: Tensor, z2: Tensor, view1: View, view2: View) -> tuple[Tensor, Pairs]:
        """VICReg of the matched cells, by position plus by feature, and view 1's pairs by position.

        The k-th best pairs of all images together are one batch of VICReg. Crops lie inside their image, so every cell
        has a position and all slots are pairs; as published, also the pairs of views that do not overlap.
        """
        size1, size2 = z1.shape[-2:], z2.shape[-2:]
        by_position = cell_distance(view1.coords, view2.coords, size1, size2, source_size=view1.source_size)
        by_feature = feature_distance(z1.detach(), z2.detach(), metric="euclidean")
        terms, located = [], None
        for cost, nearest in ((by_position, self.by_place), (by_feature, [self.by_feature] * 2)):
            for a, b, distance, match in ((z1, z2, cost, nearest[0]), (z2, z1, cost.mT, nearest[1])):
                pairs = match(distance)
                located = pairs if located is None else located
                near = [gather_tokens(map_to_tokens(x), at) for x, at in ((a, pairs.query), (b, pairs.key))]
                terms.append(self.vicreg(*near))
        return sum(terms) / 2, located  # the mean of the two directions


def recipe():
    from examples.pretrain.common.cli import WITHOUT_MASKS, Recipe
    from examples.pretrain.common.optimizers import LinearLARS

    defaults = {"optimizer.lr_at_256": 0.2, "optimizer.weight_decay": 1e-6, "optimizer.warmup": 0.0333}
    return Recipe(VICRegL, LinearLARS, momentum=None, without=WITHOUT_MASKS, defaults=defaults)


if __name__ == "__main__":
    recipe().run()
