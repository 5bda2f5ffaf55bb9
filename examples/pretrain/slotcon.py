"""SlotCon on a folder of images.

    python examples/pretrain/slotcon.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/slotcon_r50_100ep.yaml

Cells are grouped by learned prototypes; the groups are the same where the views overlap, and tell images apart.
"""

from __future__ import annotations

import torch
from lightly.models.modules.center import Center
from lightly.utils.dist import gather, rank, world_size
from torch import Tensor, nn

from densessl import EMA, DistanceMatcher, MaskedInfoNCELoss, View, overlap_coords, relative_coords, warp
from examples.pretrain.common.slots import Encoder, Grouped, head, used
from examples.pretrain.common.step import Step, pair_metrics


class SlotCon(nn.Module):
    """Semantic grouping (Wen et al., NeurIPS 2022): cells agree on their prototype, slots are told apart.

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layers of all heads, at least 1.
        dim: Number of channels of the projections.
        prototypes: Number of prototypes.
        student_temperature: Temperature of the online encoder's assignment.
        teacher_temperature: Temperature of the target encoder's assignment, and of the attention.
        temperature: Temperature of the slots' softmax.
        group_weight: Share of the grouping loss, in 0..1.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        hidden_dim: int = 4096,
        dim: int = 256,
        prototypes: int = 2048,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        temperature: float = 0.2,
        group_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if prototypes < 1:
            raise ValueError(f"method.prototypes: expected at least 1, got {prototypes}")
        if not 0 <= group_weight <= 1:
            raise ValueError(f"method.group_weight: expected a number in 0..1, got {group_weight}")
        for name, t in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
            if not t > 0:
                raise ValueError(f"method.{name}: expected a positive number, got {t}")
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.temperature, self.group_weight = temperature, group_weight
        self.encoder = Encoder(backbone, width, hidden_dim, dim, prototypes, teacher_temperature)
        self.predictor = head(dim, hidden_dim, dim)
        self.target = EMA(self.encoder)
        self.center = Center((1, prototypes, 1, 1), momentum=0.9)
        self.contrast = MaskedInfoNCELoss(temperature)
        self.match = DistanceMatcher(0.7)  # for the metrics alone

    def forward(self, view1: View, view2: View) -> Step:
        (q1, q2), (k1, k2) = ([encoder(v.image) for v in (view1, view2)] for encoder in (self.encoder, self.target))
        c1, c2 = view1.coords, view2.coords
        grouping = self.grouping_loss(q1, k2, c1, c2) + self.grouping_loss(q2, k1, c2, c1)
        self.center.update(torch.cat([k1.scores, k2.scores]))
        slots = self.slot_loss(q1, k2) + self.slot_loss(q2, k1)
        loss = self.group_weight * grouping + (1 - self.group_weight) * slots
        terms, size = {"grouping": grouping, "slots": slots}, q1.cells.shape[-2:]
        return Step(loss, terms, lambda: pair_metrics(q1.cells, k2.cells, self.match(c1, c2, size)))

    def grouping_loss(self, query: Grouped, key: Grouped, coords_q: Tensor, coords_k: Tensor) -> Tensor:
        """Cross entropy of the two assignments, on a grid over what the views share; 0 where that is nothing."""
        overlap, shared = overlap_coords(coords_q, coords_k)
        q, k = (
            warp(view.scores, relative_coords(overlap, coords), query.scores.shape[-2:], outside="border")
            for view, coords in ((query, coords_q), (key, coords_k))
        )
        wanted = ((k - self.center.value) / self.teacher_temperature).softmax(1)
        per_image = -(wanted * (q / self.student_temperature).log_softmax(1)).sum(1).mean((1, 2))
        return torch.where(shared, per_image, 0.0).mean()

    def slot_loss(self, query: Grouped, key: Grouped) -> Tensor:
        """Each slot that both views use against those that any image uses in the other view, times 2 t; 0 without."""
        used_q, used_k = used(query.scores), used(key.scores)
        here = used_q & used_k
        # Chosen before the prediction head, whose batch norm shall see no others; that reads their number back. One
        # alone has no batch statistics: it goes with all that its view uses. None is no reason to skip the head:
        # synchronised batch norm waits for all processes.
        chosen = used_q if here.sum() == 1 else here
        q = self.predictor(query.slots[chosen][:, :, None, None])[:, :, 0, 0][here[chosen]]
        number = torch.arange(used_k.numel(), device=used_k.device).view_as(used_k)
        slots, there = key.slots, used_k
        if world_size() > 1:
            slots, there = torch.cat(gather(slots)), torch.cat(gather(used_k.byte())).bool()
            number = number + rank() * used_k.numel()
        positive = number[here][:, None] == there.flatten().nonzero()[:, 0]
        return 2 * self.temperature * self.contrast(q, slots[there], positive, ~positive)


def recipe():
    from examples.pretrain.common.cli import WITHOUT_MASKS, Recipe
    from examples.pretrain.common.optimizers import LinearLARS

    defaults = {"optimizer.lr_at_256": 1.0, "optimizer.weight_decay": 1e-5, "optimizer.warmup": 0.05}
    return Recipe(SlotCon, LinearLARS, without=WITHOUT_MASKS, defaults=defaults)


if __name__ == "__main__":
    recipe().run()
