"""SlotCon's encoder: cells grouped by learned prototypes into slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def head(width: int, hidden_dim: int, dim: int) -> nn.Sequential:
    """Three layers; as 1x1 convolutions it serves maps and, as maps of one cell, slots."""
    sides = ((width, hidden_dim), (hidden_dim, hidden_dim))
    layers = [x for a, b in sides for x in (nn.Conv2d(a, b, 1), nn.BatchNorm2d(b), nn.GELU())]
    return nn.Sequential(*layers, nn.Conv2d(hidden_dim, dim, 1))


class Grouped(NamedTuple):
    """Cells ``(B, D, h, w)``, their likeness to each prototype ``(B, K, h, w)``, and the slots ``(B, K, D)``."""

    cells: Tensor
    scores: Tensor
    slots: Tensor


class Encoder(nn.Module):
    """A backbone, a projection head, and prototypes that pool its cells into slots by attention over them."""

    def __init__(self, backbone: nn.Module, width: int, hidden_dim: int, dim: int, prototypes: int, t: float) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, head(width, hidden_dim, dim)
        self.prototypes, self.t = nn.Parameter(torch.randn(prototypes, dim)), t

    def forward(self, image: Tensor) -> Grouped:
        cells = self.projector(self.backbone(image))
        with torch.autocast(image.device.type, enabled=False):
            cells = cells if cells.dtype == torch.float64 else cells.float()
            scores = torch.einsum("kd,bdhw->bkhw", F.normalize(self.prototypes, dim=1), F.normalize(cells, dim=1))
            share = (scores / self.t).softmax(1) + 1e-6
            slots = torch.einsum("bkhw,bdhw->bkd", share / share.sum((2, 3), keepdim=True), cells)
        return Grouped(cells, scores, slots)


def used(scores: Tensor) -> Tensor:
    """bool ``(B, K)``: the prototypes that are the most like any cell of the image."""
    nearest = scores.flatten(2).argmax(1)
    # Not one_hot: its (B, N, K) of int64 takes 6.6 GB at 512 images of 28x28 cells and 2,048 prototypes.
    return torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, nearest, True)
