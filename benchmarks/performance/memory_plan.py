"""What PixPro on a large ViT takes of a process's memory under FSDP2, part by part; nothing is allocated.

    python benchmarks/performance/memory_plan.py
    python benchmarks/performance/memory_plan.py --model vit_large_patch16_224 --images 1024 --processes 8

The tables of the docs page Beyond one machine. Networks are built without memory, on torch's meta device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from densessl import FeatureMap
from examples.pretrain.common.sharding import blocks_of
from examples.pretrain.pixpro import PixPro

MODELS = ("vit_large_patch16_224", "vit_giant_patch14_224")
FLOAT, HALF, INDEX = 4, 2, 8  # bytes
PAIR_WHILE_COMPARED = 24  # bytes of temporaries, as DistanceMatcher counts them before it refuses
PAIRS_A_CELL = 2.5  # positives of published crops at T = 0.7: docs/fidelity.md, "How much the rules differ"


class Part(NamedTuple):
    """Memory of one part.

    Attributes:
        name: What it is.
        where: ``sharded`` over the processes, ``gathered`` from them, or each process's ``own``.
        held: Bytes in one process.
    """

    name: str
    where: str
    held: int


def shard_bytes(tensors: Iterable[Tensor], processes: int, each: int = FLOAT) -> int:
    """Bytes of the first process's shares: FSDP2 cuts the first dimension, and rounds up."""
    return sum(each * -(-t.shape[0] // processes) * t[0].numel() if t.ndim else each for t in tensors)


def whole_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of whole tensors in float32, as they are gathered; autocast rounds them afterwards."""
    return sum(FLOAT * t.numel() for t in tensors)


def plan(method: nn.Module, cells: int, images: int, processes: int, *, dim: int, states: int = 1) -> list[Part]:
    """The parts of a PixPro step.

    Args:
        method: Holds ``encoder`` and ``target``; may be on the meta device.
        cells: Cells of a map.
        images: Images of a step over all processes.
        processes: Number of processes.
        dim: Channels of the projections.
        states: Tensors that the optimiser keeps for each parameter: 1 for LARS, 2 for AdamW.
    """
    trained = [p for p in method.parameters() if p.requires_grad]
    averages, blocks = list(method.target.parameters()), blocks_of(method.encoder)
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in trained if id(p) not in in_blocks]
    own, largest = images // processes, max(whole_bytes(block.parameters()) for block in blocks)
    shares = shard_bytes(trained, processes)
    return [
        Part("parameters, float32", "sharded", shares),
        Part("gradients, float32", "sharded", shares),
        Part("optimiser's states, float32", "sharded", states * shares),
        Part("target's averages, float32", "sharded", shard_bytes(averages, processes)),
        Part("two blocks, one that runs and the next, float32", "gathered", 2 * largest),
        Part("patch embedding, norms, heads of encoder and target, float32", "gathered", 2 * whole_bytes(rest)),
        Part("projections of both views and models, propagated ones, float32", "own", 6 * own * cells * dim * FLOAT),
        Part("mask, strided", "own", own * cells * cells),
        Part("while it is made", "own", own * cells * cells * PAIR_WHILE_COMPARED),
        Part("mask, sparse", "own", round(own * cells * PAIRS_A_CELL) * (3 * INDEX + 1)),
        Part(
            "vectors of all images, for InstanceContrastLoss(gather_distributed=True)",
            "gathered",
            2 * images * dim * FLOAT,
        ),
        Part("products of gram_loss or kernel_alignment_loss, float64", "own", 3 * own * dim * dim * 8),
    ]


def activations(model: nn.Module, cells: int, own: int) -> int:
    """Bytes that gradient checkpointing keeps of two views: the input of each block, in bfloat16."""
    return 2 * own * (cells + model.num_prefix_tokens) * model.embed_dim * len(model.blocks) * HALF


def planned(name: str, images: int, processes: int, dim: int = 256) -> tuple[list[Part], int, int]:
    """Parts for one of timm's ViTs at its own size, its number of parameters, and the bytes of its activations."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
        method = PixPro(FeatureMap(model, "norm"), model.embed_dim, dim=dim)
    cells = model.patch_embed.num_patches
    count = sum(p.numel() for p in model.parameters())
    return plan(method, cells, images, processes, dim=dim), count, activations(model, cells, images // processes)


def amount(held: int) -> str:
    """Bytes as people read them."""
    return f"{held / 1e9:.2f} GB" if held >= 1e9 else f"{held / 1e6:.1f} MB"


def table(images: int, processes: int, models: Iterable[str] = MODELS) -> str:
    """Markdown: a row a part, a column a model."""
    columns = {name: planned(name, images, processes) for name in models}
    head = [f"{name}, {count / 1e6:.0f} M parameters" for name, (_, count, _) in columns.items()]
    lines = [
        f"| {images} images, {processes} processes | where | {' | '.join(head)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for row in zip(*(parts for parts, _, _ in columns.values()), strict=True):
        lines.append(f"| {row[0].name} | {row[0].where} | {' | '.join(amount(part.held) for part in row)} |")
    kept = [amount(held) for _, _, held in columns.values()]
    lines.append(f"| inputs of all blocks, kept by gradient checkpointing, bfloat16 | own | {' | '.join(kept)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=MODELS, help="Names of timm's ViTs (%(default)s).")
    parser.add_argument("--images", type=int, default=1024, help="Images of a step, over all processes (%(default)s).")
    parser.add_argument("--processes", type=int, default=32, help="Processes that share the images (%(default)s).")
    args = parser.parse_args(arguments)
    if args.processes < 1 or args.images < 1 or args.images % args.processes:
        parser.error(f"--images: expected a multiple of the {args.processes} processes, got {args.images}")
    print(table(args.images, args.processes, args.model))


if __name__ == "__main__":
    main()
