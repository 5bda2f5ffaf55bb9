"""A method of one's own, as a recipe: contrast by position, without the pairs that the target encoder doubts.

    python examples/pretrain/own_method.py fit --data.folder FOLDER \\
        --config examples/pretrain/configs/own_method_r18.yaml

The docs page "Write your own method" comes to this file step by step.
"""

# --8<-- [start:matcher]
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densessl import EMA, ConvMLP, DistanceMatcher, View, feature_distance, map_to_tokens
from examples.pretrain.common.step import Step, pair_metrics


def sure_pairs(mask: Tensor, key1: Tensor, key2: Tensor) -> Tensor:
    """The pairs whose two cells the target encoder finds at least as alike as the image's pairs on average."""
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
class OwnMethod(nn.Module):
    """PixContrast on the pairs by position of which the target encoder is sure.

    Args:
        backbone: Images ``(B, C, H, W)`` to a feature map.
        width: Number of channels of that map.
        hidden_dim: Number of channels of the hidden layer of the projection head, at least 1.
        dim: Number of channels of the projections.
    """

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int = 512, dim: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(backbone, ConvMLP(width, hidden_dim, dim))
        self.target = EMA(self.encoder)
        self.match = DistanceMatcher(0.7)

    def forward(self, view1: View, view2: View) -> Step:
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        t1, t2 = self.target(view1.image), self.target(view2.image)
        mask = self.match(view1.coords, view2.coords, z1.shape[-2:], source_size=view1.source_size)
        sure = sure_pairs(mask, t1, t2)
        silent = mask & ~sure
        with torch.autocast(z1.device.type, enabled=False):
            loss = 0.5 * (contrast(z1, t2, sure, silent) + contrast(z2, t1, sure.mT, silent.mT))
        return Step(loss, {}, lambda: pair_metrics(z1, t2, sure))


# --8<-- [end:recipe]
# --8<-- [start:command]
def recipe():
    from examples.pretrain.common.cli import WITHOUT_MASKS, Recipe

    defaults = {"backbone.name": "resnet18", "backbone.layer": "layer2"}
    return Recipe(OwnMethod, without=WITHOUT_MASKS, defaults=defaults)


if __name__ == "__main__":
    recipe().run()
# --8<-- [end:command]
