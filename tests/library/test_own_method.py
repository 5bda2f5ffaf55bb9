"""A method of one's own from the parts: propagated PixContrast, positives by features, a ViT-S, three views."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from torchvision.transforms import v2

from densessl import (
    EMA,
    PPM,
    ConvMLP,
    FeatureMap,
    MultiView,
    NearestMatcher,
    PixContrastLoss,
    feature_distance,
    pairs_to_mask,
)

timm = pytest.importorskip("timm")


class OwnMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        vit = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=0)
        self.student = nn.Sequential(FeatureMap(vit, "norm"), ConvMLP(384, 256, 64))
        self.teacher, self.ppm = EMA(self.student), PPM(nn.Conv2d(64, 64, 1))
        self.nearest, self.loss = NearestMatcher(mutual=True), PixContrastLoss()

    def pair_loss(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        pairs = self.nearest(feature_distance(query, key))
        mask = pairs_to_mask(pairs, (query[0, 0].numel(), key[0, 0].numel()))
        return self.loss(self.ppm(query), key, mask)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        queries, keys = [self.student(x) for x in images], [self.teacher(x) for x in images]
        pairs = [(q, k) for i, q in enumerate(queries) for j, k in enumerate(keys) if i != j]
        return sum(self.pair_loss(*pair) for pair in pairs) / len(pairs)

    def train_on(self, batches: list[list[torch.Tensor]]) -> list[float]:
        optimizer, losses = torch.optim.AdamW([*self.student.parameters(), *self.ppm.parameters()], 1e-3), []
        for images in batches:
            losses.append(self(*images))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            self.teacher.update(self.student)
        return [loss.item() for loss in losses]


def test_it_takes_less_than_thirty_lines_and_learns():
    assert len([line for line in inspect.getsource(OwnMethod).splitlines() if line.strip()]) < 30
    views = MultiView(*[v2.Compose([v2.RandomResizedCrop(64), v2.ToDtype(torch.float32, scale=True)])] * 3)
    noise = torch.rand(4, 3, 6, 6)
    images = (nn.functional.interpolate(noise, (80, 96), mode="bilinear") * 255).byte()
    batch = [view.image for view in default_collate([views(image) for image in images])]
    method = OwnMethod()
    start = method.teacher.module[1].linear2.weight.clone()
    losses = method.train_on([batch] * 6)
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in method.teacher.parameters())
    assert not torch.equal(start, method.teacher.module[1].linear2.weight)


def test_it_asks_the_library_for_public_names_only():
    imports = [
        line for line in Path(__file__).read_text().splitlines() if line.startswith(("from densessl", "import d"))
    ]
    assert imports == ["from densessl import ("]
