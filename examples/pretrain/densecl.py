"""DenseCL on a folder of images.

    python examples/pretrain/densecl.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/densecl_r50_200ep.yaml

Cells are matched by the features of the backbone, not by their positions: the views' coords are not used.
"""

from __future__ import annotations

from typing import NamedTuple

from lightly.models.modules import DenseCLProjectionHead
from lightly.models.utils import batch_shuffle, batch_unshuffle
from lightly.utils.dist import world_size
from torch import Tensor, nn

from densessl import (
    EMA,
    InfoNCELoss,
    KeyQueue,
    NearestMatcher,
    Pairs,
    View,
    feature_distance,
    gather_tokens,
    map_to_tokens,
    pairs_to_mask,
    tokens_to_map,
)
from examples.pretrain.common.step import Step, pair_metrics


class Outputs(NamedTuple):
    """Outputs for one view: the backbone's map, the projected map, and one projected vector per image."""

    features: Tensor
    cells: Tensor
    image: Tensor


class Encoder(nn.Module):
    """A backbone with a projection head for its cells and one for their mean."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.per_cell = DenseCLProjectionHead(width, hidden_dim, dim)
        self.per_image = DenseCLProjectionHead(width, hidden_dim, dim)

    def forward(self, image: Tensor) -> Outputs:
        features = self.backbone(image)
        cells = tokens_to_map(self.per_cell(map_to_tokens(features)), features.shape[-2:])
        return Outputs(features, cells, self.per_image(features.mean((2, 3))))


class DenseCL(nn.Module):
    """Dense contrastive learning (Wang et al., CVPR 2021): MoCo v2, and the same between matched cells.

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layers of all heads, at least 1.
        dim: Number of channels of the projections.
        queue: Number of keys in each of the two queues.
        temperature: Temperature of both softmaxes.
        dense_weight: Share of the dense loss, lambda, in 0..1.

    Raises:
        ValueError: If ``dense_weight`` is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        hidden_dim: int = 2048,
        dim: int = 128,
        queue: int = 65536,
        temperature: float = 0.2,
        dense_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 <= dense_weight <= 1:
            raise ValueError(f"method.dense_weight: expected a number in 0..1, got {dense_weight}")
        self.encoder = Encoder(backbone, width, hidden_dim, dim)
        self.target = EMA(self.encoder, 0.999)
        self.cell_queue, self.image_queue = KeyQueue(queue, dim), KeyQueue(queue, dim)
        self.match, self.loss, self.dense_weight = NearestMatcher(), InfoNCELoss(temperature), dense_weight

    def forward(self, view1: View, view2: View) -> Step:
        query, key = self.encoder(view1.image), self.keys(view2.image)
        dense, instance, pairs = self.losses(query, key)
        loss = (1 - self.dense_weight) * instance + self.dense_weight * dense
        self.cell_queue.push(key.cells.mean((2, 3)))  # pooled: one negative of each image
        self.image_queue.push(key.image)
        cells = (query.cells[0, 0].numel(), key.cells[0, 0].numel())
        terms = {"dense": dense, "instance": instance}
        return Step(loss, terms, lambda: pair_metrics(query.cells, key.cells, pairs_to_mask(pairs, cells)))

    def losses(self, query: Outputs, key: Outputs) -> tuple[Tensor, Tensor, Pairs]:
        """The dense loss, the instance loss, and the pairs: each query cell with the key cell most similar to it."""
        # By the backbone's features, as published; the projections then follow.
        pairs = self.match(feature_distance(query.features.detach(), key.features))
        q = gather_tokens(map_to_tokens(query.cells), pairs.query)
        k = gather_tokens(map_to_tokens(key.cells), pairs.key)
        dense = self.loss(q, k, self.cell_queue.keys, pairs.valid)
        return dense, self.loss(query.image[:, None], key.image[:, None], self.image_queue.keys), pairs

    def keys(self, image: Tensor) -> Outputs:
        """The target's outputs; on several GPUs on images of all of them, shuffled as in MoCo.

        Otherwise the statistics of a batch norm that query and key share would tell them from the negatives.
        """
        if world_size() == 1:
            return self.target(image)
        image, order = batch_shuffle(image, distributed=True)
        return Outputs(*(batch_unshuffle(x, order, distributed=True) for x in self.target(image)))


def recipe():
    from examples.pretrain.common.cli import WITHOUT_ANCHOR, WITHOUT_MASKS, Recipe
    from examples.pretrain.common.optimizers import LinearSGD

    return Recipe(DenseCL, LinearSGD, momentum=(0.999, 0.999), without=(*WITHOUT_MASKS, *WITHOUT_ANCHOR))


if __name__ == "__main__":
    recipe().run()
