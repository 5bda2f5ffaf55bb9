"""Keeps numbers and their units on one line in tables, which are narrow, and dates whole."""

import re

UNITS = "ms|s|min|h|hours|minutes|kB|MB|GB|MiB|GiB|px|x|%|images/s|steps"
FENCE = re.compile(r"\s*(`{3,}|~{3,})")
# What is no prose of a cell: code in any number of backticks, a link's target, an address, a formula.
UNTOUCHED = re.compile(
    r"((?<!`)(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)|\]\([^)]*\)|<https?:[^>]*>|\$\S(?:[^$]*\S)?\$)"
)


def kept_together(text: str) -> str:
    """The text of a cell with spaces and hyphens at which no line breaks."""
    text = re.sub(r"(?<=\d) x (?=\d)", "&nbsp;x&nbsp;", text)
    text = re.sub(rf"(?<=\d) (?=(?:{UNITS})(?![\w/]))", "&nbsp;", text)
    text = re.sub(r"(?<=[\d*]) ± (?=[\d*])", "&nbsp;±&nbsp;", text)
    return re.sub(r"\b(\d{4})-(\d\d)-(\d\d)\b", r"\1&#8209;\2&#8209;\3", text)


def cells_kept_together(row: str) -> str:
    """A row of a table, in which prose alone has changed."""
    done, parts = 0, []
    for found in UNTOUCHED.finditer(row):
        parts += [kept_together(row[done : found.start()]), found.group()]
        done = found.end()
    return "".join([*parts, kept_together(row[done:])])


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by MkDocs for each page."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        marks = FENCE.match(line)
        if marks and not fence:
            fence = marks.group(1)
        elif marks and marks.group(1).startswith(fence) and not line[marks.end() :].strip():
            fence = ""  # a block ends with at least as many marks of the kind that it began with
        elif line.startswith("|") and not fence:
            line = cells_kept_together(line)
        lines.append(line)
    return "\n".join(lines)
