"""PixPro with an instance branch, on a folder of images.

    python examples/pretrain/pixpro_instance.py fit --config examples/pretrain/pixpro_instance_r50_100ep.yaml ...

Two instance losses: ``consistency``, the BYOL form of the authors' code (a predictor, no negatives; switched off in
their released scripts), and ``contrast``, our form of the paper's SimCLR*: InfoNCE with keys of the momentum encoder.
"""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
from backbones import make_backbone
from engine import health, is_logged, lars_with_warmup, mean_over_cells, run, start_target
from reading import Batch, valid_cells
from torch import Tensor, nn

from densessl import (
    EMA,
    PPM,
    ConvMLP,
    DistanceMatcher,
    InstanceConsistencyLoss,
    InstanceContrastLoss,
    PixProLoss,
)


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


class PixProInstance(pl.LightningModule):
    """``L = L_PixPro + alpha * L_instance`` (Xie et al., CVPR 2021, Eq. 6).

    Args:
        backbone: name of a torchvision or timm model.
        layer: to cut it after.
        init: ``"random"``, ``"imagenet"``, or a file to go on from.
        instance: ``"consistency"`` (published code) or ``"contrast"`` (paper, in our form).
        alpha: weight of the instance term, 1 in the paper.
        hidden_dim: of the heads.
        dim: of the projections.
        threshold: T, in cell diagonals.
        pixel_distances: measure in pixels, not per axis as published; for images far from square.
        lr_at_1024: learning rate at 1,024 images a step; others follow by the square-root rule.
        weight_decay: of weights of more than one dimension.
        warmup: share of the steps.
        momentum: of the target encoder at the start.
        compile: torch.compile the encoders.
        size: side of the views; linked to ``data.size``.
        channels: of the images; linked to ``data.channels``.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        layer: str = "layer4",
        init: str = "random",
        instance: Literal["consistency", "contrast"] = "consistency",
        alpha: float = 1.0,
        hidden_dim: int = 4096,
        dim: int = 256,
        threshold: float = 0.7,
        pixel_distances: bool = False,
        lr_at_1024: float = 4.0,
        weight_decay: float = 1e-5,
        warmup: float = 0.05,
        momentum: float = 0.99,
        compile: bool = False,
        size: int = 224,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        features, width = make_backbone(backbone, layer, init, size, channels)
        self.encoder = TwoHeads(features, width, hidden_dim, dim)
        self.ppm = PPM(nn.Conv2d(dim, dim, 1))
        # The predictor is BYOL's guard against collapse; contrast has negatives instead.
        self.predictor = ConvMLP(dim, hidden_dim, dim) if instance == "consistency" else nn.Identity()
        self.target = EMA(self.encoder)
        self.match, self.pixel_loss = DistanceMatcher(threshold), PixProLoss()
        self.instance_loss = (
            InstanceConsistencyLoss() if instance == "consistency" else InstanceContrastLoss(gather_distributed=True)
        )
        if compile:
            self.encoder.compile()
            self.target.module.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2 = batch.view1, batch.view2
        (z1, w1), (z2, w2) = self.encoder(view1.image), self.encoder(view2.image)
        (t1, v1), (t2, v2) = self.target(view1.image), self.target(view2.image)
        source_size = view1.source_size if self.hparams.pixel_distances else None
        size = z1.shape[-2:]
        valid1, valid2 = valid_cells(view1, size), valid_cells(view2, size)
        mask = self.match(view1.coords, view2.coords, size, size, source_size, valid1, valid2)
        y1, y2 = self.ppm(z1, valid1), self.ppm(z2, valid2)
        pixel = 2 * (self.pixel_loss(y1, t2, mask) + self.pixel_loss(y2, t1, mask.mT))

        # As published the predictor comes before the pooling. Ours pools the whole map, theirs a fixed 7x7.
        p1, v1 = (mean_over_cells(x, valid1) for x in (self.predictor(w1), v1))
        p2, v2 = (mean_over_cells(x, valid2) for x in (self.predictor(w2), v2))
        instance = self.instance_loss(p1, v2) + self.instance_loss(p2, v1)
        loss = pixel + self.hparams.alpha * instance

        self.log_dict({"loss": loss, "loss/pixel": pixel, "loss/instance": instance}, prog_bar=True)
        if is_logged(self.trainer):
            self.log_dict(health(z1.detach(), t2, mask, valid1, valid2))
            self.log("momentum", self.target.momentum(self.target.step))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.target.update(self.encoder)

    def on_fit_start(self) -> None:
        start_target(self.target, self.encoder, self.trainer, self.hparams.momentum)

    def configure_optimizers(self) -> Any:
        h = self.hparams
        trained = nn.ModuleList([self.encoder, self.ppm, self.predictor])
        return lars_with_warmup(trained, self.trainer, h.lr_at_1024, h.weight_decay, h.warmup)


if __name__ == "__main__":
    run(PixProInstance)
