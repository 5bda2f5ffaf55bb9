"""The ImageNet linear probe: a linear classifier on the pooled features of a frozen ResNet.

    python examples/transfer/linear.py fit --config examples/transfer/configs/imagenet_linear_r50.yaml \
        --data.folder IMAGENET --model.pretrained CHECKPOINT
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from examples.transfer.common.command import run
from examples.transfer.common.weights import make_resnet
from examples.transfer.datasets.linear_data import ImageFolders


class LinearProbe(pl.LightningModule):
    """The backbone gives features and nothing else: no gradient, batch norm in evaluation mode.

    Args:
        classes: Number of classes.
        backbone: Name of a torchvision ResNet.
        pretrained: Where the backbone's weights come from: the path of a checkpoint of densessl or of a file that
            ``densessl export`` wrote; ``imagenet``, which downloads torchvision's weights, trained with ImageNet's
            labels; or ``none``, for random weights.
        lr_at_256: Learning rate at 256 images a step; others follow in proportion.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of the classifier, at least 0.
        warmup_epochs: Number of epochs in which the learning rate rises; a cosine to 0 follows.
    """

    def __init__(
        self,
        classes: int = 1000,
        backbone: str = "resnet50",
        pretrained: str = "none",
        lr_at_256: float = 30.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_epochs: float = 5.0,
    ) -> None:
        super().__init__()
        if not lr_at_256 > 0:
            raise ValueError(f"model.lr_at_256: expected a positive learning rate, got {lr_at_256}")
        self.save_hyperparameters()
        # It pools, and its own fc is an identity. Lightning trains in the modes that it finds, so eval() here as well.
        self.backbone = make_resnet(backbone, pretrained).requires_grad_(False).eval()
        self.classifier = nn.Linear(self.backbone.inplanes, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.accuracy = MetricCollection({
            f"val/top{k}": MulticlassAccuracy(classes, top_k=k, average="micro") for k in (1, 5) if k < classes
        })  # fmt: skip

    def setup(self, stage: str) -> None:
        found = len(self.trainer.datamodule.classes)
        if found != self.hparams.classes:
            raise ValueError(
                f"model.classes: expected {found}, the folders of {self.trainer.datamodule.folder}/train, "
                f"got {self.hparams.classes}"
            )

    def train(self, mode: bool = True) -> LinearProbe:
        """Leaves the backbone in evaluation mode: batch norm would go on collecting statistics."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(images)
        return self.classifier(features)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy.update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.accuracy.compute(), prog_bar=True, sync_dist=True)
        self.accuracy.reset()

    def configure_optimizers(self) -> Any:
        h, steps = self.hparams, self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("trainer: expected a budget, max_epochs or max_steps, got none")
        lr = h.lr_at_256 * self.trainer.datamodule.batch_size * self.trainer.accumulate_grad_batches / 256
        optimizer = torch.optim.SGD(self.classifier.parameters(), lr, momentum=h.momentum, weight_decay=h.weight_decay)
        epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warm = max(1, min(round(h.warmup_epochs * epoch), steps - 1))
        schedules = [LinearLR(optimizer, 0.01, total_iters=warm), CosineAnnealingLR(optimizer, steps - warm)]
        schedule = SequentialLR(optimizer, schedules, milestones=[warm])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    run(LinearProbe, ImageFolders)
