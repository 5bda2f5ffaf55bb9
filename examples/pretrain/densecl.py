"""DenseCL on a folder of images.

    python examples/pretrain/densecl.py fit --config examples/pretrain/densecl_r50_200ep.yaml --data.folder FOLDER

Cells are matched by the features of the backbone, not by their places: the views' coords are not used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytorch_lightning as pl
from backbones import make_backbone
from engine import health, is_logged, refuse_nodata, run
from lightly.models.modules import DenseCLProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle
from linear_rule import sgd_with_cosine
from reading import Batch
from torch import Tensor, nn

from densessl import (
    EMA,
    InfoNCELoss,
    KeyQueue,
    NearestMatcher,
    Pairs,
    feature_distance,
    gather_tokens,
    map_to_tokens,
    pairs_to_mask,
    tokens_to_map,
)


class Outputs(NamedTuple):
    """Of one view: the backbone's map, the projected map, and one projected vector per image."""

    features: Tensor
    cells: Tensor
    image: Tensor


class Encoder(nn.Module):
    """A backbone with a projection head for its cells and one for their mean."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.per_cell = DenseCLProjectionHead(width, hidden_dim, dim)
        self.per_image = DenseCLProjectionHead(width, hidden_dim, dim)

    def forward(self, image: Tensor) -> Outputs:
        features = self.backbone(image)
        cells = tokens_to_map(self.per_cell(map_to_tokens(features)), features.shape[-2:])
        return Outputs(features, cells, self.per_image(features.mean((2, 3))))


class DenseCL(pl.LightningModule):
    """Dense contrastive learning (Wang et al., CVPR 2021): MoCo v2, and the same between matched cells.

    Args:
        backbone: name of a torchvision or timm model.
        layer: to cut it after.
        init: ``"random"``, ``"imagenet"``, or a file to go on from.
        hidden_dim: of the projection heads.
        dim: of the projections.
        queue: number of keys in each of the two queues.
        temperature: of both softmaxes.
        dense_weight: lambda, the share of the dense loss.
        lr_at_256: learning rate at 256 images a step; others follow by the linear rule.
        weight_decay: of all parameters.
        momentum: of the target encoder, constant.
        compile: torch.compile the encoders.
        size: side of the views; linked to ``data.size``.
        channels: of the images; linked to ``data.channels``.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        layer: str = "layer4",
        init: str = "random",
        hidden_dim: int = 2048,
        dim: int = 128,
        queue: int = 65536,
        temperature: float = 0.2,
        dense_weight: float = 0.5,
        lr_at_256: float = 0.03,
        weight_decay: float = 1e-4,
        momentum: float = 0.999,
        compile: bool = False,
        size: int = 224,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if not 0 <= dense_weight <= 1:
            raise ValueError(f"model.dense_weight: expected a number in 0..1, got {dense_weight}")
        self.save_hyperparameters()
        features, width = make_backbone(backbone, layer, init, size, channels)
        self.encoder = Encoder(features, width, hidden_dim, dim)
        self.target = EMA(self.encoder, momentum)
        self.cell_queue, self.image_queue = KeyQueue(queue, dim), KeyQueue(queue, dim)
        self.match, self.loss = NearestMatcher(), InfoNCELoss(temperature)
        if compile:
            self.encoder.compile()
            self.target.module.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        query, key = self.encoder(batch.view1.image), self.keys(batch.view2.image)
        dense, instance, pairs = self.losses(query, key)
        loss = (1 - self.hparams.dense_weight) * instance + self.hparams.dense_weight * dense
        self.cell_queue.push(key.cells.mean((2, 3)))  # pooled: one negative of each image
        self.image_queue.push(key.image)

        self.log_dict({"loss": loss, "loss/dense": dense, "loss/instance": instance}, prog_bar=True)
        if is_logged(self.trainer):
            cells = (query.cells[0, 0].numel(), key.cells[0, 0].numel())
            self.log_dict(health(query.cells.detach(), key.cells, pairs_to_mask(pairs, cells)))
            self.log("momentum", self.hparams.momentum)
        return loss

    def losses(self, query: Outputs, key: Outputs) -> tuple[Tensor, Tensor, Pairs]:
        """The dense loss, the instance loss, and the pairs: each query cell with the key cell most similar to it."""
        # By the backbone's features, as published; the projections then follow.
        pairs = self.match(feature_distance(query.features.detach(), key.features))
        q = gather_tokens(map_to_tokens(query.cells), pairs.query)
        k = gather_tokens(map_to_tokens(key.cells), pairs.key)
        dense = self.loss(q, k, self.cell_queue.keys, pairs.valid)
        return dense, self.loss(query.image[:, None], key.image[:, None], self.image_queue.keys), pairs

    def keys(self, image: Tensor) -> Outputs:
        """The target's outputs; on several GPUs on images of all of them, shuffled as in MoCo.

        Otherwise the statistics of a batch norm that query and key share would tell them from the negatives.
        """
        if self.trainer.world_size == 1:
            return self.target(image)
        image, order = batch_shuffle(image, distributed=True)
        return Outputs(*(batch_unshuffle(x, order, distributed=True) for x in self.target(image)))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.target.update(self.encoder)

    def on_fit_start(self) -> None:
        refuse_nodata(self.trainer)

    def configure_optimizers(self) -> Any:
        return sgd_with_cosine(self.encoder, self.trainer, self.hparams.lr_at_256, self.hparams.weight_decay)


if __name__ == "__main__":
    run(DenseCL)
