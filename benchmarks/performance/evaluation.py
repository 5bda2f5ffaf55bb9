"""Search of a large memory and propagation of labels: ours against plain PyTorch, time and memory, in one run.

    python benchmarks/performance/evaluation.py             (2,000,000 keys; minutes on a quiet machine)
    python benchmarks/performance/evaluation.py --quick     (tiny sizes: does it run)

Times are the least of several runs, taken in turns, in seconds of the clock and of the processor. Those of the
processor say more on a machine that does other work as well. Memory is the allocator's peak beyond the inputs.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.performance.meter import Work, peak
from densessl.evaluation import propagate_labels, retrieve_shares

BLOCK = 32_768


def products(query: Tensor, keys: Tensor) -> None:
    """One plain matrix product of all queries with all keys, in blocks of 512 queries and as many keys as ours."""
    for some in query.split(512):
        for part in keys.split(BLOCK):
            some @ part.mT


def brute_force(query: Tensor, keys: Tensor, shares: Tensor) -> Tensor:
    """The shares read by way of a table of all similarities, some queries at a time."""
    unit, read = F.normalize(keys, dim=1), []
    for some in F.normalize(query, dim=1).split(64):
        cos, index = (some @ unit.mT).topk(30, dim=1)
        read.append(((cos / 0.02).softmax(1).unsqueeze(1) @ shares[index]).squeeze(1))
    return torch.cat(read)


def dense(features: Tensor, first: Tensor, radius: int) -> Tensor:
    """Class shares of the last frame from all others by the masked product of all cells with all cells.

    Only its cost counts here: all frames are given the shares of the first.
    """
    h, w = first.shape[1:]
    y, x = torch.arange(h * w) // w, torch.arange(h * w) % w
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    unit = F.normalize(features.flatten(2), dim=1)
    affinity = torch.cat([(unit[-1].mT @ frame / 0.1).exp() * near for frame in unit[:-1]], 1)
    best, place = affinity.topk(5, dim=1)
    sources = first.flatten(1).mT.repeat(len(unit) - 1, 1)
    return ((best / best.sum(1, keepdim=True)).unsqueeze(1) @ sources[place]).squeeze(1).mT.view_as(first)


def least(works: list[Work], runs: int) -> list[tuple[float, float]]:
    """Least seconds of the clock and of the processor of each, in turns."""
    best = [(float("inf"), float("inf"))] * len(works)
    for _ in range(runs):
        for index, work in enumerate(works):
            clock, processor = time.perf_counter(), time.process_time()
            work()
            now = time.perf_counter() - clock, time.process_time() - processor
            best[index] = min(best[index][0], now[0]), min(best[index][1], now[1])
    return best


def compared(name: str, works: list[Work], runs: int) -> dict:
    """Seconds of ours and of the plain form, their ratios, and the bytes that ours takes."""
    ours, plain = least(works, runs)
    row = {"name": name, "seconds": ours, "plain seconds": plain, "bytes": peak(works[0], "cpu")}
    row["times"] = ours[0] / plain[0], ours[1] / plain[1]
    print(f"{name}: {ours[0]:.2f} s ({ours[1]:.2f} of the processor), plain {plain[0]:.2f} ({plain[1]:.2f}); ", end="")
    print(f"{row['times'][0]:.2f} times ({row['times'][1]:.2f}); {row['bytes'] / 1e6:.0f} MB", flush=True)
    return row


def retrieval(quick: bool, runs: int) -> dict:
    """A memory of 2,000,000 keys of 64 channels and 10,000 queries; equal to brute force on a tenth of both."""
    torch.manual_seed(0)
    count, asked = (20_000, 600) if quick else (2_000_000, 10_000)
    keys, shares, query = torch.randn(count, 64), torch.rand(count, 21), torch.randn(asked, 64)
    some = keys[: count // 10], shares[: count // 10]
    off = (retrieve_shares(query[: asked // 10], *some) - brute_force(query[: asked // 10], *some)).abs().max()
    works: list[Work] = [lambda: retrieve_shares(query, keys, shares), lambda: products(query, keys)]
    row = compared(f"retrieve_shares, {count} keys, {asked} queries, 64 channels, against one product", works, runs)
    return row | {"greatest difference from brute force on a tenth": float(off)}


def propagation(quick: bool, runs: int) -> dict:
    """All frames of a video of 9 with 60x107 cells, radius 12: the last one has a context of 8 frames."""
    torch.manual_seed(0)
    h, w = (12, 20) if quick else (60, 107)
    radius = 3 if quick else 12
    features, first = torch.randn(9, 384, h, w), torch.rand(4, h, w)
    works: list[Work] = [
        lambda: propagate_labels(features, first, radius=radius),
        lambda: [dense(features[: time + 1], first, radius) for time in range(1, 9)],
    ]
    name = f"propagate_labels, 9 frames of {h}x{w} cells, radius {radius}, against the dense product"
    return compared(name, works, runs)


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="Threads of the CPU (%(default)s).")
    parser.add_argument(
        "--runs",
        type=int,
        default=3,
        help="Number of timed runs, taken in turns, the fastest of which counts (%(default)s).",
    )
    parser.add_argument("--quick", action="store_true", help="Use tiny sizes, to see that the program runs.")
    parser.add_argument("--out", type=Path, help="JSON file for the figures (none is written).")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    rows = [retrieval(args.quick, args.runs), propagation(args.quick, args.runs)]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
