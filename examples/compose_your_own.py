"""A dense method of one's own, from parts: contrast each cell with its nearest neighbour in feature space.

Published methods pair cells by where they lie. Here a cell's positive is the most similar cell of the other view, among
those that lie near it (within two cell diagonals). Runs in seconds: python examples/compose_your_own.py
"""

import torch
from torch import nn
from torch.utils.data import default_collate
from torchvision.models import resnet18

from densessl import (
    EMA,
    LARS,
    ConvMLP,
    DistanceMatcher,
    FeatureMap,
    NearestMatcher,
    byol_views,
    feature_distance,
    pairs_to_mask,
    param_groups,
    pixcontrast_loss,
)
from examples.quickstart.scenes import draw_scene


def main(steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    images = [draw_scene(seed=0, index=i)[0] for i in range(16)]
    views = byol_views(size=64)  # any torchvision v2 pipelines do: MultiView(first, second)

    encoder = nn.Sequential(FeatureMap(resnet18(), "layer2"), ConvMLP(128, 256, 64))
    target = EMA(encoder, momentum=0.99)
    near, nearest = DistanceMatcher(threshold=2.0), NearestMatcher(mutual=True)
    optimizer = LARS(param_groups(encoder, weight_decay=1e-5), lr=1.0)

    losses = []
    for _ in range(steps):
        a, b = default_collate([views(image) for image in images])  # as a DataLoader collates them
        query, key = encoder(a.image), target(b.image)
        allowed = near(a.coords, b.coords, (8, 8))
        mask = pairs_to_mask(nearest(feature_distance(query, key), valid=allowed), (64, 64))
        # Every other cell is a negative here, also one that lies near but was not chosen.
        loss = pixcontrast_loss(query, key, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.update(encoder)
        losses.append(loss.item())
        print(f"loss {losses[-1]:.3f}, {mask.sum()} pairs of cells")
    return losses


if __name__ == "__main__":
    main()
