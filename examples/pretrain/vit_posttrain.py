"""Dense post-training of a pretrained ViT on a folder of images.

    python examples/pretrain/vit_posttrain.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/vit_posttrain_dinov2_s14.yaml

Patch tokens of two views are contrasted by their positions. The weights start where they were published, and move
little: a small learning rate for the backbone, a larger one for the new head, a few epochs.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl import EMA, ConvMLP, DistanceMatcher, MaskedView, PixContrastLoss, View
from examples.pretrain.common.step import Step, pair_metrics, valid_cells


class Encoder(nn.Module):
    """A backbone with a projection head; gives the tokens' map and the projections."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, ConvMLP(width, hidden_dim, dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(image)
        return features, self.projector(features)


class ViTPostTraining(nn.Module):
    """PixContrast on the patch tokens of a pretrained ViT.

    Not a published method: matched by position as in PixPro, with the optimiser, rates and teacher of NeCo (Pariza et
    al., ICLR 2025) and Leopart (Ziegler and Asano, CVPR 2022). A loss with negatives, because the head is new and
    the optimiser AdamW, under which PixPro's own loss collapsed in short trials.

    Args:
        backbone: Images ``(B, C, H, W)`` to the map of a ViT's tokens, pretrained.
        width: Number of channels of that map.
        trained_blocks: Number of the ViT's last blocks that are trained, together with the final norm, while all before
            them is frozen; at least 1. By default the whole backbone is trained.
        hidden_dim: Number of channels of the hidden layer of the projection head, at least 1.
        dim: Number of channels of the projections, which are the output of the projection head; at least 1.
        threshold: Two cells are a positive pair if their centres lie less than this distance apart in the source image,
            in diagonals of the larger cell; above 0. The value that PixPro published is 0.7.
        temperature: Temperature of the softmax over cells, above 0; a smaller one weighs the most similar negatives
            more.
        sparse: Whether the masks of positive pairs are held as lists of pairs, which take less memory on maps of more
            than about 1,000 cells; the loss is the same.
        pixel_distances: Whether distances between cells are measured in pixels of the source image. If false, x is
            divided by the image's width and y by its height, as PixPro does; in images far from square the two differ.
    """

    in_words = "dense post-training of a ViT"  # in logs and reports

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        trained_blocks: int | None = None,
        hidden_dim: int = 2048,
        dim: int = 256,
        threshold: float = 0.7,
        temperature: float = 0.3,
        sparse: bool = False,
        pixel_distances: bool = True,
    ) -> None:
        super().__init__()
        self.start = copy.deepcopy(backbone).requires_grad_(False).eval()
        if trained_blocks is not None:
            freeze_all_but_last(backbone, trained_blocks)
        self.encoder = Encoder(backbone, width, hidden_dim, dim)
        self.target = EMA(self.encoder)
        self.match, self.loss = DistanceMatcher(threshold, sparse=sparse), PixContrastLoss(temperature)
        self.pixel_distances = pixel_distances

    def forward(self, view1: View | MaskedView, view2: View | MaskedView) -> Step:
        (tokens1, z1), (_, z2) = self.encoder(view1.image), self.encoder(view2.image)
        (_, t1), (_, t2) = self.target(view1.image), self.target(view2.image)
        size, source_size = z1.shape[-2:], view1.source_size if self.pixel_distances else None
        valid1, valid2 = valid_cells(view1, size), valid_cells(view2, size)
        mask = self.match(view1.coords, view2.coords, size, size, source_size, valid1, valid2)
        loss = 0.5 * (self.loss(z1, t2, mask, valid2) + self.loss(z2, t1, mask.mT, valid1))

        def metrics() -> dict[str, Tensor]:
            similarity = self.similarity_to_start(tokens1, view1.image)
            kept = similarity[... if valid1 is None else valid1].mean()
            return pair_metrics(z1, t2, mask, valid1, valid2) | {"health/similarity_to_start": kept}

        return Step(loss, {}, metrics)

    @torch.no_grad()
    def similarity_to_start(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Cosine of each token with what the backbone gave before the first step, ``(B, N)``."""
        return F.cosine_similarity(tokens.float(), self.start(image).float(), dim=1).flatten(1)


def freeze_all_but_last(features: nn.Module, blocks: int) -> None:
    """Leaves the last blocks of a timm ViT, and its final norm, to be trained."""
    every = list(features.blocks.children()) if hasattr(features, "blocks") else []
    if not every:
        raise ValueError("method.trained_blocks: expected a timm ViT in backbone.name, got one without blocks")
    if not 1 <= blocks <= len(every):
        raise ValueError(f"method.trained_blocks: expected 1 to {len(every)}, the backbone's blocks, got {blocks}")
    features.requires_grad_(False).eval()
    for part in (*every[-blocks:], *(module for name, module in features.named_children() if name == "norm")):
        part.requires_grad_(True).train()


def recipe():
    from examples.pretrain.common.cli import Recipe
    from examples.pretrain.common.optimizers import BackboneAdamW

    defaults = {"backbone.name": "vit_small_patch14_dinov2.lvd142m", "backbone.layer": "norm"}
    defaults["backbone.init"] = "imagenet"
    return Recipe(ViTPostTraining, BackboneAdamW, momentum=(0.9995, 1.0), defaults=defaults)


if __name__ == "__main__":
    recipe().run()
