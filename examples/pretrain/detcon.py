"""DetCon on a folder of images, in the form built on BYOL (DetCon-B).

    python examples/pretrain/detcon.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/detcon_r50_300ep.yaml

Each image is divided into segments before the views are cut, ``data.segments``; the views' coords are not used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightly.utils.dist import gather, rank, world_size
from torch import Tensor, nn

from densessl import EMA, MLP, MaskedInfoNCELoss, MaskedView, cell_labels, pool_regions, same_region, sample_labels
from examples.pretrain.common.step import Step, pair_metrics


class Regions(NamedTuple):
    """Regions of one view: vectors ``(B, R, C)``, and the segments they belong to ``(B, R)``, 0 for none."""

    vectors: Tensor
    ids: Tensor


class Encoder(nn.Module):
    """A backbone, the mean over each region of its map, and a projection head."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = MLP(width, hidden_dim, dim)

    def forward(self, image: Tensor, mask: Tensor, draws: Tensor) -> Regions:
        features = self.backbone(image)
        labels = cell_labels(mask, features.shape[-2:])
        ids = sample_labels(labels, draws)
        means, _ = pool_regions(features, labels, ids)
        return Regions(self.projector(means.flatten(0, 1)).unflatten(0, ids.shape), ids)


class DetCon(nn.Module):
    """Contrastive detection (Henaff et al., ICCV 2021): regions of the same segment against all others of the batch.

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layers of all heads, at least 1.
        dim: Number of channels of the projections.
        regions: Number of regions to draw in each view.
        temperature: Temperature of the softmax.

    Raises:
        ValueError: If ``regions`` is less than 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        hidden_dim: int = 4096,
        dim: int = 256,
        regions: int = 16,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if regions < 1:
            raise ValueError(f"method.regions: expected at least 1, got {regions}")
        self.encoder, self.regions = Encoder(backbone, width, hidden_dim, dim), regions
        self.predictor = MLP(dim, hidden_dim, dim)
        self.target = EMA(self.encoder)
        # Not lightly's DetConBLoss: 1.5.14 does not have it, and in 1.6.0 regions that are not there are negatives.
        self.loss = MaskedInfoNCELoss(temperature, reduction="none")

    def forward(self, view1: MaskedView, view2: MaskedView) -> Step:
        views = [(view.image, view.mask, self.draws(view.mask)) for view in (view1, view2)]
        z1, z2 = (self.encoder(*view) for view in views)
        t1, t2 = (self.target(*view) for view in views)
        q1, q2 = self.predicted(z1), self.predicted(z2)
        k1, k2 = (t if world_size() == 1 else Regions(*(torch.cat(gather(x)) for x in t)) for t in (t1, t2))
        loss = self.region_loss(q1, k1, k2) + self.region_loss(q2, k2, k1)
        same = same_region(z1.ids, t2.ids)
        return Step(loss, {}, lambda: pair_metrics(z1.vectors, t2.vectors, same, z1.ids > 0, t2.ids > 0))

    def predicted(self, regions: Regions) -> Regions:
        """With the prediction head behind them."""
        vectors = regions.vectors
        return Regions(self.predictor(vectors.flatten(0, 1)).view_as(vectors), regions.ids)

    def region_loss(self, query: Regions, own: Regions, other: Regions) -> Tensor:
        """One direction: regions of a view against the target's of the other and of its own view, of all processes."""
        images = torch.arange(len(own.ids), device=own.ids.device)[:, None] << 32
        first = rank() * len(query.ids)
        region = (images[first : first + len(query.ids)] + query.ids).flatten()[:, None]
        # Regions are the same where image and segment are. The same one in the own view is no negative either.
        same_own, same_other = (region == (images + keys.ids).flatten() for keys in (own, other))
        there_own, there_other = (keys.ids.flatten() > 0 for keys in (own, other))
        positive = torch.cat([same_other & there_other, torch.zeros_like(same_own)], 1)
        negative = torch.cat([~same_other & there_other, ~same_own & there_own], 1)
        keys = torch.cat([other.vectors, own.vectors]).flatten(0, 1)
        per_region = self.loss(query.vectors.flatten(0, 1), keys, positive, negative)
        # A segment that was drawn several times counts once.
        copies = (query.ids[:, :, None] == query.ids[:, None]).sum(2)
        return (per_region / copies.flatten()).mean()

    def draws(self, mask: Tensor) -> Tensor:
        """What decides on the regions of this process's images, from the generator of the CPU.

        All processes draw for all images, so that one process and several choose the same regions.
        """
        drawn = torch.rand(world_size() * len(mask), self.regions)
        return drawn[rank() * len(mask) :][: len(mask)].to(mask.device)


def check(options) -> None:
    """Regions come from segments; a mask of ``data.nodata`` alone is none."""
    if options.data.segments == "none":
        raise ValueError("data.segments: expected 'felzenszwalb' or 'grid', got 'none'")


def recipe():
    from examples.pretrain.common.cli import Recipe
    from examples.pretrain.common.optimizers import LinearLARS

    defaults = {"optimizer.lr_at_256": 0.3, "optimizer.weight_decay": 1e-6, "optimizer.warmup": 0.01}
    return Recipe(DetCon, LinearLARS, defaults=defaults, check=check)


if __name__ == "__main__":
    recipe().run()
