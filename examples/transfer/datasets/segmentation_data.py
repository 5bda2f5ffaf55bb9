"""Batches for semantic segmentation: the random scale, crop and flip of training, whole images of evaluation."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from examples.transfer.common.batches import check_batch_size, evaluation_loader, training_loader
from examples.transfer.datasets.own_masks import required_class_names
from examples.transfer.datasets.segmentation_sets import CLASSES, IGNORE, open_set


class RandomScale(v2.Transform):
    """Resizes both sides by one factor, drawn from a range.

    v2.ScaleJitter and v2.RandomResize scale to a given size, whatever the image's own.

    Args:
        scale: Smallest and largest factor.
    """

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = float(torch.empty(()).uniform_(*self.scale))
        return {"size": [max(1, round(side * factor)) for side in F.get_size(flat_inputs[0])]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, params["size"], antialias=True)  # masks: nearest


class SegmentationData(pl.LightningDataModule):
    """Training batches of crops; validation and test images whole, one at a time, as they are.

    Args:
        dataset: Which layout the folder has: that of ``cityscapes``, ``voc`` (VOC 2012) or ``camvid``; ``own`` is for
            masks of your own: photos in ``images``, in ``masks`` a PNG of the same name for each, and ``classes.txt``
            with the name of a class a line.
        folder: Folder of the data set, the one that holds ``leftImg8bit``, ``VOCdevkit`` or ``images``.
        crop: Height and width of the training crops in pixels. An image that is smaller is filled up with the mean
            colour, which does not count.
        scale: Smallest and largest factor, above 0, by which a training image is resized before it is cropped.
        batch_size: Number of images of a step, summed over all GPUs; a multiple of their number.
        workers: Number of processes that read images, for each GPU; 0 reads in the training's own process.
        sbd: Folder of the Semantic Boundaries Dataset, to train on VOC with its 10,582 images. By default VOC's own
            1,464 are trained on.
    """

    def __init__(
        self,
        dataset: Literal["cityscapes", "voc", "camvid", "own"],
        folder: str,
        crop: tuple[int, int] = (769, 769),
        scale: tuple[float, float] = (0.5, 2.0),
        batch_size: int = 16,
        workers: int = 8,
        sbd: str | None = None,
    ) -> None:
        super().__init__()
        if sbd is not None and dataset != "voc":
            raise ValueError(f"data.sbd: expected none for {dataset}: it adds to the training images of voc")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"data.scale: expected 0 < smallest <= largest, got {scale}")
        self.dataset, self.folder, self.sbd = dataset, folder, sbd
        self.classes = len(required_class_names(folder)) if dataset == "own" else CLASSES[dataset]
        self.batch_size, self.workers = batch_size, workers
        normalize = [v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
                     v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]  # fmt: skip
        mean_color = [round(255 * mean) for mean in IMAGENET_MEAN]
        self.for_training = v2.Compose([
            RandomScale(scale),
            v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Image: mean_color, tv_tensors.Mask: IGNORE}),
            v2.RandomHorizontalFlip(),
            *normalize,
        ])  # fmt: skip
        self.for_evaluation = v2.Compose(normalize)

    def setup(self, stage: str) -> None:
        """Opens what the stage reads, and checks it before a step is made."""
        if stage == "test" and self.dataset not in ("camvid", "own"):
            raise ValueError(f"data.dataset: the test labels of {self.dataset} are not public: run validate")
        if stage == "fit":
            self.train = open_set(self.dataset, self.folder, "train", self.for_training, self.sbd)
            check_batch_size(self.batch_size, len(self.train), self.trainer.world_size, f"images of {self.folder}")
        if stage in ("fit", "validate"):
            self.val = open_set(self.dataset, self.folder, "val", self.for_evaluation)
        if stage == "test":
            self.test = open_set(self.dataset, self.folder, "test", self.for_evaluation)

    def train_dataloader(self) -> DataLoader:
        """Whole batches of crops."""
        return training_loader(self.train, self.batch_size // self.trainer.world_size, self.workers)

    def val_dataloader(self) -> DataLoader:
        """Single images of their own sizes."""
        return evaluation_loader(self.val, 1, self.workers)

    def test_dataloader(self) -> DataLoader:
        """As in validation."""
        return evaluation_loader(self.test, 1, self.workers)
