"""DetCon on a folder of images, in the form built on BYOL (DetCon-B).

    python examples/pretrain/detcon.py fit --config examples/pretrain/detcon_r50_300ep.yaml --data.folder FOLDER

Each image is divided into segments before the views are cut, ``data.segments``; the views' coords are not used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from backbones import make_backbone
from engine import health, is_logged, run, start_target
from lightly.utils.dist import gather
from linear_rule import lars_by_linear_rule
from reading import Batch, seed_of
from torch import Tensor, nn

from densessl import EMA, MLP, MaskedInfoNCELoss, cell_labels, pool_regions, sample_labels


class Regions(NamedTuple):
    """Of one view: vectors ``(B, R, C)``, and the segments they belong to ``(B, R)``, 0 for none."""

    vectors: Tensor
    ids: Tensor


class Encoder(nn.Module):
    """A backbone, the mean over each region of its map, and a projection head."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = MLP(width, hidden_dim, dim)

    def forward(self, image: Tensor, mask: Tensor, draws: Tensor) -> Regions:
        features = self.backbone(image)
        labels = cell_labels(mask, features.shape[-2:])
        ids = sample_labels(labels, draws)
        means, _ = pool_regions(features, labels, ids)
        return Regions(self.projector(means.flatten(0, 1)).unflatten(0, ids.shape), ids)


class DetCon(pl.LightningModule):
    """Contrastive detection (Henaff et al., ICCV 2021): regions of the same segment against all others of the batch.

    Args:
        backbone: name of a torchvision or timm model.
        layer: to cut it after.
        init: ``"random"``, ``"imagenet"``, or a file to go on from.
        hidden_dim: of the projection and the prediction head.
        dim: of the projections.
        regions: to draw in each view.
        temperature: of the softmax.
        lr_at_256: learning rate at 256 images a step; others follow by the linear rule.
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
        regions: int = 16,
        temperature: float = 0.1,
        lr_at_256: float = 0.3,
        weight_decay: float = 1e-6,
        warmup: float = 0.01,
        momentum: float = 0.99,
        compile: bool = False,
        size: int = 224,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if regions < 1:
            raise ValueError(f"model.regions: expected at least 1, got {regions}")
        self.save_hyperparameters()
        features, width = make_backbone(backbone, layer, init, size, channels)
        self.encoder = Encoder(features, width, hidden_dim, dim)
        self.predictor = MLP(dim, hidden_dim, dim)
        self.target = EMA(self.encoder)
        # Not lightly's DetConBLoss: 1.5.14 does not have it, and in 1.6.0 regions that are not there are negatives.
        self.loss = MaskedInfoNCELoss(temperature, reduction="none")
        if compile:
            self.encoder.compile()
            self.target.module.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views = [(v.image, v.mask, self.draws(i, len(v.mask))) for i, v in enumerate((batch.view1, batch.view2))]
        z1, z2 = (self.encoder(*view) for view in views)
        t1, t2 = (self.target(*view) for view in views)
        q1, q2 = self.predicted(z1), self.predicted(z2)
        k1, k2 = (t if self.trainer.world_size == 1 else Regions(*(torch.cat(gather(x)) for x in t)) for t in (t1, t2))
        loss = self.region_loss(q1, k1, k2) + self.region_loss(q2, k2, k1)

        self.log("loss", loss, prog_bar=True)
        if is_logged(self.trainer):
            same = (z1.ids[:, :, None] == t2.ids[:, None]) & (z1.ids > 0)[:, :, None]
            self.log_dict(health(z1.vectors.detach(), t2.vectors, same, z1.ids > 0, t2.ids > 0))
            self.log("momentum", self.target.momentum(self.target.step))
        return loss

    def predicted(self, regions: Regions) -> Regions:
        """With the prediction head behind them."""
        vectors = regions.vectors
        return Regions(self.predictor(vectors.flatten(0, 1)).view_as(vectors), regions.ids)

    def region_loss(self, query: Regions, own: Regions, other: Regions) -> Tensor:
        """One direction: regions of a view against the target's of the other and of its own view, of all processes."""
        images = torch.arange(len(own.ids), device=own.ids.device)[:, None] << 32
        first = self.global_rank * len(query.ids)
        region = (images[first : first + len(query.ids)] + query.ids).flatten()[:, None]
        # Regions are the same where image and segment are. The same one in the own view is no negative either.
        same_own, same_other = (region == (images + keys.ids).flatten() for keys in (own, other))
        there_own, there_other = (keys.ids.flatten() > 0 for keys in (own, other))
        positive = torch.cat([same_other & there_other, torch.zeros_like(same_own)], 1)
        negative = torch.cat([~same_other & there_other, ~same_own & there_own], 1)
        keys = torch.cat([other.vectors, own.vectors]).flatten(0, 1)
        per_region = self.loss(query.vectors.flatten(0, 1), keys, positive, negative)
        # A segment that was drawn several times counts once.
        copies = (query.ids[:, :, None] == query.ids[:, None]).sum(2)
        return (per_region / copies.flatten()).mean()

    def draws(self, view: int, images: int) -> Tensor:
        """What decides on the regions of this process's images: a function of seed, batch, image and view."""
        batch = self.trainer.fit_loop.epoch_loop.total_batch_idx
        generator = torch.Generator().manual_seed(seed_of(self.trainer.datamodule.seed, batch, view))
        drawn = torch.rand(self.trainer.world_size * images, self.hparams.regions, generator=generator)
        return drawn[self.global_rank * images :][:images].to(self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.target.update(self.encoder)

    def on_fit_start(self) -> None:
        if self.trainer.datamodule.segments == "none":  # there may be a mask all the same, of data.nodata
            raise ValueError("data.segments: expected 'felzenszwalb' or 'grid', got 'none'")
        start_target(self.target, self.encoder, self.trainer, self.hparams.momentum)

    def configure_optimizers(self) -> Any:
        h = self.hparams
        trained = nn.ModuleList([self.encoder, self.predictor])
        return lars_by_linear_rule(trained, self.trainer, h.lr_at_256, h.weight_decay, h.warmup)


if __name__ == "__main__":
    run(DetCon)
