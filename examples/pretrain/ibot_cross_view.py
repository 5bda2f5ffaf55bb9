"""iBOT across views on a folder of images: a masked cell is predicted from what the other view shows there.

    python examples/pretrain/ibot_cross_view.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/ibot_cross_view_vit_s16.yaml
"""

import torch
from lightly.models.modules.center import Center
from torch import nn

from densessl import EMA, BlockMask, DistanceMatcher, NearestMatcher, PrototypeLoss, View
from examples.pretrain.common.masked import MaskedEncoder, drawn_blocks, matched_cells, prototypes_in_use
from examples.pretrain.common.step import Step, pair_metrics


class IBOTCrossView(nn.Module):
    """iBOT (Zhou et al., ICLR 2022) whose masked cells also predict the teacher's matched cells of the other view.

    Args:
        backbone: Images ``(B, C, H, W)`` to the map of a ViT's tokens.
        width: Number of channels of that map.
        across: Share of the loss across views in the loss of the cells, in 0..1; at 0 that is iBOT's patch loss alone.
        instance: Weight, at least 0, of the loss between the views' mean cells, which stand for iBOT's class tokens.
        hidden_dim: Number of channels of the hidden layers of the head, at least 1.
        dim: Number of channels in which the prototypes lie.
        prototypes: Number of prototypes.
        cells: Least and greatest share of the cells that is masked in a masked image.
        images: Share of the images that are masked.
        teacher_temperature: Temperature of the teacher's softmax; the student's is 0.1.
    """

    in_words = "iBOT across views"  # in logs and reports

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        across: float = 0.5,
        instance: float = 1.0,
        hidden_dim: int = 2048,
        dim: int = 256,
        prototypes: int = 8192,
        cells: tuple[float, float] = (0.1, 0.5),
        images: float = 0.5,
        teacher_temperature: float = 0.04,
    ) -> None:
        super().__init__()
        if not 0 <= across <= 1 or not 0 <= instance < float("inf"):
            raise ValueError(f"method.across, method.instance: expected 0..1 and at least 0, got {across}, {instance}")
        self.encoder = MaskedEncoder(backbone, width, hidden_dim, dim, prototypes)
        self.target, self.draw, self.match = EMA(self.encoder), BlockMask(cells, images), DistanceMatcher(0.7)
        self.nearest, self.center, self.center_instance = NearestMatcher(), *(Center((1, prototypes)) for _ in range(2))
        self.loss, self.across, self.instance = PrototypeLoss(0.1, teacher_temperature), across, instance

    def forward(self, view1: View, view2: View) -> Step:
        (f1, t1, i1), (f2, t2, i2) = self.target(view1.image), self.target(view2.image)
        m1, m2 = drawn_blocks(self.draw, f1), drawn_blocks(self.draw, f2)
        (g1, s1, w1), (_, s2, w2) = self.encoder(view1.image, m1), self.encoder(view2.image, m2)
        mask, (k1, v1), (k2, v2) = matched_cells(self.match, self.nearest, (view1, view2), (f1, f2), (t1, t2))
        center, whole, m1, m2 = self.center.value, self.center_instance.value, m1.flatten(1), m2.flatten(1)
        same = 0.5 * (self.loss(s1, t1, m1, center) + self.loss(s2, t2, m2, center))
        across = 0.5 * (self.loss(s1, k1, m1 & v1, center) + self.loss(s2, k2, m2 & v2, center))
        instance = 0.5 * (self.loss(w1, i2, None, whole) + self.loss(w2, i1, None, whole))
        self.center.update(torch.cat([t1, t2], 1).flatten(0, 1))
        self.center_instance.update(torch.cat([i1, i2]).flatten(0, 1))
        terms, used = {"same": same, "across": across, "instance": instance}, (t1, center, self.loss.key_temperature)
        loss = torch.lerp(same, across, self.across) + self.instance * instance
        return Step(loss, terms, lambda: pair_metrics(g1, f2, mask) | {"health/prototypes": prototypes_in_use(*used)})


def recipe():
    from examples.pretrain.common.cli import WITHOUT_ANCHOR, WITHOUT_MASKS, Recipe
    from examples.pretrain.common.optimizers import BackboneAdamW

    defaults = {"backbone.name": "vit_small_patch16_224", "backbone.layer": "norm", "optimizer.warmup": 0.0125}
    defaults |= {"optimizer.lr_backbone": 2e-3, "optimizer.lr_head": 2e-3}
    without = WITHOUT_MASKS + WITHOUT_ANCHOR
    return Recipe(IBOTCrossView, BackboneAdamW, momentum=(0.996, 1.0), without=without, defaults=defaults)


if __name__ == "__main__":
    recipe().run()
