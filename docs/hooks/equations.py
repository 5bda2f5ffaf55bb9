"""Turns equations into MathML while the site is built, so that a browser needs no script and no network."""

import html
import re

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    """Called by mkdocs with the HTML of a page."""
    return _EQUATION.sub(_rendered, content)


def _rendered(match: re.Match[str]) -> str:
    tag, text = match.groups()
    latex = html.unescape(text).strip()[2:-2]  # without \( \) or \[ \]
    display = "inline" if tag == "span" else "block"
    return f'<{tag} class="equation">{convert(latex, display=display)}</{tag}>'
