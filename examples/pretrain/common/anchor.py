"""What keeps a pretrained backbone good while a method trains it: a Gram anchor to its start, and KoLeo."""

from __future__ import annotations

import copy

import torch
from lightly.utils.dist import gather, world_size
from torch import Tensor, nn
from torch.nn import functional as F

from densessl import GramLoss, MaskedView, View
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.step import Step, check_step, mean_over_cells, valid_cells

# The options of a recipe that give the two terms their weights, and the help of each.
WEIGHTS = {
    "method.anchor": "Weight of a Gram anchor, at least 0. The anchor keeps the similarities between an image's cells "
    "as they were in the backbone before the first step. 0 leaves it out; DINOv3 uses 2.",
    "method.koleo": "Weight of the loss KoLeo, at least 0. KoLeo keeps the features of the images of a batch apart. 0 "
    "leaves it out; DINOv2 uses 0.1.",
}


class Anchored(nn.Module):
    """A method with two more terms, both on the maps that its online backbone gives of the two views.

    The Gram anchor keeps the similarities between an image's cells as they were in a frozen copy of the backbone, taken
    when this is made. KoLeo (Sablayrolles et al., ICLR 2019; DINOv2) keeps the images of a batch, each the mean of its
    cells, apart from their nearest neighbours; on several processes it is computed over the images of all. Each term is
    the mean of both views.

    Args:
        method: ``forward(view1, view2) -> Step``. Its ``encoder`` calls the backbone once for each view; for small
            views, which neither term is on, after the two.
        anchor: Weight of the Gram anchor; 0 leaves it out, and the copy too.
        koleo: Weight of KoLeo; 0 leaves it out.

    Raises:
        ValueError: If a weight is negative or no number.
    """

    def __init__(self, method: nn.Module, anchor: float = 0.0, koleo: float = 0.0) -> None:
        super().__init__()
        for name, weight in (("anchor", anchor), ("koleo", koleo)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"method.{name}: expected a weight of at least 0, got {weight}")
        self.method, self.anchor, self.koleo = method, anchor, koleo
        self.start = frozen_copy(backbone_of(method)) if anchor else None
        self.gram, self.spread = GramLoss(), None
        if koleo:
            from lightly.loss import KoLeoLoss  # the oldest lightly that the rest takes lacks it

            self.spread = KoLeoLoss()
        self._maps: list[Tensor] = []
        backbone_of(method).register_forward_hook(self._keep)

    @property
    def encoder(self) -> nn.Module:
        """The method's online encoder."""
        return self.method.encoder

    @property
    def target(self) -> nn.Module:
        """The method's target encoder."""
        return self.method.target

    def train(self, mode: bool = True) -> Anchored:
        """As of every module, but the copy of the start stays in evaluation mode."""
        super().train(mode)
        if self.start is not None:
            self.start.eval()
        return self

    def forward(self, view1: View | MaskedView, view2: View | MaskedView, *small: View | MaskedView) -> Step:
        self._maps.clear()
        step = self.method(view1, view2, *small)
        check_step(step)
        maps, views = list(self._maps), (view1, view2)
        self._maps.clear()
        if small:
            maps = maps[:2]  # those of the small views come after them
        if len(maps) != 2 or not all(isinstance(x, Tensor) for x in maps):
            raise ValueError(
                f"method: expected an encoder that gives one map of each of two views, got {len(maps)} outputs of its "
                "backbone; set method.anchor and method.koleo to 0"
            )
        valid = [valid_cells(view, x.shape[-2:]) for view, x in zip(views, maps, strict=True)]
        terms, loss, metrics = dict(step.terms) or {"method": step.loss}, step.loss, step.metrics
        if self.start is not None:
            with torch.no_grad():
                before = [self.start(view.image) for view in views]
            terms["anchor"] = sum(self.gram(x, y, v) for x, y, v in zip(maps, before, valid, strict=True)) / 2
            loss = loss + self.anchor * terms["anchor"]

            def metrics() -> dict[str, Tensor]:
                return step.metrics() | {"health/similarity_to_start": similarity(maps[0], before[0], valid[0])}

        if self.koleo:
            terms["koleo"] = sum(self.spread_of(x, v) for x, v in zip(maps, valid, strict=True)) / 2
            loss = loss + self.koleo * terms["koleo"]
        return Step(loss, terms, metrics)

    def spread_of(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """KoLeo of a batch of maps, in float32: under autocast two neighbours would lose their distance."""
        with torch.autocast(features.device.type, enabled=False):
            images = mean_over_cells(features if features.dtype == torch.float64 else features.float(), valid)
            if world_size() > 1:
                images = torch.cat(gather(images))
            if len(images) < 2:
                raise ValueError("method.koleo: expected at least 2 images a step, got 1, which has no neighbour")
            return self.spread(images)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], features: Tensor) -> None:
        self._maps.append(features)


def frozen_copy(backbone: nn.Module) -> nn.Module:
    """The backbone as it is now, without gradients and in evaluation mode."""
    return copy.deepcopy(backbone).requires_grad_(False).eval()


@torch.no_grad()
def similarity(features: Tensor, before: Tensor, valid: Tensor | None) -> Tensor:
    """Mean cosine of an image's cells with what another model gives for them."""
    cosine = F.cosine_similarity(features.float(), before.float(), dim=1).flatten(1)
    return cosine[... if valid is None else valid].mean()
