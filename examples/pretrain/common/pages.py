"""Pages of one file: HTML with pictures and curves inside, readable in light and dark, on a screen and on a phone."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from examples.pretrain.common.pictures import data_uri

STYLE = """
:root { color-scheme: light dark; --fg: #1c1e21; --bg: #ffffff; --soft: #5c6470; --line: #d9dde3; --box: #f4f6f8;
  --warn: #8a4b00; --warnbox: #fff3df; --c0: #0072b2; --c1: #c24e00; --c2: #00805a; --c3: #b0508a; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e8eb; --bg: #16181c; --soft: #9aa3af; --line: #343a43;
  --box: #1f2329; --warn: #ffc57a; --warnbox: #3a2a12; --c0: #56b4e9; --c1: #e69f00; --c2: #2fc79a; --c3: #e79ac8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.3rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 0.6rem; }
p { max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 0.4rem 0; overflow-wrap: normal; }
th, td { padding: 0.25rem 0.7rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.number { font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 0 2rem; }
.facts div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  padding: 0.25rem 0; } .facts span:first-child { color: var(--soft); flex: 0 0 auto;
  max-width: 58%; overflow-wrap: normal; } .facts span:last-child { text-align: right; }
.warn { background: var(--warnbox); color: var(--warn); border-radius: 6px; padding: 0.6rem 0.9rem; margin: 0.5rem 0;
  max-width: 60rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 28rem)); gap: 1rem;
  margin-bottom: 1rem; }
figure { margin: 0; } figure img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 0.7rem;
  margin-bottom: 1.4rem; max-width: 64rem; }
.tiles img { width: 100%; }
@media (max-width: 30rem) { table { font-size: 0.85rem; } th, td { padding-right: 0.4rem; }
  .tiles figure:first-child { grid-column: 1 / -1; } .tiles figure:first-child img { width: 50%; } }
svg { width: 100%; max-width: 34rem; height: auto; display: block; }
svg text { fill: var(--soft); font: 12.5px system-ui, sans-serif; }
pre { background: var(--box); padding: 0.7rem 0.9rem; border-radius: 6px; overflow-x: auto; font-size: 0.85rem;
  white-space: pre-wrap; }
"""


def page(title: str, *parts: str) -> str:
    """A whole page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>" + "\n".join(parts) + "</body></html>\n"
    )


def heading(text: str) -> str:
    """A heading of a section."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; of the kind ``warn`` in a box, ``soft`` in grey."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def facts(values: Mapping[str, str]) -> str:
    """Names and values in columns."""
    rows = (f"<div><span>{html.escape(k)}</span><span>{html.escape(v)}</span></div>" for k, v in values.items())
    return f'<div class="facts">{"".join(rows)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; it scrolls by itself where the page is narrow."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f'<td class="number">{html.escape(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def grid(*parts: str) -> str:
    """Parts beside each other as far as the page is wide enough."""
    return f'<div class="grid">{"".join(parts)}</div>'


def tiles(*parts: str) -> str:
    """Small parts beside each other, as many as fit."""
    return f'<div class="tiles">{"".join(parts)}</div>'


def details(title: str, inside: str) -> str:
    """What is folded away until it is asked for."""
    return f"<details><summary>{html.escape(title)}</summary>{inside}</details>"


def figure(picture: Image.Image, caption: str) -> str:
    """A picture with a line below."""
    caption = html.escape(caption)
    return f'<figure><img src="{data_uri(picture)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def commands(lines: Sequence[str]) -> str:
    """Lines to be copied into a terminal."""
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


DASHES = ("", "6 3", "2 3", "8 3 2 3")  # with them curves are told apart without their colours


def chart(
    title: str,
    unit: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    limits: tuple[float, float] | None = None,
) -> str:
    """Curves over the steps, as SVG in the page's colours; points that are not finite are left out.

    Args:
        title: The line below.
        unit: What the vertical axis counts.
        series: For each curve its points, (step, value).
        limits: Both ends of the vertical axis; None: those of the curves.
    """
    known = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    points = [point for of in known.values() for point in of]
    if not points:
        return ""
    left, right, top, bottom = 58, 352, 24, 172
    height = 212 if len(known) > 1 else 194
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = limits or (min(y for _, y in points), max(y for _, y in points))
    wide, high = (x1 - x0) or 1.0, (y1 - y0) or max(abs(y1), 1e-9)

    def at(x: float, y: float) -> str:
        return f"{left + (x - x0) / wide * (right - left):.1f},{bottom - (y - y0) / high * (bottom - top):.1f}"

    parts, legend = [], 4
    for index, (name, of) in enumerate(known.items()):
        stroke = f'stroke="var(--c{index % 4})" stroke-width="1.6"'
        if DASHES[index % 4]:
            stroke += f' stroke-dasharray="{DASHES[index % 4]}"'
        line = " ".join(at(x, y) for x, y in thinned(of))
        parts.append(f'<polyline points="{line}" fill="none" {stroke}/>')
        if len(of) <= 60:  # readings far apart are seen as such
            spots = (at(x, y).split(",") for x, y in of)
            parts += [f'<circle cx="{x}" cy="{y}" r="2.2" fill="var(--c{index % 4})"/>' for x, y in spots]
        if len(known) > 1:
            parts.append(f'<path d="M{legend},200 h16" {stroke}/>')
            parts.append(f'<text x="{legend + 19}" y="204">{html.escape(name)}</text>')
            legend += 40 + 6 * len(name)
    axes = f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="var(--line)"/>'
    form = ".2g" if f"{y0:.2g}" != f"{y1:.2g}" else ".3g"  # two ends that differ in the third digit
    ticks = [(bottom, y0), (top + 8, y1)]
    if limits:
        ticks.append(((bottom + top) // 2 + 4, (y0 + y1) / 2))
    labels = "".join(f'<text x="{left - 4}" y="{y}" text-anchor="end">{value:{form}}</text>' for y, value in ticks)
    labels += f'<text x="{left}" y="14">{html.escape(unit)}</text>'
    labels += f'<text x="{(left + right) // 2}" y="187" text-anchor="middle">step</text>'
    labels += f'<text x="{left}" y="187">{x0:.0f}</text>'
    labels += f'<text x="{right}" y="187" text-anchor="end">{x1:.0f}</text>'
    return (
        f'<figure><svg viewBox="0 0 360 {height}" role="img" aria-label="{html.escape(title)}">{axes}{labels}'
        f"{''.join(parts)}</svg><figcaption>{html.escape(title)}</figcaption></figure>"
    )


def thinned(points: Sequence[tuple[float, float]], most: int = 300) -> Sequence[tuple[float, float]]:
    """At most so many points: means over neighbours, so that a long noisy curve stays readable."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
