"""SlotCon on a folder of images.

    python examples/pretrain/slotcon.py fit --config examples/pretrain/slotcon_r50_100ep.yaml --data.folder FOLDER

Cells are grouped by learned prototypes; the groups are the same where the views overlap, and tell images apart.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from backbones import make_backbone
from engine import health, is_logged, refuse_nodata, run, start_target
from lightly.models.modules.center import Center
from lightly.utils.dist import gather
from linear_rule import lars_by_linear_rule
from reading import Batch
from slots import Encoder, Grouped, head, used
from torch import Tensor, nn

from densessl import EMA, DistanceMatcher, MaskedInfoNCELoss, overlap_coords, relative_coords, warp


class SlotCon(pl.LightningModule):
    """Semantic grouping (Wen et al., NeurIPS 2022): cells agree on their prototype, slots are told apart.

    Args:
        backbone: name of a torchvision or timm model.
        layer: to cut it after.
        init: ``"random"``, ``"imagenet"``, or a file to go on from.
        hidden_dim: of the projection and the prediction head.
        dim: of the projections.
        prototypes: their number.
        student_temperature: of the online encoder's assignment.
        teacher_temperature: of the target's, and of the attention.
        temperature: of the slots' softmax.
        group_weight: share of the grouping loss.
        lr_at_256: learning rate at 256 images a step; others follow by the linear rule.
        weight_decay: of weights of more than one dimension.
        warmup: share of the steps.
        momentum: of the target encoder at the start.
        compile: torch.compile the encoders.
        size: side of the views; linked to ``data.size``.
        channels: of the images; linked to ``data.channels``.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        layer: str = "layer4",
        init: str = "random",
        hidden_dim: int = 4096,
        dim: int = 256,
        prototypes: int = 2048,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        temperature: float = 0.2,
        group_weight: float = 0.5,
        lr_at_256: float = 1.0,
        weight_decay: float = 1e-5,
        warmup: float = 0.05,
        momentum: float = 0.99,
        compile: bool = False,
        size: int = 224,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if prototypes < 1:
            raise ValueError(f"model.prototypes: expected at least 1, got {prototypes}")
        if not 0 <= group_weight <= 1:
            raise ValueError(f"model.group_weight: expected a number in 0..1, got {group_weight}")
        for name, t in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
            if not t > 0:
                raise ValueError(f"model.{name}: expected a positive number, got {t}")
        self.save_hyperparameters()
        features, width = make_backbone(backbone, layer, init, size, channels)
        self.encoder = Encoder(features, width, hidden_dim, dim, prototypes, teacher_temperature)
        self.predictor = head(dim, hidden_dim, dim)
        self.target = EMA(self.encoder)
        self.center = Center((1, prototypes, 1, 1), momentum=0.9)
        self.contrast = MaskedInfoNCELoss(temperature)
        self.match = DistanceMatcher(0.7)  # for the meters alone
        if compile:
            self.encoder.compile()
            self.target.module.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2 = batch.view1, batch.view2
        q1, q2 = self.encoder(view1.image), self.encoder(view2.image)
        k1, k2 = self.target(view1.image), self.target(view2.image)
        c1, c2 = view1.coords, view2.coords
        grouping = self.grouping_loss(q1, k2, c1, c2) + self.grouping_loss(q2, k1, c2, c1)
        self.center.update(torch.cat([k1.scores, k2.scores]))
        slots = self.slot_loss(q1, k2) + self.slot_loss(q2, k1)
        loss = self.hparams.group_weight * grouping + (1 - self.hparams.group_weight) * slots

        self.log_dict({"loss": loss, "loss/grouping": grouping, "loss/slots": slots}, prog_bar=True)
        if is_logged(self.trainer):
            self.log_dict(health(q1.cells.detach(), k2.cells, self.match(c1, c2, q1.cells.shape[-2:])))
            self.log("momentum", self.target.momentum(self.target.step))
        return loss

    def grouping_loss(self, query: Grouped, key: Grouped, coords_q: Tensor, coords_k: Tensor) -> Tensor:
        """Cross entropy of the two assignments, on a grid over what the views share; 0 where that is nothing."""
        overlap, shared = overlap_coords(coords_q, coords_k)
        q, k = (
            warp(view.scores, relative_coords(overlap, coords), query.scores.shape[-2:], outside="border")
            for view, coords in ((query, coords_q), (key, coords_k))
        )
        wanted = ((k - self.center.value) / self.hparams.teacher_temperature).softmax(1)
        per_image = -(wanted * (q / self.hparams.student_temperature).log_softmax(1)).sum(1).mean((1, 2))
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
        if self.trainer.world_size > 1:
            slots, there = torch.cat(gather(slots)), torch.cat(gather(used_k.byte())).bool()
            number = number + self.global_rank * used_k.numel()
        positive = number[here][:, None] == there.flatten().nonzero()[:, 0]
        return 2 * self.hparams.temperature * self.contrast(q, slots[there], positive, ~positive)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.target.update(self.encoder)

    def on_fit_start(self) -> None:
        refuse_nodata(self.trainer)
        start_target(self.target, self.encoder, self.trainer, self.hparams.momentum)

    def configure_optimizers(self) -> Any:
        h = self.hparams
        trained = nn.ModuleList([self.encoder, self.predictor])
        return lars_by_linear_rule(trained, self.trainer, h.lr_at_256, h.weight_decay, h.warmup)


if __name__ == "__main__":
    run(SlotCon)
