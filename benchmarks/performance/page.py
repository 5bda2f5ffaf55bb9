"""Tables and plots of the page Performance, from the file that bench.py wrote.

python benchmarks/performance/page.py      (docs/assets/performance.json -> docs/performance.md)

The tables of a GPU come from docs/assets/performance-gpu.json, which bench.py --device cuda wrote.
"""

import argparse
import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def amount(held: float) -> str:
    return f"{held / 1e9:.2f} GB" if held >= 1e9 else f"{held / 1e6:.1f} MB"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def circumstances(result: dict[str, Any]) -> str:
    load = ", ".join(map(str, result["load before"]))
    return (
        f"{result['date']}, {result['device']}, torch {result['torch']}, Python {result['python']}, "
        f"commit {result['commit'][:7]}; load of the machine before the run (1, 5, 15 minutes): {load}."
    )


def figures(result: dict[str, Any]) -> str:
    rows = []
    for row in result["figures"]:
        memory = ["", "", ""]
        if "bytes" in row:
            memory = [amount(row["bytes"]), amount(row["plain bytes"]), f"{row['less']:.1f} x"]
        wanted = f"{row['at least faster']:.2g} x" + (f", {row['at least less']} x" if "at least less" in row else "")
        times = [duration(row["seconds"]), duration(row["plain seconds"]), f"{row['faster']:.2f} x"]
        rows.append([row["name"], *times, *memory, wanted])
    head = ["", "time", "plain", "faster", "extra memory", "plain", "less", "wanted: faster, less"]
    return table(head, rows)


def others(result: dict[str, Any]) -> str:
    large, step = result["large"], result["step"]
    plain = large["plain bytes, 16 times those of half the size"]
    rows = [
        [
            large["name"],
            f"{amount(large['bytes'])} of extra memory; plain {amount(plain)}, 16 times what it takes at half the size",
            f"under {amount(large['at most bytes'])}",
        ],
        [
            f"a PixPro step, {step['name']}: all but backbone and projection head",
            f"{step['share']:.1%} ({duration(step['rest seconds'])} beside {duration(step['encoder seconds'])})",
            f"under {step['at most']:.0%}",
        ],
    ]
    for row in result["growth"]:
        sizes = ", ".join(map(str, row["sizes"]))
        cells = ", ".join(f"{value:.0f}" for value in row["bytes a cell"])
        rows.append(
            [
                f"growth over maps of {sizes} ({row['name']}; 2 images, 64 channels)",
                f"time ~ cells^{row['exponent']:.2f} ({', '.join(duration(t) for t in row['seconds'])}); "
                f"{cells} bytes a cell, within {row['spread']:.0%}",
                "exponent 1.2, within 20%",
            ]
        )
    return table(["", "measured", "wanted"], rows)


def sizes(result: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            f"{row['size']}x{row['size']}",
            duration(row["seconds"]),
            duration(row["plain seconds"]) if "plain seconds" in row else "not run",
            amount(row["bytes"]),
            amount(row["plain bytes"]) if "plain bytes" in row else "not run",
        ]
        for row in sorted(result["over size"], key=lambda row: row["name"])
    ]
    return table(["", "map", "time", "plain", "extra memory", "plain"], rows)


def plot(result: dict[str, Any]):
    """Time and memory over map size, ours and plain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in result["over size"]))
    for axes, quantity, scale, label in zip(
        figure.subplots(1, 2), ("seconds", "bytes"), (1e3, 1e-6), ("milliseconds", "MB of extra memory"), strict=True
    ):
        for name, color in zip(names, ("#2a6f97", "#d1495b", "#edae49"), strict=True):
            rows = [row for row in result["over size"] if row["name"] == name]
            for key, style in ((quantity, "-"), (f"plain {quantity}", "--")):
                known = [(row["size"], scale * row[key]) for row in rows if key in row]
                axes.plot(*zip(*known, strict=True), style, color=color, marker="o", markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="cells along a side of the map", ylabel=label)
        ticks = sorted({row["size"] for row in result["over size"]})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    handles = axes.get_legend_handles_labels()[0][::2]
    axes.legend(handles, names, title="dashed: plain", fontsize=8)
    return figure


def filled(page: str, result: dict[str, Any], prefix: str = "") -> str:
    """The page with everything between its markers made anew; the markers' names begin with the prefix."""
    parts = {"circumstances": circumstances, "figures": figures, "others": others, "sizes": sizes}
    for part, make in parts.items():
        name = prefix + part
        before, marker, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (marker and end):
            raise ValueError(f"page: expected the markers <!-- {name} --> and <!-- end -->")
        page = before + marker + make(result) + "\n" + end + after
    return page


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data, gpu = DOCS / "assets" / "performance.json", DOCS / "assets" / "performance-gpu.json"
    parser.add_argument("--data", type=Path, default=data, help="JSON file that bench.py wrote on a CPU (%(default)s).")
    parser.add_argument("--gpu", type=Path, default=gpu, help="JSON file that bench.py wrote on a GPU (%(default)s).")
    parser.add_argument(
        "--page", type=Path, default=DOCS / "performance.md", help="Page to change in place (%(default)s)."
    )
    plotted = DOCS / "assets" / "performance.png"
    parser.add_argument("--plot", type=Path, default=plotted, help="File of the figure (%(default)s).")
    args = parser.parse_args(arguments)
    result, of_gpu = (json.loads(path.read_text(encoding="utf-8")) for path in (args.data, args.gpu))
    page = filled(filled(args.page.read_text(encoding="utf-8"), result), of_gpu, "gpu ")
    args.page.write_text(page, encoding="utf-8")
    plot(result).savefig(args.plot, metadata={"Software": None})


if __name__ == "__main__":
    main()
