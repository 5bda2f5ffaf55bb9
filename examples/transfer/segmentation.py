"""Semantic segmentation: fine-tunes an FCN on a pretrained ResNet, and measures its mIoU.

    python examples/transfer/segmentation.py fit --config examples/transfer/configs/cityscapes_fcn_r50.yaml \
        --data.folder CITYSCAPES --model.pretrained CHECKPOINT

Evaluate again: ``validate`` (or ``test``, where test labels are public) in place of ``fit``, with ``--ckpt_path FILE``.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision.models import ResNet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN

from examples.transfer.common.command import run
from examples.transfer.common.weights import make_resnet
from examples.transfer.datasets.segmentation_data import SegmentationData
from examples.transfer.datasets.segmentation_sets import IGNORE


class Segmentation(pl.LightningModule):
    """An FCN of output stride 16, trained end to end.

    Args:
        classes: Number of classes, background included: that of the data set, 19 for cityscapes, 21 for voc and 11 for
            camvid; of your own masks the number of lines in ``classes.txt``.
        backbone: Name of a torchvision ResNet, as ``resnet50``.
        pretrained: Where the backbone's weights come from: the path of a checkpoint of densessl or of a file that
            ``densessl export`` wrote; ``imagenet``, which downloads torchvision's weights, trained with ImageNet's
            labels; or ``none``, for random weights.
        lr: Learning rate at the start, above 0. It falls to a tenth once 0.7 of the steps are done, and to a
            hundredth at 0.9; it does not follow the batch size.
        momentum: Momentum of SGD, in 0..1.
        weight_decay: Weight decay of all parameters, at least 0.
    """

    def __init__(
        self,
        classes: int,
        backbone: str = "resnet50",
        pretrained: str = "none",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        resnet = make_resnet(backbone, pretrained)
        keep_stride_16(resnet)
        self.net = FCN(IntermediateLayerGetter(resnet, {"layer4": "out"}), fcn_head(resnet.inplanes, classes))
        self.metrics = nn.ModuleDict({stage: segmentation_metrics(classes) for stage in ("val", "test")})

    def setup(self, stage: str) -> None:
        classes = self.trainer.datamodule.classes
        if classes != self.hparams.classes:
            raise ValueError(
                f"model.classes: expected {classes}, the classes of {self.trainer.datamodule.dataset}, "
                f"got {self.hparams.classes}"
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, classes = batch
        logits = self.net(images)["out"]
        # A crop may hold ignored pixels only: the plain mean over no pixel would be NaN.
        counted = (classes != IGNORE).sum().clamp(min=1)
        loss = F.cross_entropy(logits.float(), classes, ignore_index=IGNORE, reduction="sum") / counted
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.metrics["val"].update(self.net(batch[0])["out"], batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.metrics["test"].update(self.net(batch[0])["out"], batch[1])

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        values = self.metrics[stage].compute()  # over all processes
        self.metrics[stage].reset()
        self.log(f"{stage}/miou", values["miou"], prog_bar=True, sync_dist=True)
        self.log(f"{stage}/pixel_accuracy", values["pixel_accuracy"], sync_dist=True)
        for number, value in enumerate(values["iou"]):
            self.log(f"{stage}/iou_{number:02}", value, sync_dist=True)

    def configure_optimizers(self) -> Any:
        h, steps = self.hparams, self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("trainer: expected a budget, max_epochs or max_steps, got none")
        optimizer = torch.optim.SGD(self.net.parameters(), h.lr, momentum=h.momentum, weight_decay=h.weight_decay)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.7 * steps), round(0.9 * steps)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def keep_stride_16(resnet: ResNet) -> None:
    """Lets layer4 keep the map of layer3, each of its cells seeing what it saw.

    For bottleneck blocks this is torchvision's ``replace_stride_with_dilation``, which basic blocks do not have.
    """
    for module in resnet.layer4.modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (2, 2)


def fcn_head(width: int, classes: int, hidden: int = 256, dilation: int = 6) -> nn.Sequential:
    """Two dilated 3x3 convolutions, then one logit for each class and cell.

    Args:
        width: Number of channels of the backbone's map.
        classes: Number of logits.
        hidden: Number of channels in between.
        dilation: Dilation of the 3x3 convolutions, in cells.
    """
    layers: list[nn.Module] = []
    for channels in (width, hidden):
        layers += [
            nn.Conv2d(channels, hidden, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(hidden, classes, 1))


def segmentation_metrics(classes: int) -> MetricCollection:
    """Counted over the pixels of all images; a class neither labelled nor predicted is NaN, and not in the mean."""
    return MetricCollection({
        "miou": MulticlassJaccardIndex(classes, average="macro", ignore_index=IGNORE),
        "iou": MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORE, zero_division=math.nan),
        "pixel_accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORE),
    })  # fmt: skip


if __name__ == "__main__":
    run(Segmentation, SegmentationData)
