"""Object detection and instance segmentation: fine-tunes a detector on a pretrained ResNet, and measures its AP.

    python examples/transfer/detection.py fit --config examples/transfer/configs/voc_frcnn_r50_c4.yaml \
        --data.folder FOLDER_OF_VOCDEVKIT --model.pretrained CHECKPOINT

Evaluate again: ``validate`` in place of ``fit``, with ``--ckpt_path FILE``.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchmetrics.detection import MeanAveragePrecision

from examples.transfer.common.command import run
from examples.transfer.common.detectors import faster_rcnn_c4, fcos_fpn, mask_rcnn_c4, mask_rcnn_fpn
from examples.transfer.common.weights import load_pyramid, make_resnet
from examples.transfer.datasets.boxes import Batch, Boxes

# COCO's own thresholds: torchmetrics makes them in float32, which costs up to 0.0005 of AP.
OVERLAPS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0, 1, 101).tolist()
ELEVEN = [k / 10 for k in range(11)]  # recalls at which VOC 2007 reads the precision
FIGURES = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}


class Detection(pl.LightningModule):
    """A detector of torchvision's parts, trained end to end: SGD, warm-up, two steps down.

    Args:
        detector: Name of the detector; detectors.py has them all.
        classes: Number of object classes, without the background.
        backbone: Name of a torchvision ResNet.
        pretrained: Where the backbone's weights come from: the path of a checkpoint of densessl or of a file that
            ``densessl export`` wrote; ``imagenet``, which downloads torchvision's weights, trained with ImageNet's
            labels; or ``none``, for random weights.
        sizes: Lengths of the shorter side in pixels, one is drawn in training; the last is the test's.
        max_size: Greatest length of the longer side in pixels.
        rois: Number of regions that are sampled per image in training, for detectors with proposals.
        lr_at_16: Learning rate at 16 images a step; others follow by the linear rule, lr = lr_at_16 * batch / 16.
        warmup: Number of steps in which the learning rate rises linearly from a thousandth of itself.
        drops: Steps at which the learning rate falls to a tenth.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of all parameters but those of norms, at least 0.
        precise_bn: Number of training batches that set batch norm's statistics anew before each evaluation; 0: none.
    """

    def __init__(
        self,
        detector: Literal["faster_rcnn_c4", "mask_rcnn_c4", "mask_rcnn_fpn", "fcos_fpn"],
        classes: int,
        backbone: str = "resnet50",
        pretrained: str = "none",
        sizes: tuple[int, ...] = (800,),
        max_size: int = 1333,
        rois: int = 512,
        lr_at_16: float = 0.02,
        warmup: int = 1000,
        drops: tuple[int, ...] = (60000, 80000),
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        precise_bn: int = 200,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not lr_at_16 > 0:
            raise ValueError(f"model.lr_at_16: expected a positive learning rate, got {lr_at_16}")
        if not sizes or min(sizes) < 1 or max(sizes) > max_size:
            raise ValueError(f"model.sizes: expected lengths from 1 to model.max_size = {max_size}, got {sizes}")
        resnet = make_resnet(backbone, pretrained)
        if detector == "faster_rcnn_c4":
            self.detector = faster_rcnn_c4(resnet, classes, sizes, max_size, rois)
        elif detector == "mask_rcnn_c4":
            self.detector = mask_rcnn_c4(resnet, classes, sizes, max_size, rois)
        elif detector == "mask_rcnn_fpn":
            self.detector = mask_rcnn_fpn(resnet, classes, sizes, max_size, rois)
        else:
            self.detector = fcos_fpn(resnet, classes, sizes, max_size)
        load_pyramid(self.detector, pretrained)
        self.masks = detector.startswith("mask")
        self.coco_ap = MeanAveragePrecision(
            iou_type=("bbox", "segm") if self.masks else "bbox", iou_thresholds=OVERLAPS, rec_thresholds=RECALLS
        )
        self.voc_ap = MeanAveragePrecision(iou_thresholds=OVERLAPS, rec_thresholds=ELEVEN)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data.masks != self.masks:
            raise ValueError(f"data.masks: expected {self.masks} for {self.hparams.detector}, got {data.masks}")
        if data.layout == "voc" and self.hparams.classes != 20:
            raise ValueError(f"model.classes: expected the 20 of Pascal VOC, got {self.hparams.classes}")

    def forward(self, batch: Batch) -> Any:
        """Losses in training, detections in evaluation."""
        images, targets = batch
        return self.detector([image.float() / 255 for image in images], list(targets) if self.training else None)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self(batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("loss", loss.detach(), prog_bar=True)
        self.log_dict({f"loss/{name.removeprefix('loss_')}": value.detach() for name, value in losses.items()})
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0 and not torch.isfinite(loss):
            # asked in logged steps only: reading a value stalls the GPU
            raise RuntimeError(f"loss is {loss.item()} at step {self.trainer.global_step}: lower model.lr_at_16")
        return loss

    def on_validation_start(self) -> None:
        """Statistics of batch norm over many training batches, in place of the running ones, as published."""
        if self.hparams.precise_bn and self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            batches = islice(self.trainer.train_dataloader, self.hparams.precise_bn)
            # update_bn takes the first item of what it is given
            update_bn(([self.transfer_batch_to_device(batch, self.device, 0)] for batch in batches), self)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        targets = list(batch[1])
        found = self(batch)
        if self.masks:
            found = [{**one, "masks": one["masks"][:, 0] > 0.5} for one in found]
            targets = [{**one, "masks": one["masks"].bool()} for one in targets]
        self.coco_ap.update(found, targets)
        if self.trainer.datamodule.layout == "voc":
            self.voc_ap.update(found, targets)

    def on_validation_epoch_end(self) -> None:
        """Figures in percent, over all processes."""
        values = self.coco_ap.compute()
        kinds = {"box": "bbox_", "mask": "segm_"} if self.masks else {"box": ""}
        figures = {f"val/{name}_{ap}": values[key + of] for name, key in kinds.items() for ap, of in FIGURES.items()}
        if self.trainer.datamodule.layout == "voc":
            values = self.voc_ap.compute()
            figures |= {f"val/voc07_{ap}": values[of] for ap, of in FIGURES.items()}
        self.log_dict({name: 100 * value for name, value in figures.items()}, prog_bar=True, sync_dist=True)
        self.coco_ap.reset()
        self.voc_ap.reset()

    def configure_optimizers(self) -> Any:
        h, data = self.hparams, self.trainer.datamodule
        lr = h.lr_at_16 * data.batch_size * self.trainer.accumulate_grad_batches / 16
        norms = [m for m in self.detector.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm))]
        plain = [parameter for norm in norms for parameter in norm.parameters()]
        known = {id(parameter) for parameter in plain}
        decayed = [parameter for parameter in self.detector.parameters() if id(parameter) not in known]
        groups = [{"params": decayed, "weight_decay": h.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr, momentum=h.momentum)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.share_of_lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def share_of_lr(self, step: int) -> float:
        """Linear warm-up times a tenth for each drop behind."""
        h = self.hparams
        warm = 1.0 if step >= h.warmup else 0.001 + 0.999 * step / h.warmup
        return warm * 0.1 ** sum(step >= drop for drop in h.drops)


if __name__ == "__main__":
    run(Detection, Boxes)
