"""Batches for detection: Pascal VOC or COCO's layout, whole images and their targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.transforms import v2

from examples.transfer.common.batches import check_batch_size, evaluation_loader, training_loader
from examples.transfer.datasets.coco_boxes import CocoBoxes, coco_boxes, keep_share
from examples.transfer.datasets.voc_boxes import NAMES, voc_boxes

Batch = tuple[tuple[Tensor, ...], tuple[dict[str, Tensor], ...]]


class Boxes(pl.LightningDataModule):
    """Training images, flipped at random, and evaluation images; the detector resizes both.

    Args:
        layout: ``"voc"`` (VOCdevkit with its xml files) or ``"coco"`` (a json file per split).
        folder: Folder that holds ``VOCdevkit``, or what ``images`` and ``annotations`` name.
        train: Splits to train on, together: ``VOC2007/trainval`` or ``train2017``.
        val: Splits to evaluate on.
        images: Folder of a split's images, in COCO's layout.
        annotations: File of a split's annotations, in COCO's layout.
        masks: Whether to read instance masks too. COCO's layout only.
        batch_size: Number of images of a step over all processes.
        workers: Number of reading processes per GPU.
        share: Share of the training images whose labels are used, in (0, 1]; a fixed list for every seed. COCO's
            layout only.
        share_seed: Seed of that list.
        drop_degenerate: Whether to leave boxes of no area out, by name in the log, in place of an error. COCO's layout
            only.
    """

    def __init__(
        self,
        layout: Literal["voc", "coco"],
        folder: str,
        train: list[str],
        val: list[str],
        images: str = "{split}",
        annotations: str = "annotations/instances_{split}.json",
        masks: bool = False,
        batch_size: int = 16,
        workers: int = 8,
        share: float = 1.0,
        share_seed: int = 0,
        drop_degenerate: bool = False,
    ) -> None:
        super().__init__()
        if layout == "voc" and (masks or share != 1 or drop_degenerate):
            raise ValueError("data.masks, data.share, data.drop_degenerate: expected none of them for data.layout voc")
        self.layout, self.folder, self.splits = layout, folder, {"train": train, "val": val}
        self.images, self.annotations, self.masks = images, annotations, masks
        self.batch_size, self.workers = batch_size, workers
        self.share, self.share_seed, self.drop_degenerate = share, share_seed, drop_degenerate
        self._categories: tuple[Path, str] | None = None  # of the first file that was opened

    def setup(self, stage: str) -> None:
        """Opens what the stage reads, and checks every annotation before a step is made."""
        if stage == "fit":
            self.train = self._open("train", v2.Compose([v2.RandomHorizontalFlip(), v2.ToPureTensor()]))
            what = f"images with objects in {self.folder}"
            check_batch_size(self.batch_size, len(self.train), self.trainer.world_size, what)
        self.val = self._open("val", v2.ToPureTensor())

    def _open(self, stage: str, transform: v2.Transform) -> Dataset:
        parts, classes = [], len(NAMES)
        for split in self.splits[stage]:
            if self.layout == "voc":
                parts.append(voc_boxes(self.folder, split, transform))
                continue
            images = Path(self.folder, self.images.format(split=split))
            annotations = Path(self.folder, self.annotations.format(split=split))
            part = coco_boxes(images, annotations, transform, self.masks, stage == "train", self.drop_degenerate)
            self._check_categories(part, annotations)
            if not part.coco.anns:
                purpose = "train" if stage == "train" else "evaluate"
                raise ValueError(
                    f"{annotations}: expected objects to {purpose} on, got none in {len(part.coco.imgs)} images"
                )
            if stage == "train" and self.share != 1:
                keep_share(part, self.share, self.share_seed)
            parts.append(part)
            classes = len(part.coco.cats)
            expected = self.trainer.lightning_module.hparams.classes
            if classes != expected:
                raise ValueError(f"model.classes: expected {classes}, the categories of {annotations}, got {expected}")
        return ConcatDataset(parts)

    def _check_categories(self, part: CocoBoxes, annotations: Path) -> None:
        """Labels go by the order of a file's ids: in all files one number has to mean one thing."""
        named = sorted((number, entry.get("name", "")) for number, entry in part.coco.cats.items())
        here = ", ".join(f"{number} {name}".rstrip() for number, name in named)
        first, there = self._categories = self._categories or (annotations, here)
        if here != there:
            raise ValueError(f"{annotations}: expected the categories of {first}, {there}, got {here}")

    def train_dataloader(self) -> DataLoader:
        """Whole batches, shuffled."""
        return training_loader(self.train, self.batch_size // self.trainer.world_size, self.workers, _as_lists)

    def val_dataloader(self) -> DataLoader:
        """Single images: masks of a hundred detections each are large."""
        return evaluation_loader(self.val, 1, self.workers, _as_lists)


def _as_lists(samples: list[Any]) -> Batch:
    """Images keep their sizes: nothing is stacked."""
    images, targets = zip(*samples, strict=True)
    return images, targets
