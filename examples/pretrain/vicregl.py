"""VICRegL on a folder of images.

    python examples/pretrain/vicregl.py fit --config examples/pretrain/vicregl_r50_300ep.yaml --data.folder FOLDER

No target encoder and no negatives: variance and covariance keep the features from collapsing.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from backbones import make_backbone, map_shape
from engine import health, is_logged, refuse_nodata, run
from lightly.loss import VICRegLoss
from linear_rule import lars_by_linear_rule
from reading import Batch
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


class VICRegL(pl.LightningModule):
    """VICReg between images, and between cells matched by place and by feature (Bardes et al., NeurIPS 2022).

    Args:
        backbone: name of a torchvision or timm model.
        layer: to cut it after.
        init: ``"random"``, ``"imagenet"``, or a file to go on from.
        hidden_dim: width of the images' expander.
        dim: width of the cells' expander.
        keep: gamma, how many pairs of least distance to keep per image, direction and rule.
        alpha: share of the images' loss.
        lr_at_256: learning rate at 256 images a step; others follow by the linear rule.
        weight_decay: of weights of more than one dimension.
        warmup: share of the steps.
        compile: torch.compile the encoder.
        size: side of the views; linked to ``data.size``.
        channels: of the images; linked to ``data.channels``.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        layer: str = "layer4",
        init: str = "random",
        hidden_dim: int = 8192,
        dim: int = 512,
        keep: int = 20,
        alpha: float = 0.75,
        lr_at_256: float = 0.2,
        weight_decay: float = 1e-6,
        warmup: float = 0.0333,
        compile: bool = False,
        size: int = 224,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"model.alpha: expected a number in 0..1, got {alpha}")
        self.save_hyperparameters()
        features, width = make_backbone(backbone, layer, init, size, channels)
        _, height, across = map_shape(features, size, channels)
        if keep > height * across:
            raise ValueError(
                f"model.keep: expected at most the {height * across} cells of the map of {size} px views, got {keep}"
            )
        self.encoder = Encoder(features, width, hidden_dim, dim)
        self.nearest = NearestMatcher(keep)
        # The authors' code halves the covariance term of VICReg's, as lightly's VICRegLLoss notes.
        self.vicreg = VICRegLoss(lambda_param=25, mu_param=25, nu_param=0.5, gather_distributed=True)
        if compile:
            self.encoder.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2 = batch.view1, batch.view2
        (z1, w1), (z2, w2) = self.encoder(view1.image), self.encoder(view2.image)
        with torch.autocast(self.device.type, enabled=False):
            instance = self.vicreg(w1.float(), w2.float())
            local, located = self.local_loss(z1.float(), z2.float(), view1, view2)
        loss = self.hparams.alpha * instance + (1 - self.hparams.alpha) * local

        self.log_dict({"loss": loss, "loss/local": local, "loss/instance": instance}, prog_bar=True)
        if is_logged(self.trainer):
            mask = pairs_to_mask(located, (z1[0, 0].numel(), z2[0, 0].numel()))
            self.log_dict(health(z1.detach().float(), z2.detach().float(), mask))
        return loss

    def local_loss(self, z1: Tensor, z2: Tensor, view1: View, view2: View) -> tuple[Tensor, Pairs]:
        """VICReg of the matched cells, by place plus by feature, and view 1's pairs by place.

        The k-th best pairs of all images together are one batch of VICReg. Crops lie inside their image, so every cell
        has a place and all slots are pairs; as published, also the pairs of views that do not overlap.
        """
        size1, size2 = z1.shape[-2:], z2.shape[-2:]
        by_place = cell_distance(view1.coords, view2.coords, size1, size2, source_size=view1.source_size)
        by_feature = feature_distance(z1.detach(), z2.detach(), metric="euclidean")
        terms, located = [], None
        for cost in (by_place, by_feature):
            for a, b, distance in ((z1, z2, cost), (z2, z1, cost.mT)):
                pairs = self.nearest(distance)
                located = pairs if located is None else located
                near = [gather_tokens(map_to_tokens(x), at) for x, at in ((a, pairs.query), (b, pairs.key))]
                terms.append(self.vicreg(*near))
        return sum(terms) / 2, located  # the mean of the two directions

    def on_fit_start(self) -> None:
        refuse_nodata(self.trainer)

    def configure_optimizers(self) -> Any:
        h = self.hparams
        return lars_by_linear_rule(self.encoder, self.trainer, h.lr_at_256, h.weight_decay, h.warmup)


if __name__ == "__main__":
    run(VICRegL)
