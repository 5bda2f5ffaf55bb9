"""PixPro on a feature pyramid: pretrains backbone, FPN and FCOS's towers, with the pixel task at every level.

    python examples/pretrain/pixpro_fpn.py fit --config examples/pretrain/pixpro_fpn_r50.yaml --data.folder FOLDER

The paper reports such a pretraining (Xie et al., CVPR 2021, "aligning pre-training to downstream networks"); its
settings were not published as code and were not found. Levels, heads and weights here are our choice: docs, page "FPN
and head". What comes out loads into torchvision's ``fcos_resnet50_fpn`` and ``examples/transfer/detection.py``.
"""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from engine import health, is_logged, lars_with_warmup, run, start_target
from fcos_trunk import make_trunk
from reading import Batch, valid_cells
from torch import Tensor, nn

from densessl import EMA, PPM, ConvMLP, DistanceMatcher, PerLevel, PixProLoss, level_mean, level_sizes


class PixProFPN(pl.LightningModule):
    """PixPro's loss at every level of a pyramid, mean over levels; parts and settings otherwise as in pixpro.py.

    Args:
        backbone: name of a torchvision ResNet.
        top: the last level, from P3 on.
        towers: pretrain the convolutions of FCOS's head too; False: backbone and FPN.
        propagation: one pixel propagation module (PPM) for all levels, or one per level. The projection is shared.
        init: ``"random"``, ``"imagenet"``, or a file to go on from.
        hidden_dim: of the projection head.
        dim: of the projections.
        threshold: T, in cell diagonals of each level.
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
        top: Literal["p5", "p6", "p7"] = "p6",
        towers: bool = True,
        propagation: Literal["shared", "per_level"] = "shared",
        init: str = "random",
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
        trunk = make_trunk(backbone, init, top, towers, size, channels)
        self.encoder = nn.Sequential(trunk, PerLevel(ConvMLP(trunk.width, hidden_dim, dim)))
        if propagation == "shared":
            self.ppm = PerLevel(PPM(nn.Conv2d(dim, dim, 1)))
        else:
            self.ppm = PerLevel({level: PPM(nn.Conv2d(dim, dim, 1)) for level in trunk.levels})
        self.target = EMA(self.encoder)
        self.match, self.loss = PerLevel(DistanceMatcher(threshold)), PerLevel(PixProLoss())
        if compile:
            self.encoder.compile()
            self.target.module.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2 = batch.view1, batch.view2
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        source_size = view1.source_size if self.hparams.pixel_distances else None
        sizes = level_sizes(z1)
        valid1, valid2 = ({level: valid_cells(v, size) for level, size in sizes.items()} for v in (view1, view2))
        masks = self.match(view1.coords, view2.coords, sizes, sizes, source_size, valid1, valid2)
        back = {level: mask.mT for level, mask in masks.items()}
        one, other = self.loss(self.ppm(z1, valid1), t2, masks), self.loss(self.ppm(z2, valid2), t1, back)
        losses = {level: 2 * (one[level] + other[level]) for level in masks}
        loss = level_mean(losses)

        self.log("loss", loss, prog_bar=True)
        self.log_dict({f"loss/{level}": value.detach() for level, value in losses.items()})
        if is_logged(self.trainer):
            parts = (z1, t2, masks, valid1, valid2)
            meters = {level: health(*(part[level] for part in parts)) for level in masks}
            self.log_dict({f"{name}/{level}": m for level, of in meters.items() for name, m in of.items()})
            # The worst level stands for all: it is what stops a run that collapses.
            std = "health/std_times_sqrt_c"
            self.log(std, torch.stack([of[std] for of in meters.values()]).min())
            self.log("momentum", self.target.momentum(self.target.step))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.target.update(self.encoder)

    def on_fit_start(self) -> None:
        start_target(self.target, self.encoder, self.trainer, self.hparams.momentum)

    def configure_optimizers(self) -> Any:
        h = self.hparams
        trained = nn.ModuleList([self.encoder, self.ppm])
        return lars_with_warmup(trained, self.trainer, h.lr_at_1024, h.weight_decay, h.warmup)


if __name__ == "__main__":
    run(PixProFPN)
