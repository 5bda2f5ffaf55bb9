"""PixPro on a folder of images.

    python examples/pretrain/pixpro.py fit --config examples/pretrain/pixpro_r50_100ep.yaml --data.folder IMAGENET/train

One GPU, several (``torchrun --nproc-per-node 8`` or ``--trainer.devices 8``) or several nodes: the same file.
Continue a run that was stopped: the same line with ``--ckpt_path last``.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from backbones import make_backbone
from engine import health, is_logged, lars_with_warmup, run, start_target
from reading import Batch, valid_cells
from torch import Tensor, nn

from densessl import EMA, PPM, ConvMLP, DistanceMatcher, PixProLoss


class PixPro(pl.LightningModule):
    """Pixel-to-propagation consistency (Xie et al., CVPR 2021), as published.

    Args:
        backbone: name of a torchvision or timm model.
        layer: to cut it after.
        init: ``"random"``, ``"imagenet"``, or a file to go on from.
        hidden_dim: of the projection head.
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
        self.encoder = nn.Sequential(features, ConvMLP(width, hidden_dim, dim))
        self.ppm = PPM(nn.Conv2d(dim, dim, 1))
        self.target = EMA(self.encoder)
        self.match, self.loss = DistanceMatcher(threshold), PixProLoss()
        if compile:
            self.encoder.compile()
            self.target.module.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2 = batch.view1, batch.view2
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        source_size = view1.source_size if self.hparams.pixel_distances else None
        size = z1.shape[-2:]
        valid1, valid2 = valid_cells(view1, size), valid_cells(view2, size)
        mask = self.match(view1.coords, view2.coords, size, size, source_size, valid1, valid2)
        loss = 2 * (self.loss(self.ppm(z1, valid1), t2, mask) + self.loss(self.ppm(z2, valid2), t1, mask.mT))

        self.log("loss", loss, prog_bar=True)
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
        trained = nn.ModuleList([self.encoder, self.ppm])
        return lars_with_warmup(trained, self.trainer, h.lr_at_1024, h.weight_decay, h.warmup)


if __name__ == "__main__":
    run(PixPro)
