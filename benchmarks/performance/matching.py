"""The sparse mask by windows against blocks of rows, which compare every query cell with every key cell.

    python benchmarks/performance/matching.py      (on the GPU where there is one)
    python benchmarks/performance/matching.py --sizes 28 --images 2      (on a CPU)

Both find the same pairs. The matcher uses windows if there are more than 262,144 (2^18) pairs of cells to compare in
all images of the batch, and blocks of rows otherwise.
"""

import argparse

import torch

from benchmarks.performance.meter import least
from benchmarks.performance.work import crops, rotations
from densessl import DistanceMatcher
from densessl.matching import distance


def limited(few_pairs: int, block: int, *given) -> torch.Tensor:
    """The mask with other limits: blocks of rows up to ``few_pairs`` pairs, each of at most ``block`` pairs."""
    kept = distance._FEW_PAIRS, distance._BLOCK_PAIRS
    distance._FEW_PAIRS, distance._BLOCK_PAIRS = few_pairs, block
    try:
        return DistanceMatcher(sparse=True)(*given)
    finally:
        distance._FEW_PAIRS, distance._BLOCK_PAIRS = kept


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", default="28,56,112", help="Sides of the maps in cells, with commas between (%(default)s)."
    )
    parser.add_argument("--images", type=int, default=16, help="Images of a batch (%(default)s).")
    parser.add_argument(
        "--runs", type=int, default=5, help="Number of timed runs, the fastest of which counts (%(default)s)."
    )
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print("| map | views | pairs found | windows | rows, blocks of 4 million | rows, blocks of 67 million |")
    print("|---|---|---|---|---|---|")
    for size in map(int, args.sizes.split(",")):
        for views in (crops, rotations):
            given = (*(views(args.images).to(device) for _ in range(2)), (size, size))
            found: dict[int, torch.Tensor] = {}

            def work(way: int, few_pairs: int, block: int, given=given, found=found) -> None:
                found[way] = limited(few_pairs, block, *given)

            ways = ((0, distance._BLOCK_PAIRS), (1 << 62, 1 << 22), (1 << 62, 1 << 26))
            works = [lambda way=way, limits=limits: work(way, *limits) for way, limits in enumerate(ways)]
            for piece in works:
                piece()  # warm
            took = least(works, device, args.runs)
            if any(not torch.equal(found[0].indices(), mask.indices()) for mask in found.values()):
                raise RuntimeError(f"{size}x{size}, {views.__name__}: the ways found different pairs")
            times = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in took)
            print(f"| {size}x{size} | {views.__name__} | {found[0].values().numel():,} | {times} |", flush=True)


if __name__ == "__main__":
    main()
