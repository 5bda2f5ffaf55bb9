"""Relational losses and the matcher of dense coords: memory, speed against the dense form, growth with the cells.

    python benchmarks/performance/relational.py
    python benchmarks/performance/relational.py --quick     (tiny sizes: does it run)

Times are the least of several runs, taken in turns, so that what else the machine does meets both forms alike. Memory
is the allocator's peak beyond the inputs, gradients included.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.performance import plain
from benchmarks.performance.bench import circumstances
from benchmarks.performance.meter import Work, least, peak
from densessl import DistanceMatcher, cell_centers, coords_from_flow, gram_loss, kernel_alignment_loss

LOSSES = {"gram_loss": (gram_loss, plain.gram), "kernel_alignment_loss": (kernel_alignment_loss, plain.alignment)}
AT_MOST_BYTES, AT_LEAST_FASTER, AT_MOST_EXPONENT, AT_MOST_EXPONENT_MATCHING = 120e6, 10, 1.1, 1.2


def both_forms(name: str, size: int, channels: int = 256) -> list[Work]:
    """Ours and plain: 2 images, forward and backward to the query."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, channels, size, size)
    query.requires_grad_()

    def run(form: Any) -> None:
        query.grad = None
        form(query, key).backward()

    return [lambda form=form: run(form) for form in LOSSES[name]]


def matching(size: int) -> Work:
    """Sparse masks of two views with dense coords, of which one comes from a flow."""
    identity = cell_centers(torch.eye(3)[None], (size, size)).mT.unflatten(2, (size, size))
    other = identity + 0.02 * (9 * identity.flip(1)).sin()
    flow: Tensor = 0.03 * size * (7 * identity + 1).sin()
    coords, match = coords_from_flow(flow), DistanceMatcher(0.7, sparse=True)
    return lambda: match(coords, other, (size, size))


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Of time in the number of cells, from the smallest size to the largest."""
    return math.log(seconds[-1] / seconds[0]) / math.log(sizes[-1] ** 2 / sizes[0] ** 2)


def measured(works: list[Work], runs: int) -> list[float]:
    """Least seconds of each, after one run that warms up."""
    for work in works:
        work()
    return least(works, "cpu", runs)


def loss_row(name: str, runs: int, quick: bool) -> dict[str, Any]:
    """What the marks ask of a loss."""
    half, full = (14, 28) if quick else (56, 112)
    ours, dense = measured(both_forms(name, half), runs)
    grown = measured([both_forms(name, size)[0] for size in (half, full)], runs)
    row = {"name": name, "seconds": ours, "dense seconds": dense, "faster": dense / ours}
    row |= {"bytes": peak(both_forms(name, full)[0], "cpu"), "sizes": [half, full], "grown": grown}
    row["exponent"] = exponent([half, full], grown)
    print(
        f"{name}, 2 images, 256 channels: {row['faster']:.1f} times faster than the dense form at {half}x{half} "
        f"({1e3 * ours:.1f} against {1e3 * dense:.1f} ms; wanted {AT_LEAST_FASTER}); {row['bytes'] / 1e6:.0f} MB extra "
        f"at {full}x{full} (wanted at most {AT_MOST_BYTES / 1e6:.0f}); time ~ cells^{row['exponent']:.2f} "
        f"(wanted at most {AT_MOST_EXPONENT})",
        flush=True,
    )
    return row


def matching_row(runs: int, quick: bool) -> dict[str, Any]:
    """Growth of matching on dense coords."""
    sizes = [14, 28] if quick else [56, 112, 224]
    took = measured([matching(size) for size in sizes], runs)
    row = {"name": "DistanceMatcher(sparse=True), dense coords", "sizes": sizes, "seconds": took}
    row["exponent"] = exponent(sizes, took)
    times = ", ".join(f"{1e3 * value:.1f}" for value in took)
    print(
        f"{row['name']}: {times} ms at {', '.join(map(str, sizes))}, time ~ cells^{row['exponent']:.2f} "
        f"(wanted at most {AT_MOST_EXPONENT_MATCHING})",
        flush=True,
    )
    return row


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints, and writes a file where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="Threads of the CPU (%(default)s).")
    parser.add_argument(
        "--runs", type=int, default=10, help="Number of timed runs, the fastest of which counts (%(default)s)."
    )
    parser.add_argument("--quick", action="store_true", help="Use tiny sizes, to see that the program runs.")
    parser.add_argument("--out", type=Path, help="JSON file for the figures (none is written).")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    result = circumstances("cpu")
    print(f"{result['device']}, torch {result['torch']}, load {result['load before']}, {result['date']}", flush=True)
    result["losses"] = [loss_row(name, args.runs, args.quick) for name in LOSSES]
    result["matching"] = matching_row(args.runs, args.quick)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
