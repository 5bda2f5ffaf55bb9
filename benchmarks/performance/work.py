"""What is measured: each piece of work ours and plain, on inputs drawn from a seed."""

import math

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.performance import plain
from benchmarks.performance.meter import Work, seconds
from densessl import (
    EMA,
    LARS,
    PPM,
    ConvMLP,
    DistanceMatcher,
    FeatureMap,
    PixProLoss,
    coords_from_boxes,
    param_groups,
    pixcontrast_loss,
    pixpro_loss,
)

LOSSES = {"pixpro": (pixpro_loss, plain.pixpro), "pixcontrast": (pixcontrast_loss, plain.pixcontrast)}


def crops(batch: int) -> Tensor:
    """Sides of 0.3 to 0.9 of the image."""
    side = torch.rand(batch, 2) * 0.6 + 0.3
    start = torch.rand(batch, 2) * (1 - side)
    return coords_from_boxes(torch.cat([start, start + side], 1))


def rotations(batch: int) -> Tensor:
    """Squares of side 0.4 to 0.7, turned by any angle about their centre near the image's."""
    angle, side = 2 * math.pi * torch.rand(batch), torch.rand(batch) * 0.3 + 0.4
    cos, sin = side * angle.cos(), side * angle.sin()
    x, y = torch.rand(2, batch) * 0.2 + 0.4
    rows = [cos, -sin, x - (cos - sin) / 2, sin, cos, y - (sin + cos) / 2, 0 * x, 0 * x, 0 * x + 1]
    return torch.stack(rows, 1).unflatten(1, (3, 3))


def matching_and_loss(
    name: str, size: int, batch: int, channels: int, device: str, *, sparse: bool = True, views=crops
) -> list[Work]:
    """Ours and plain: masks of two views and one direction of the loss, forward and backward to the query."""
    torch.manual_seed(0)
    coords = views(batch).to(device), views(batch).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key = torch.randn(2, batch, channels, size, size, device=device, dtype=dtype)
    query.requires_grad_()
    match = DistanceMatcher(sparse=sparse)
    ours, other = LOSSES[name]

    def run(value: Tensor) -> None:
        query.grad = None
        value.backward()

    return [
        lambda: run(ours(query, key, match(*coords, (size, size)))),
        lambda: run(other(query, key, plain.match(*coords, size))),
    ]


def propagation(size: int, batch: int, channels: int, device: str, algorithm: str | None = None) -> list[Work]:
    """Ours and plain: the pixel propagation module, forward and backward."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, batch, channels, size, size, device=device)
    x.requires_grad_()
    transform = nn.Conv2d(channels, channels, 1).to(device)

    def run(module: nn.Module) -> None:
        x.grad = None
        module.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            y = module(x)
        y.backward(grad.to(y.dtype))

    return [lambda: run(PPM(transform, algorithm=algorithm)), lambda: run(plain.PPM(transform))]


def bookkeeping(model: str, device: str) -> list[Work]:
    """Ours and plain: LARS and the momentum encoder over a network's parameters."""
    torch.manual_seed(0)
    networks = [torchvision.models.get_model(model).to(device) for _ in range(2)]
    for network in networks:
        for p in network.parameters():
            p.grad = torch.randn_like(p)
    target, optimizer = EMA(networks[0]), LARS(param_groups(networks[0], 1e-5), lr=0.1)
    params = list(networks[1].parameters())
    loops = plain.Bookkeeping(params, [p.detach().clone() for p in params])

    def ours() -> None:
        optimizer.step()
        target.update(networks[0])

    return [ours, loops.step]


def step_shares(model: str, pixels: int, batch: int, device: str) -> tuple[float, float]:
    """Seconds of a PixPro step that backbone and projection head take, and of all the rest."""
    torch.manual_seed(0)
    width = 512 if model in ("resnet18", "resnet34") else 2048
    encoder = nn.Sequential(FeatureMap(torchvision.models.get_model(model), "layer4"), ConvMLP(width))
    encoder = encoder.to(device, memory_format=torch.channels_last)
    ppm, target = PPM(nn.Conv2d(256, 256, 1)).to(device), EMA(encoder)
    match, loss = DistanceMatcher(), PixProLoss()
    optimizer = LARS(param_groups(nn.ModuleList([encoder, ppm]), 1e-5), lr=0.1)
    c1, c2 = crops(batch).to(device), crops(batch).to(device)
    x1, x2 = (
        torch.randn(batch, 3, pixels, pixels, device=device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    kept: dict[str, Tensor] = {}
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def forward() -> None:
        optimizer.zero_grad()
        with autocast:
            kept.update(z1=encoder(x1), z2=encoder(x2), t1=target(x1), t2=target(x2))

    def method() -> None:
        """To the gradients of the projections."""
        kept["y1"], kept["y2"] = kept["z1"].detach().requires_grad_(), kept["z2"].detach().requires_grad_()
        with autocast:
            mask = match(c1, c2, kept["y1"].shape[-2:])
            value = loss(ppm(kept["y1"]), kept["t2"], mask) + loss(ppm(kept["y2"]), kept["t1"], mask.mT)
        (2 * value).backward()

    def backward() -> None:
        torch.autograd.backward([kept["z1"], kept["z2"]], [kept["y1"].grad, kept["y2"].grad])

    def update() -> None:
        optimizer.step()
        target.update(encoder)

    took = [seconds(part, device) for part in (forward, method, backward, update)]
    return took[0] + took[2], took[1] + took[3]
