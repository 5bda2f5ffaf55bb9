"""A method of one's own, as a recipe: contrast by place, without the pairs that the teacher doubts.

    python examples/pretrain/own_method.py fit --config examples/pretrain/own_method_r18.yaml --data.folder FOLDER

The docs page "Write your own method" comes to this file step by step.
"""

# --8<-- [start:matcher]
from typing import Any

import pytorch_lightning as pl
import torch
from backbones import make_backbone
from engine import health, is_logged, lars_with_warmup, refuse_nodata, run, start_target
from reading import Batch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl import EMA, ConvMLP, DistanceMatcher, feature_distance, map_to_tokens


def sure_pairs(mask: Tensor, key1: Tensor, key2: Tensor) -> Tensor:
    """The pairs by place whose two cells the teacher finds at least as alike as the image's pairs on average."""
    distance = feature_distance(key1, key2)
    average = (distance * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)
    return mask & (distance <= average[:, None, None])


# --8<-- [end:matcher]
# --8<-- [start:loss]
def contrast(query: Tensor, key: Tensor, positive: Tensor, silent: Tensor, temperature: float = 0.3) -> Tensor:
    """InfoNCE, the mean over an image's cells that have a positive, then over images; silent pairs do not take part."""
    q, k = (F.normalize(map_to_tokens(x).float(), dim=-1) for x in (query, key))
    has = positive.any(2)
    # Rows without a positive keep all their cells in both sums, which makes them 0: log(0) would leave NaN behind.
    logits = (q @ k.mT / temperature).masked_fill(silent & has[..., None], -torch.inf)
    near = logits.masked_fill(~positive & has[..., None], -torch.inf)
    per_cell = logits.logsumexp(2) - near.logsumexp(2)
    return (per_cell.sum(1) / has.sum(1).clamp(min=1)).mean()


# --8<-- [end:loss]
# --8<-- [start:recipe]
class OwnMethod(pl.LightningModule):
    """PixContrast on the pairs by place of which the teacher is sure.

    Args:
        backbone: name of a torchvision or timm model.
        layer: to cut it after.
        init: ``"random"``, ``"imagenet"``, or a file to go on from.
        hidden_dim: of the projection head.
        dim: of the projections.
        lr_at_1024: learning rate at 1,024 images a step; others follow by the square-root rule.
        size: side of the views; linked to ``data.size``.
        channels: of the images; linked to ``data.channels``.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        layer: str = "layer2",
        init: str = "random",
        hidden_dim: int = 512,
        dim: int = 128,
        lr_at_1024: float = 4.0,
        size: int = 224,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        features, width = make_backbone(backbone, layer, init, size, channels)
        self.encoder = nn.Sequential(features, ConvMLP(width, hidden_dim, dim))
        self.target = EMA(self.encoder)
        self.match = DistanceMatcher(0.7)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        view1, view2 = batch.view1, batch.view2
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        mask = self.match(view1.coords, view2.coords, z1.shape[-2:], source_size=view1.source_size)
        sure = sure_pairs(mask, t1, t2)
        silent = mask & ~sure
        with torch.autocast(self.device.type, enabled=False):
            loss = 0.5 * (contrast(z1, t2, sure, silent) + contrast(z2, t1, sure.mT, silent.mT))

        self.log("loss", loss, prog_bar=True)
        if is_logged(self.trainer):
            self.log_dict(health(z1.detach(), t2, sure))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.target.update(self.encoder)

    def on_fit_start(self) -> None:
        refuse_nodata(self.trainer)
        start_target(self.target, self.encoder, self.trainer)

    def configure_optimizers(self) -> Any:
        return lars_with_warmup(self.encoder, self.trainer, self.hparams.lr_at_1024, weight_decay=1e-5, warmup=0.05)


if __name__ == "__main__":
    run(OwnMethod)
# --8<-- [end:recipe]
