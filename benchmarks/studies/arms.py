"""What is compared: a method, its optimiser and the momentum of its target, under one name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densessl import EMA, MLP, FeatureMap, InstanceConsistencyLoss, InstanceContrastLoss, View
from examples.pretrain.common.optimizers import BackboneAdamW, LinearSGD, SquareRootLARS
from examples.pretrain.common.step import Step, pair_metrics
from examples.pretrain.densecl import DenseCL
from examples.pretrain.detcon import DetCon
from examples.pretrain.ibot_cross_view import IBOTCrossView
from examples.pretrain.neco import NeCo
from examples.pretrain.paka import PaKA
from examples.pretrain.pixcontrast import PixContrast
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_instance import PixProInstance
from examples.pretrain.slotcon import SlotCon
from examples.pretrain.vicregl import VICRegL
from examples.pretrain.vit_posttrain import ViTPostTraining


class InstanceEncoder(nn.Module):
    """A backbone and a projection of its map's mean."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, MLP(width, hidden_dim, dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.projector(self.backbone(image).mean((2, 3)))


class Instance(nn.Module):
    """Pretraining of whole images: what the pixel-level methods are compared with.

    Args:
        backbone: Images to a feature map.
        width: Number of channels of that map.
        loss: Of query and key vectors ``(B, C)``.
        predictor: Makes the head between projection and loss from its three widths.
        hidden_dim: Width of the heads' hidden layer.
        dim: Number of channels of the projections.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        loss: nn.Module,
        predictor: Callable[[int, int, int], nn.Module],
        hidden_dim: int = 512,
        dim: int = 128,
    ) -> None:
        super().__init__()
        self.encoder = InstanceEncoder(backbone, width, hidden_dim, dim)
        self.predictor = predictor(dim, hidden_dim, dim)
        self.target, self.loss = EMA(self.encoder), loss

    def forward(self, view1: View, view2: View) -> Step:
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        loss = self.loss(self.predictor(z1), t2) + self.loss(self.predictor(z2), t1)
        same = torch.ones(1, 1, 1, dtype=torch.bool, device=z1.device).expand(len(z1), 1, 1)
        return Step(loss, {}, lambda: pair_metrics(z1[:, None], t2[:, None], same))


def make_vit() -> FeatureMap:
    """timm's smallest ViT, six blocks of 64 channels, with patches of 8 px and random weights; takes every size."""
    import timm

    model = timm.create_model("test_vit", patch_size=8, img_size=64, num_classes=0, dynamic_img_size=True)
    return FeatureMap(model, "norm")


class Arm(NamedTuple):
    """One thing to compare.

    Attributes:
        title: What tables call it.
        make: Backbone and width to a method; None: no training, batch norm's statistics are filled.
        optimizer: Learning rate to optimiser settings.
        momentum: Momentum of the target encoder at the start and at the end.
        backbone: Makes another backbone than that of the study; None: that one.
    """

    title: str
    make: Callable[..., nn.Module] | None
    optimizer: Callable[[float], Callable] = SquareRootLARS
    momentum: tuple[float, float] = (0.99, 1.0)
    backbone: Callable[[], FeatureMap] | None = None


HEADS = {"hidden_dim": 512, "dim": 128}
CONTRAST = partial(Instance, loss=InstanceContrastLoss(), predictor=nn.Identity)
CONSISTENCY = partial(Instance, loss=InstanceConsistencyLoss(), predictor=MLP)

ARMS = {
    "rate-0": Arm("learning rate 0", None),
    "byol": Arm("instance, BYOL form", CONSISTENCY),
    "infonce": Arm("instance, InfoNCE form", CONTRAST),
    "pixcontrast": Arm("PixContrast", partial(PixContrast, **HEADS)),
    "pixpro": Arm("PixPro", partial(PixPro, **HEADS)),
    "pixpro+infonce": Arm("PixPro + InfoNCE", partial(PixProInstance, instance="contrast", **HEADS)),
    "pixpro+byol": Arm("PixPro + BYOL form", partial(PixProInstance, instance="consistency", **HEADS)),
    "densecl": Arm("DenseCL", partial(DenseCL, queue=2048, **HEADS)),
    "densecl-sgd": Arm("DenseCL, its SGD", partial(DenseCL, queue=2048, **HEADS), LinearSGD, (0.99, 0.99)),
    "vicregl": Arm("VICRegL", partial(VICRegL, keep=(20, 20), keep_by_feature=20, **HEADS)),
    "detcon": Arm("DetCon", partial(DetCon, **HEADS)),
    "slotcon": Arm("SlotCon", partial(SlotCon, prototypes=64, **HEADS)),
    "paka": Arm("PaKA", partial(PaKA, **HEADS), partial(BackboneAdamW, lr_head=1e-3)),
    "neco": Arm("NeCo", partial(NeCo, grid=5, queue=2048, **HEADS), partial(BackboneAdamW, lr_head=1e-3)),
    "rate-0-vit": Arm("learning rate 0, ViT", None, backbone=make_vit),
    "ibot": Arm(
        "iBOT across views, ViT",
        partial(IBOTCrossView, prototypes=256, **HEADS),
        partial(BackboneAdamW, lr_head=1e-3),
        backbone=make_vit,
    ),
    "ibot-cells": Arm(
        "iBOT across views without the whole-image loss, ViT",
        partial(IBOTCrossView, prototypes=256, instance=0.0, **HEADS),
        partial(BackboneAdamW, lr_head=1e-3),
        backbone=make_vit,
    ),
    "vit": Arm("post-training of a ViT", partial(ViTPostTraining, **HEADS), partial(BackboneAdamW, lr_head=1e-3)),
}
# Not in the study: methods that go on from pretrained weights, and those of ViTs, which start at random here.
BESIDE_THE_STUDY = ("paka", "neco", "rate-0-vit", "ibot", "ibot-cells", "vit")
