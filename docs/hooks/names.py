"""Makes the names of parts in the text of API pages links to the parts."""

import re
from pathlib import Path

PARTS = re.compile(r"^::: (\S+)$(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
# Blocks of code, headings and links stay as they are; a name stands alone between code tags.
TEXT = re.compile(r"<pre.*?</pre>|<h[1-6].*?</h[1-6]>|<a\b.*?</a>|<code>(?:densessl\.)?(\w+)</code>", re.DOTALL)


def documented(folder: Path) -> dict[str, str]:
    """The full name of each part that the API pages of a folder list, by its short name."""
    found = {}
    for page in sorted(folder.glob("*.md")):
        for module, options in PARTS.findall(page.read_text(encoding="utf-8")):
            found |= {name: f"{module}.{name}" for name in re.findall(r"^ +- (\w+)$", options, re.MULTILINE)}
    return found


def linked(html: str, names: dict[str, str]) -> str:
    """The page, in which mkdocs-autorefs will make links of the names; a name without an entry stays as it is."""

    def link(found: re.Match[str]) -> str:
        name = names.get(found[1])
        return f'<autoref identifier="{name}" optional>{found[0]}</autoref>' if name else found[0]

    return TEXT.sub(link, html)


def on_page_content(html: str, page, config, **_: object) -> str:
    """Called by MkDocs for each page."""
    if not page.file.src_uri.startswith("api/"):
        return html
    return linked(html, documented(Path(config.docs_dir) / "api"))
