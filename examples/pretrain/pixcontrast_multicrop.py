"""PixContrast with small views beside the two large ones, on a folder of images.

    python examples/pretrain/pixcontrast_multicrop.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/pixcontrast_multicrop_r50.yaml
"""

import torch
from torch import nn

from densessl import EMA, ConvMLP, DistanceMatcher, MaskedView, PixContrastLoss, View
from examples.pretrain.common.step import Step, pair_metrics, valid_cells


class PixContrastMulticrop(nn.Module):
    """PixContrast (Xie et al., CVPR 2021, Eq. 2) on the views of DINO (Caron et al., ICCV 2021).

    The target encoder sees the two large views alone, the online encoder all of them. The cells of each view are pulled
    to what the target gives for the same places in a large view; the loss is the mean over all such pairs of views. Not
    a published method, and not measured.

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layer of the projection head, at least 1.
        dim: Number of channels of the projections, which are the output of the projection head; at least 1.
        threshold: Two cells are a positive pair if their centres lie less than this distance apart in the source image,
            in diagonals of the larger cell; above 0. The published value is 0.7.
        temperature: Temperature of the softmax over cells, above 0; a smaller one weighs the most similar negatives
            more.
        pixel_distances: Whether distances between cells are measured in pixels of the source image. If false, x is
            divided by the image's width and y by its height, as PixPro does; in images far from square the two differ.
    """

    in_words = "PixContrast with small views"  # in logs and reports

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        hidden_dim: int = 512,
        dim: int = 128,
        threshold: float = 0.7,
        temperature: float = 0.3,
        pixel_distances: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = nn.Sequential(backbone, ConvMLP(width, hidden_dim, dim))
        self.target = EMA(self.encoder)
        self.match, self.loss = DistanceMatcher(threshold), PixContrastLoss(temperature)
        self.pixel_distances = pixel_distances

    def forward(self, view1: View | MaskedView, view2: View | MaskedView, *small: View | MaskedView) -> Step:
        views, queries = (view1, view2, *small), [self.encoder(view1.image), self.encoder(view2.image)]
        keys = [self.target(view1.image), self.target(view2.image)]
        if small:  # of one size, so that they go through the encoder together
            queries += self.encoder(torch.cat([view.image for view in small])).chunk(len(small))
        source_size = view1.source_size if self.pixel_distances else None
        valid = [valid_cells(view, z.shape[-2:]) for view, z in zip(views, queries, strict=True)]
        masks, losses = {}, {}
        for q, z in enumerate(queries):
            for k in {0, 1} - {q}:
                coords, sizes = (views[q].coords, views[k].coords), (z.shape[-2:], keys[k].shape[-2:])
                masks[q, k] = self.match(*coords, *sizes, source_size, valid[q], valid[k])
                losses[q, k] = self.loss(z, keys[k], masks[q, k], valid[k])
        terms = {"large": 0.5 * (losses[0, 1] + losses[1, 0])}
        if small:
            terms["small"] = sum(losses[pair] for pair in losses if pair[0] > 1) / (2 * len(small))
        loss = sum(losses.values()) / len(losses)
        return Step(loss, terms, lambda: pair_metrics(queries[0], keys[1], masks[0, 1], valid[0], valid[1]))


def recipe():
    from examples.pretrain.common.cli import Recipe  # Lightning comes in here, not with the method
    from examples.pretrain.common.optimizers import BackboneAdamW

    defaults = {"data.preset": "multicrop", "data.scale": (0.4, 1.0), "data.small": 4}
    return Recipe(PixContrastMulticrop, BackboneAdamW, defaults=defaults)


if __name__ == "__main__":
    recipe().run()
