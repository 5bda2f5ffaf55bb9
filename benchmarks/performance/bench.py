"""Every figure of the page Performance: ours against a plain reference, both in one run, in time and peak memory.

    python benchmarks/performance/bench.py      (make bench; writes docs/assets/performance.json)
    python benchmarks/performance/bench.py --device cuda --out runs/gpu.json
    python benchmarks/performance/bench.py --quick --out runs/quick.json     (tiny sizes: does it run)

Times are the least of several runs, taken in turns. Memory is the allocator's peak beyond the inputs, gradients counted
in. Afterwards ``python benchmarks/performance/page.py`` writes tables and plots of the page from the file.
"""

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.performance import work
from benchmarks.performance.meter import Work, least, peak

ROOT = Path(__file__).parents[2]


def compared(name: str, works: list[Work], device: str, runs: int, faster: float, less: float | None = None) -> dict:
    """One row of the table: seconds and bytes of both, and what the ratios should be."""
    for piece in works:
        piece()  # warm
    ours, plain = least(works, device, runs)
    row = {"name": name, "seconds": ours, "plain seconds": plain, "faster": plain / ours, "at least faster": faster}
    if less is not None:
        ours, plain = (peak(piece, device) for piece in works)
        row |= {"bytes": ours, "plain bytes": plain, "less": plain / ours, "at least less": less}
    print(f"{name}: {row['faster']:.1f} x faster" + (f", {row['less']:.1f} x less memory" if less else ""), flush=True)
    return row


def figures(device: str, runs: int, quick: bool) -> list[dict]:
    """The rows that have a plain counterpart."""
    pair, large = work.matching_and_loss, 14 if quick else 56
    many = f"{large}x{large}"
    rows = []
    if device == "cpu":
        for batch, channels, faster, less in ((4, 256, 10, 7), (2, 64, 10, 15)):
            name = f"matching + PixPro loss, {many}, {batch} images, {channels} channels"
            rows.append(compared(name, pair("pixpro", large, batch, channels, device), device, runs, faster, less))
        name = f"matching + PixContrast loss, {many}, 2 images, 128 channels"
        rows.append(compared(name, pair("pixcontrast", large, 2, 128, device), device, runs, 1, 8))
        name = f"PPM, {many}, 2 images, 256 channels"
        rows.append(compared(name, work.propagation(large, 2, 256, device), device, runs, 1, 5))
    else:
        batch = 2 if quick else 64
        for loss, faster in (("pixpro", 2), ("pixcontrast", 1)):
            name = f"matching + {loss}, bf16, {many}, {batch} images, 256 channels"
            rows.append(compared(name, pair(loss, large, batch, 256, device), device, runs, faster, 5))
        for algorithm in ("dense", "blockwise", "triton"):
            name = f"PPM, {algorithm}, bf16, {many}, {batch} images, 256 channels"
            works = work.propagation(large, batch, 256, device, algorithm)
            row = compared(name, works, device, runs, 1 / 1.2, 5)
            for key in ("seconds", "plain seconds"):  # products of the plain form, also where ours takes more
                row[key.replace("seconds", "tflops")] = 6 * 2 * batch * large**4 * 256 / row[key] / 1e12
            print(f"{row['tflops']:.1f} TFLOP/s; plain {row['plain tflops']:.1f}", flush=True)
            rows.append(row)
    for size in (7, 14):
        for loss in work.LOSSES:
            name = f"matching + {loss}, dense masks, {size}x{size}, 32 images, 256 channels"
            works = pair(loss, size, 2 if quick else 32, 256, device, sparse=False)
            rows.append(compared(name, works, device, 4 * runs, 1))
    model = "resnet18" if quick else "resnet50"
    name = f"EMA + LARS, {model}"
    rows.append(compared(name, work.bookkeeping(model, device), device, 2 * runs, 1 if device == "cpu" else 10))
    return rows


