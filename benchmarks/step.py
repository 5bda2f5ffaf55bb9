"""One training step of PixPro against the encoder's work alone, and against a plain implementation, in one run.

"Encoder alone" is what the method cannot do without: two online passes forward and backward and two target passes
forward, of backbone and projection head, same precision and layout. "Plain" is the same step as one would write it:
NCHW, dense masks and logits, per-parameter loops for the momentum encoder and LARS.

    python benchmarks/step.py                                  (on a GPU: ResNet-50, 224 px, bf16, batch 256)
    python benchmarks/step.py --backbone resnet18 --size 96 --batch-size 16      (on a CPU)
"""

import argparse
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from densessl import EMA, LARS, PPM, ConvMLP, DistanceMatcher, FeatureMap, PixProLoss, coords_from_boxes, param_groups

IMAGENET = 1_281_167


def make(args: argparse.Namespace, layout: torch.memory_format) -> tuple[nn.Module, nn.Module, EMA]:
    torch.manual_seed(0)
    backbone = FeatureMap(torchvision.models.get_model(args.backbone), "layer4")
    width = 512 if args.backbone in ("resnet18", "resnet34") else 2048
    encoder = nn.Sequential(backbone, ConvMLP(width)).to(args.device, memory_format=layout)
    return encoder, PPM(nn.Conv2d(256, 256, 1)).to(args.device), EMA(encoder)


def timed(step: Callable[[], None], args: argparse.Namespace) -> float:
    """Seconds of the fastest of several steps."""
    best = float("inf")
    for index in range(args.warmup + args.steps):
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        if index >= args.warmup:
            best = min(best, time.perf_counter() - start)
    return best


def random_views(args: argparse.Namespace, layout: torch.memory_format) -> tuple[list[Tensor], list[Tensor]]:
    images, coords = [], []
    for _ in range(2):
        x = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)
        images.append(x.contiguous(memory_format=layout))
        side = torch.rand(args.batch_size, 2, device=args.device) * 0.6 + 0.3
        start = torch.rand(args.batch_size, 2, device=args.device) * (1 - side)
        coords.append(coords_from_boxes(torch.cat([start, start + side], 1)))
    return images, coords


def ours(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a whole step and of the encoder's work alone."""
    layout = torch.channels_last
    encoder, ppm, target = make(args, layout)
    (x1, x2), (c1, c2) = random_views(args, layout)
    match, loss = DistanceMatcher(), PixProLoss()
    optimizer = LARS(param_groups(nn.ModuleList([encoder, ppm]), 1e-5), lr=0.1)

    def forward() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            return encoder(x1), encoder(x2), target(x1), target(x2)

    def whole() -> None:
        z1, z2, t1, t2 = forward()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            mask = match(c1, c2, z1.shape[-2:])
            value = 2 * (loss(ppm(z1), t2, mask) + loss(ppm(z2), t1, mask.mT))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        target.update(encoder)

    def alone() -> None:
        z1, z2, _, _ = forward()
        encoder.zero_grad()
        torch.autograd.backward([z1, z2], [torch.ones_like(z1), torch.ones_like(z2)])

    return timed(whole, args), timed(alone, args)


def plain(args: argparse.Namespace) -> float:
    """Seconds of a step in the default layout, with dense (N, N) tensors and loops over parameters."""
    encoder, ppm, target = make(args, torch.contiguous_format)
    (x1, x2), (c1, c2) = random_views(args, torch.contiguous_format)
    match = DistanceMatcher()
    trained = [*encoder.parameters(), *ppm.parameters()]
    momenta = [torch.zeros_like(p) for p in trained]

    def direction(y: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        y, t = nn.functional.normalize(y.flatten(2), dim=1), nn.functional.normalize(t.flatten(2), dim=1)
        logits = torch.bmm(y.mT, t)
        return -2 * ((logits * mask).sum((1, 2)) / (mask.sum((1, 2)) + 1e-6)).mean()

    @torch.no_grad()
    def update() -> None:
        for p, buffer in zip(trained, momenta, strict=True):
            d = p.grad + (1e-5 * p if p.ndim > 1 else 0)
            if p.ndim > 1 and p.norm() > 0 and d.norm() > 0:
                d = d * (1e-3 * p.norm() / (d.norm() + 1e-8))
            buffer.mul_(0.9).add_(d)
            p.sub_(0.1 * buffer)
        for old, new in zip(target.module.parameters(), encoder.parameters(), strict=True):
            old.mul_(0.99).add_(new, alpha=0.01)

    def whole() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            z1, z2, t1, t2 = encoder(x1), encoder(x2), target(x1), target(x2)
            mask = match(c1, c2, z1.shape[-2:]).float()
            value = direction(ppm(z1), t2, mask) + direction(ppm(z2), t1, mask.mT)
        for p in trained:
            p.grad = None
        value.backward()
        update()

    return timed(whole, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 8)
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 4)
    parser.add_argument("--warmup", type=int, default=5 if on_gpu else 1)
    args = parser.parse_args()
    args.device, args.bf16 = ("cuda", True) if on_gpu else ("cpu", False)
    hardware = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {hardware}, {args.backbone}, {args.size} px, batch {args.batch_size}")
    whole, alone = ours(args)
    peak = f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
    other = plain(args)
    images = args.batch_size / whole
    print(f"step {1e3 * whole:.1f} ms, {images:.1f} images/s{peak}")
    print(f"against the encoder's work alone ({1e3 * alone:.1f} ms): {whole / alone:.2f} times")
    print(f"against the plain step ({1e3 * other:.1f} ms): {other / whole:.2f} times faster")
    print(f"100 epochs of ImageNet at this rate: {IMAGENET * 100 / images / 3600:.0f} hours")


if __name__ == "__main__":
    main()
