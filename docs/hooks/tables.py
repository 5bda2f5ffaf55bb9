"""Keeps numbers and their units on one line in tables, which are narrow, and dates whole."""

import re

UNITS = "ms|s|min|h|hours|minutes|kB|MB|GB|MiB|GiB|px|x|%|images/s|steps"
CODE = re.compile(r"(`[^`]*`)")


def kept_together(text: str) -> str:
    """The text of a cell with spaces and hyphens at which no line breaks."""
    text = re.sub(r"(?<=\d) x (?=\d)", "&nbsp;x&nbsp;", text)
    text = re.sub(rf"(?<=\d) (?=(?:{UNITS})(?![\w/]))", "&nbsp;", text)
    text = re.sub(r"(?<=[\d*]) ± (?=[\d*])", "&nbsp;±&nbsp;", text)
    return re.sub(r"\b(\d{4})-(\d\d)-(\d\d)\b", r"\1&#8209;\2&#8209;\3", text)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by MkDocs for each page."""
    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("|") and not fenced:
            parts = CODE.split(line)
            line = "".join(part if part.startswith("`") else kept_together(part) for part in parts)
        lines.append(line)
    return "\n".join(lines)
