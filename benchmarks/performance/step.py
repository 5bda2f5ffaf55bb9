"""One training step of PixPro against the encoder's work alone, and against a plain implementation, in one run.

"Encoder alone" is what the method cannot do without: two online passes forward and backward and two target passes
forward, of backbone and projection head, same precision and layout. "Plain" is the same step as one would write it:
NCHW, dense masks and logits, per-parameter loops for the momentum encoder and LARS.

    python benchmarks/performance/step.py      (on a GPU: ResNet-50, 224 px, bf16, batch 256)
    python benchmarks/performance/step.py --backbone resnet18 --size 96 --batch-size 16      (on a CPU)
"""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.performance import plain as plain_forms
from benchmarks.performance.work import crops
from densessl import LARS, View, param_groups
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.pixpro import PixPro

IMAGENET = 1_281_167


def make(args: argparse.Namespace, layout: torch.memory_format) -> PixPro:
    torch.manual_seed(0)
    return PixPro(*make_backbone(args.backbone, size=args.size)).to(args.device, memory_format=layout)


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


def random_views(args: argparse.Namespace, layout: torch.memory_format) -> list[View]:
    source_size = torch.full((args.batch_size, 2), 400, device=args.device)
    images = [torch.randn(args.batch_size, 3, args.size, args.size, device=args.device) for _ in range(2)]
    return [View(x.contiguous(memory_format=layout), crops(len(x)).to(args.device), source_size) for x in images]


def ours(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a whole step and of the encoder's work alone."""
    method = make(args, torch.channels_last)
    view1, view2 = random_views(args, torch.channels_last)
    optimizer = LARS(param_groups(method, 1e-5), lr=0.1)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)

    def whole() -> None:
        with autocast:
            loss = method(view1, view2).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.target.update(method.encoder)

    def alone() -> None:
        with autocast:
            z1, z2 = method.encoder(view1.image), method.encoder(view2.image)
            method.target(view1.image), method.target(view2.image)
        method.encoder.zero_grad()
        torch.autograd.backward([z1, z2], [torch.ones_like(z1), torch.ones_like(z2)])

    return timed(whole, args), timed(alone, args)


def plain(args: argparse.Namespace) -> float:
    """Seconds of a step in the default layout, with dense (N, N) tensors and loops over parameters."""
    method = make(args, torch.contiguous_format)
    view1, view2 = random_views(args, torch.contiguous_format)
    ppm = plain_forms.PPM(method.ppm.transform)
    trained = [p for p in method.parameters() if p.requires_grad]
    loops = plain_forms.Bookkeeping(trained, [p.detach().clone() for p in trained])

    def whole() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            z1, z2 = method.encoder(view1.image), method.encoder(view2.image)
            t1, t2 = method.target(view1.image), method.target(view2.image)
            mask = plain_forms.match(view1.coords, view2.coords, z1.shape[-1])
            loss = plain_forms.pixpro(ppm(z1), t2, mask) + plain_forms.pixpro(ppm(z2), t1, mask.mT)
        for p in trained:
            p.grad = None
        (2 * loss).backward()
        loops.step()

    return timed(whole, args)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--backbone", default="resnet50", help="Name of the backbone in torchvision (%(default)s).")
    parser.add_argument("--size", type=int, default=224, help="Side of the views in pixels (%(default)s).")
    parser.add_argument("--batch-size", type=int, default=256 if on_gpu else 8, help="Images of a step (%(default)s).")
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 4, help="Timed steps (%(default)s).")
    parser.add_argument("--warmup", type=int, default=5 if on_gpu else 1, help="Steps before those (%(default)s).")
    args = parser.parse_args(argv)
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
