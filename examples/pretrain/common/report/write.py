"""The report as a page of one file, and as Markdown with pictures beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.pretrain.common.collapsed import STD
from examples.pretrain.common.pages import (
    chart,
    commands,
    details,
    facts,
    grid,
    heading,
    page,
    paragraph,
    table,
)
from examples.pretrain.common.report.content import Curves
from examples.pretrain.common.report.gallery import Row, gallery_html, gallery_strip
from examples.pretrain.common.scores import SCORES

NO_CURVES = (
    "There is no curve of the loss: the run ended before its first logged step. A step is logged every "
    "trainer.log_every_n_steps steps, and more often in a run of fewer than twice as many."
)


class Story(NamedTuple):
    """All that a report says.

    Attributes:
        title: Title of the page.
        summary: What came of it, a sentence or two.
        warnings: What is off, in words.
        facts: Steps, time, images/s.
        read: What was read and left out.
        curves: Columns of the run's tables.
        readings: Readings of the probe.
        noise: What counts as noise in the scores, and why.
        best: The step that best.safetensors is of, or None.
        gallery: Pictures of the same photos before and after.
        note: Which photos those are.
        commands: What comes next.
        about_commands: What to know of these commands, or why one is missing; may be empty.
        settings: All options as YAML.
    """

    title: str
    summary: str
    warnings: list[str]
    facts: dict[str, str]
    read: dict[str, str]
    curves: Curves
    readings: list[dict[str, float]]
    noise: str
    best: float | None
    gallery: list[Row]
    note: str
    commands: dict[str, str]
    about_commands: str
    settings: str


def probe_table(readings: Sequence[Mapping[str, float]], best: float | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each score before, at its best reading, and after; of a single reading before alone."""
    kept = next((row for row in readings if row["step"] == best), readings[-1])
    columns = {"before (step {:.0f})": readings[0], "kept as best ({:.0f})": kept, "after ({:.0f})": readings[-1]}
    if len(readings) == 1:
        columns = {"before (step {:.0f})": readings[0]}
    rows = [
        [name, *(f"{row.get(name, float('nan')):.3f}" for row in columns.values())]
        for name in SCORES
        if name in readings[-1]
    ]
    return ["score", *(title.format(row["step"]) for title, row in columns.items())], rows


def meanings(names: Iterable[str]) -> str:
    """What the scores mean, in a line."""
    return "; ".join(f"{name}: {SCORES[name]}" for name in SCORES if name in names) + ". Higher is better."


def write_html(path: Path, story: Story) -> None:
    """Writes the page."""
    probed = probe_curves(story.readings)
    drawn = [
        chart("loss", "no unit", {"loss": story.curves.get("loss", [])}),
        chart("probe", "score, in 0..1", probed, tenths(probed)),
        chart("spread of the projections; near 1 is healthy", "std x sqrt(C)", {"std": story.curves.get(STD, [])}),
        chart("learning rate", "no unit", rates(story.curves)),
        chart("speed", "images/s", {"images/s": story.curves.get("speed/images_per_s", [])}),
    ]
    probe = table(*probe_table(story.readings, story.best)) if story.readings else paragraph("No probe was read.")
    text = page(
        story.title,
        paragraph(story.summary),
        *(paragraph(warning, "warn") for warning in story.warnings),
        facts(story.facts),
        heading("Probe, before and after"),
        probe,
        paragraph(f"{meanings(story.readings[-1])} {story.noise}", "soft") if story.readings else "",
        heading("The same photos, before and after"),
        paragraph(story.note, "soft"),
        gallery_html(story.gallery),
        heading("Curves"),
        grid(*drawn) if story.curves.get("loss") else paragraph(NO_CURVES) + grid(*drawn),
        heading("What was read and left out"),
        facts(story.read),
        heading("What comes next"),
        *(paragraph(f"{name}:") + commands([line]) for name, line in story.commands.items()),
        paragraph(story.about_commands) if story.about_commands else "",
        heading("Settings"),
        details("all options, as config.yaml has them", commands([story.settings])),
    )
    path.write_text(text, encoding="utf-8")


def write_markdown(path: Path, story: Story) -> None:
    """Writes the report for readers of text; its pictures go to the folder ``report``."""
    lines = [f"# {story.title}", "", story.summary, ""]
    lines += [f"**{warning}**\n" for warning in story.warnings]
    lines += [*(f"- {name}: {value}" for name, value in story.facts.items()), "", "## Probe, before and after", ""]
    if story.readings:
        header, rows = probe_table(story.readings, story.best)
        lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", meanings(story.readings[-1]), "", story.noise]
    else:
        lines.append("No probe was read.")
    lines += ["", "## The same photos, before and after", "", story.note, ""]
    folder = path.parent / "report"
    for index, row in enumerate(story.gallery):
        folder.mkdir(exist_ok=True)
        gallery_strip(row).save(folder / f"photo-{index + 1}.png")
        captions = ", ".join(caption for caption, _ in row)
        lines += [f"![{captions}](report/photo-{index + 1}.png)", ""]
    lines += ["## Curves", "", *([] if story.curves.get("loss") else [NO_CURVES, ""])]
    lines += ["| | first | middle | last |", "|---|---|---|---|"]
    for name in ("loss", STD, "speed/images_per_s", *rates(story.curves)):
        points = story.curves.get(name, [])
        if points:
            some = (points[0], points[len(points) // 2], points[-1])
            lines.append(f"| {name} | {' | '.join(f'{y:.4g} (step {x:.0f})' for x, y in some)} |")
    lines += ["", "## What was read and left out", ""]
    lines += [f"- {name}: {value}" for name, value in story.read.items()]
    lines += ["", "## What comes next", ""]
    for name, line in story.commands.items():
        lines += [f"{name}:", "", *(f"    {part}" for part in line.splitlines()), ""]
    lines += [story.about_commands, ""] if story.about_commands else []
    lines += ["## Settings", "", "```yaml", story.settings.rstrip(), "```", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def probe_curves(readings: Sequence[Mapping[str, float]]) -> Curves:
    """The probe's scores over the steps."""
    return {
        name: [(row["step"], row[name]) for row in readings if name in row]
        for name in SCORES
        if any(name in row for row in readings)
    }


def tenths(curves: Curves) -> tuple[float, float]:
    """Limits for scores in 0..1: the tenths around them, at least two, so that the figures of several runs compare."""
    values = [y for points in curves.values() for _, y in points if math.isfinite(y)] or [0.0, 1.0]
    low, high = math.floor(min(values) * 10 + 1e-9), math.ceil(max(values) * 10 - 1e-9)
    if high - low < 2:
        low, high = max(0, high - 2), max(2, high)
    return low / 10, high / 10


def rates(curves: Curves) -> Curves:
    """The learning rates; groups of one rate are drawn once."""
    found: Curves = {}
    for name, points in curves.items():
        if name.startswith("lr") and points not in found.values():
            found[name] = points
    return found