def share_of_the_rest(device: str, runs: int, quick: bool) -> dict:
    """Of a PixPro step, the part that is neither backbone nor projection head."""
    model, pixels, batch = ("resnet18", 64, 2) if quick else ("resnet50", 224, 8 if device == "cpu" else 256)
    shares = [work.step_shares(model, pixels, batch, device) for _ in range(1 + max(1, runs // 2))][1:]
    encoder, rest = (min(column) for column in zip(*shares, strict=True))
    row = {"name": f"{model}, {pixels} px, {batch} images", "encoder seconds": encoder, "rest seconds": rest}
    row |= {"share": rest / (rest + encoder), "at most": 0.1 if device == "cpu" else 0.05}
    print(f"all but the encoder, {row['name']}: {row['share']:.1%} of the step", flush=True)
    return row


def growth(device: str, runs: int, quick: bool) -> list[dict]:
    """Matching and PixPro loss over map size: exponent of time in the number of cells, spread of bytes per cell."""
    sizes, rows = (8, 16, 32) if quick else (56, 112, 224), []
    for views in (work.crops, work.rotations):
        works = [work.matching_and_loss("pixpro", size, 2, 64, device, views=views)[0] for size in sizes]
        for piece in works:
            piece()
        took, held = least(works, device, runs), [peak(piece, device) for piece in works]
        x, y = [math.log(size**2) for size in sizes], [math.log(t) for t in took]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
        per_cell = [most / (2 * size**2) for most, size in zip(held, sizes, strict=True)]
        row = {"name": views.__name__, "sizes": sizes, "seconds": took, "bytes": held, "exponent": slope}
        row |= {"bytes a cell": per_cell, "spread": max(per_cell) / min(per_cell) - 1}
        print(f"{row['name']}: time ~ cells^{slope:.2f}, bytes a cell within {row['spread']:.0%}", flush=True)
        rows.append(row)
    return rows


def over_size(device: str, quick: bool) -> list[dict]:
    """Time and memory of each part at each map size; the plain form where its tables are not too large."""
    rows = []
    for size in (4, 8) if quick else (7, 14, 28, 56, 112):
        sparse = size > 14  # as the page advises
        parts = {
            "matching + PixPro": work.matching_and_loss("pixpro", size, 2, 128, device, sparse=sparse),
            "matching + PixContrast": work.matching_and_loss("pixcontrast", size, 2, 128, device, sparse=sparse),
            "PPM": work.propagation(size, 2, 128, device),
        }
        for name, works in parts.items():
            kept = works[:1] if size > 56 else works
            runs = 20 if size < 28 else 3 if size < 112 else 1
            for piece in kept if size < 112 else ():
                piece()
            took, held = least(kept, device, runs), [peak(piece, device) for piece in kept]
            row = {"name": name, "size": size, "seconds": took[0], "bytes": held[0]}
            rows.append(row | ({"plain seconds": took[1], "plain bytes": held[1]} if len(kept) == 2 else {}))
        print(f"{size}x{size}: " + ", ".join(f"{row['name']} {1e3 * row['seconds']:.1f} ms" for row in rows[-3:]))
    return rows


def large_map(device: str, quick: bool) -> dict:
    """Peak memory of matching and PixPro loss at 112x112; the plain form's by arithmetic from 56x56."""
    size = 16 if quick else 112
    ours, _ = work.matching_and_loss("pixpro", size, 2, 256, device)
    _, half = work.matching_and_loss("pixpro", size // 2, 2, 256, device)
    row = {"name": f"matching + PixPro loss, {size}x{size}, 2 images, 256 channels", "bytes": peak(ours, device)}
    row |= {"plain bytes, 16 times those of half the size": 16 * peak(half, device), "at most bytes": 1e9}
    print(f"{row['name']}: {row['bytes'] / 1e6:.0f} MB", flush=True)
    return row


def circumstances(device: str) -> dict[str, Any]:
    """Hardware, versions, commit, date, and what else the machine was doing."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{model}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "load before": [round(value, 1) for value in os.getloadavg()],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Where to run (%(default)s).")
    parser.add_argument("--threads", type=int, default=2, help="Threads of the CPU (%(default)s).")
    parser.add_argument(
        "--runs", type=int, default=5, help="Number of timed runs, the fastest of which counts (%(default)s)."
    )
    parser.add_argument("--quick", action="store_true", help="Use tiny sizes, to see that the program runs.")
    out = ROOT / "docs" / "assets" / "performance.json"
    parser.add_argument("--out", type=Path, default=out, help="JSON file for the figures (%(default)s).")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    result = circumstances(args.device)
    print(f"{result['device']}, torch {result['torch']}, load {result['load before']}", flush=True)
    result["figures"] = figures(args.device, args.runs, args.quick)
    result["large"] = large_map(args.device, args.quick)
    result["step"] = share_of_the_rest(args.device, args.runs, args.quick)
    result["growth"] = growth(args.device, args.runs, args.quick)
    result["over size"] = over_size(args.device, args.quick)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
