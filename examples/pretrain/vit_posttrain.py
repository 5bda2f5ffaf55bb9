"""Dense post-training of a pretrained ViT on a folder of images.

python examples/pretrain/vit_posttrain.py fit --config examples/pretrain/vit_posttrain_dinov2_s14.yaml \
    --data.folder FOLDER

Patch tokens of two views are contrasted by their places. The weights start where they were published, and move little:
a small learning rate for the backbone, a larger one for the new head, a few epochs.
"""

from __future__ import annotations

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from backbones import make_backbone
from data import steps_of
from engine import health, is_logged, run, start_target
from lightly.utils.scheduler import CosineWarmupScheduler
from reading import Batch, valid_cells
from torch import Tensor, nn
from torch.nn import functional as F

from densessl import EMA, ConvMLP, DistanceMatcher, PixContrastLoss


class ViTPostTraining(pl.LightningModule):
    """PixContrast on the patch tokens of a pretrained ViT.

    Not a published method: place by place as PixPro matches, with the optimiser, rates and teacher of NeCo (Pariza et
    al., ICLR 2025) and Leopart (Ziegler and Asano, CVPR 2022). A loss with negatives, because the head is new and
    the optimiser AdamW, under which PixPro's own loss collapsed in short trials.

    Args:
        backbone: name of a timm ViT; a tag chooses its weights.
        layer: to cut it after; ``"norm"`` gives the tokens that the model itself gives.
        init: ``"imagenet"`` for timm's weights of that name, whatever they were trained on, ``"random"``, or a file.
        trained_blocks: train the last n blocks and the final norm; the rest is frozen. All by default.
        hidden_dim: of the projection head.
        dim: of the projections.
        threshold: T, in cell diagonals.
        temperature: of the softmax.
        sparse: masks as lists of pairs, which take less memory from some 1,000 cells on.
        pixel_distances: measure in pixels, not per axis; for images far from square.
        lr_backbone: learning rate of the ViT, for the batch size that is used.
        lr_head: of the projection head.
        weight_decay: of weights of more than one dimension; not of position embedding, class and register tokens.
        warmup: share of the steps.
        momentum: of the target encoder at the start.
        compile: torch.compile the encoders.
        size: side of the views, a multiple of the patch; linked to ``data.size``.
        channels: of the images; linked to ``data.channels``.
    """

    def __init__(
        self,
        backbone: str = "vit_small_patch14_dinov2.lvd142m",
        layer: str = "norm",
        init: str = "imagenet",
        trained_blocks: int | None = None,
        hidden_dim: int = 2048,
        dim: int = 256,
        threshold: float = 0.7,
        temperature: float = 0.3,
        sparse: bool = False,
        pixel_distances: bool = True,
        lr_backbone: float = 1e-5,
        lr_head: float = 1e-4,
        weight_decay: float = 0.04,
        warmup: float = 0.02,
        momentum: float = 0.9995,
        compile: bool = False,
        size: int = 224,
        channels: int = 3,
    ) -> None:
        super().__init__()
        for name, lr in (("lr_backbone", lr_backbone), ("lr_head", lr_head)):
            if not lr > 0:
                raise ValueError(f"model.{name}: expected a positive learning rate, got {lr}")
        self.save_hyperparameters()
        features, width = make_backbone(backbone, layer, init, size, channels)
        self.start = copy.deepcopy(features).requires_grad_(False).eval()
        if trained_blocks is not None:
            freeze_all_but_last(features, trained_blocks)
        self.encoder = nn.Sequential(features, ConvMLP(width, hidden_dim, dim))
        self.target = EMA(self.encoder)
        self.match, self.loss = DistanceMatcher(threshold, sparse=sparse), PixContrastLoss(temperature)
        if compile:
            for module in (*self.encoder, self.target.module, self.start):
                module.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2 = batch.view1, batch.view2
        backbone, head = self.encoder
        tokens1, tokens2 = backbone(view1.image), backbone(view2.image)
        z1, z2 = head(tokens1), head(tokens2)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        source_size = view1.source_size if self.hparams.pixel_distances else None
        size = z1.shape[-2:]
        valid1, valid2 = valid_cells(view1, size), valid_cells(view2, size)
        mask = self.match(view1.coords, view2.coords, size, size, source_size, valid1, valid2)
        loss = 0.5 * (self.loss(z1, t2, mask, valid2) + self.loss(z2, t1, mask.mT, valid1))

        self.log("loss", loss, prog_bar=True)
        if is_logged(self.trainer):
            self.log_dict(health(z1.detach(), t2, mask, valid1, valid2))
            with torch.no_grad():  # 1 before the first step; how far the tokens have moved since
                similarity = F.cosine_similarity(tokens1.float(), self.start(view1.image).float(), dim=1).flatten(1)
            self.log("health/similarity_to_start", similarity[... if valid1 is None else valid1].mean())
            self.log("momentum", self.target.momentum(self.target.step))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.target.update(self.encoder)

    def on_fit_start(self) -> None:
        start_target(self.target, self.encoder, self.trainer, self.hparams.momentum)

    def configure_optimizers(self) -> Any:
        h, (backbone, head) = self.hparams, self.encoder
        groups = [*groups_at(backbone, h.lr_backbone, h.weight_decay), *groups_at(head, h.lr_head, h.weight_decay)]
        optimizer, steps = torch.optim.AdamW(groups), steps_of(self.trainer)
        schedule = CosineWarmupScheduler(optimizer, round(h.warmup * steps), max_epochs=steps + 1, end_value=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def freeze_all_but_last(features: nn.Module, blocks: int) -> None:
    """Leaves the last blocks of a timm ViT, and its final norm, to be trained."""
    every = list(features.blocks.children()) if hasattr(features, "blocks") else []
    if not every:
        raise ValueError("model.trained_blocks: expected a timm ViT in model.backbone, got one without blocks")
    if not 1 <= blocks <= len(every):
        raise ValueError(f"model.trained_blocks: expected 1 to {len(every)}, the backbone's blocks, got {blocks}")
    features.requires_grad_(False).eval()
    for part in (*every[-blocks:], *(module for name, module in features.named_children() if name == "norm")):
        part.requires_grad_(True).train()


def groups_at(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that are trained, in two groups: weights of layers with decay, all other tensors without."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    # A ViT's embeddings and tokens have three dimensions, and names of their own.
    decayed = [p for name, p in trained if p.ndim > 1 and name.endswith("weight")]
    other = [p for name, p in trained if p.ndim <= 1 or not name.endswith("weight")]
    return [{"params": decayed, "lr": lr, "weight_decay": weight_decay}, {"params": other, "lr": lr, "weight_decay": 0}]


if __name__ == "__main__":
    run(ViTPostTraining)
