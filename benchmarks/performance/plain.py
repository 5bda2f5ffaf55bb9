"""The same computations as one writes them first: tables of all pairs of cells, loops over parameters."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def match(coords_q: Tensor, coords_k: Tensor, size: int, threshold: float = 0.7) -> Tensor:
    """Mask of homographies without perspective, as a float table of all pairs."""
    grid = (torch.arange(size, device=coords_q.device) + 0.5) / size
    points = torch.stack([grid.repeat(size), grid.repeat_interleave(size), torch.ones_like(grid).repeat(size)])
    a, b = ((coords @ points)[:, :2] for coords in (coords_q, coords_k))
    distance = ((a[:, 0, :, None] - b[:, 0, None]) ** 2 + (a[:, 1, :, None] - b[:, 1, None]) ** 2).sqrt()
    diagonal = torch.maximum(*(coords[:, :2, :2].flatten(1).norm(dim=1) / size for coords in (coords_q, coords_k)))
    known = [((p >= 0) & (p <= 1)).all(1) for p in (a, b)]
    return ((distance / diagonal[:, None, None] < threshold) & known[0][:, :, None] & known[1][:, None]).float()


def pixpro(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Logits of all pairs, times the mask."""
    query, key = F.normalize(query.float().flatten(2), dim=1), F.normalize(key.float().flatten(2), dim=1)
    logits = torch.bmm(query.mT, key)
    return -((logits * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6)).mean()


def pixcontrast(query: Tensor, key: Tensor, mask: Tensor, temperature: float = 0.3) -> Tensor:
    """Logits of all pairs, once over all keys and once over the positives."""
    query, key = F.normalize(query.float().flatten(2), dim=1), F.normalize(key.float().flatten(2), dim=1)
    logits = torch.bmm(query.mT, key) / temperature
    found = mask.sum(2) > 0
    positive = logits.masked_fill(mask == 0, -1e4).logsumexp(2)
    cells = (logits.logsumexp(2) - positive) * found
    return (cells.sum(1) / found.sum(1).clamp(min=1)).mean()


def gram(query: Tensor, key: Tensor) -> Tensor:
    """Both tables of similarities, and the mean of their squared difference."""
    x, g = (F.normalize(maps.flatten(2).mT, dim=2) for maps in (query, key))
    return (x @ x.mT - g @ g.mT).square().mean()


def alignment(query: Tensor, key: Tensor) -> Tensor:
    """One less the cosine of both centred kernels."""
    kernels = []
    for maps in (query, key):
        tokens = maps.flatten(2).mT
        tokens = tokens - tokens.mean(1, keepdim=True)
        kernels.append((tokens @ tokens.mT).flatten(1))
    return (1 - F.cosine_similarity(*kernels)).mean()


class PPM(nn.Module):
    """Weights of all pairs."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(x.flatten(2), dim=1)
        weights = torch.bmm(unit.mT, unit).clamp(min=0) ** 2
        values = F.normalize(self.transform(x).flatten(2), dim=1)
        return torch.bmm(values, weights.mT).view(x.shape[0], -1, *x.shape[2:])


class Bookkeeping:
    """LARS and the momentum encoder, parameter by parameter."""

    def __init__(self, params: list[Tensor], targets: list[Tensor]) -> None:
        self.params, self.targets = params, targets
        self.momenta = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, buffer in zip(self.params, self.momenta, strict=True):
            d = p.grad
            if p.ndim > 1:
                d = d + 1e-5 * p
                size, length = p.norm(), d.norm()
                if size > 0 and length > 0:
                    d = d * (1e-3 * size / (length + 1e-8))
            buffer.mul_(0.9).add_(d)
            p.sub_(0.1 * buffer)
        for old, new in zip(self.targets, self.params, strict=True):
            old.mul_(0.99).add_(new, alpha=0.01)
