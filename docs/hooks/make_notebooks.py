"""Makes docs/notebooks/*.ipynb of pages: their prose and their code, which the tests of the pages run.

python docs/hooks/make_notebooks.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("compose", "correspondence", "evaluate", "own_images", "own_method")
INSTALL = """\
# Run this once, in a clone of densessl; it installs what the page needs. Where there is no clone yet, such as in a
# notebook in the browser, clone the repository first:  !git clone ADDRESS densessl && mkdir -p densessl/docs/notebooks
%cd ../..
%pip install -q ".[tests]"
"""
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INCLUDE = re.compile(r'^--8<-- "([^":]+):?(\w*)"$', re.MULTILINE)
FOR_CODE_HOSTS = re.compile(r"^Reading this on a code host,.*\n\n", re.MULTILINE)  # the notebook shows the code itself
LINK = re.compile(r"(\]\()(?!https?:|#|/)([^)\s]+\))")


def included(match: re.Match[str]) -> str:
    """What stands in a file, or in one of its sections, in place of the line that includes it."""
    text, section = (ROOT / match[1]).read_text(encoding="utf-8"), match[2]
    if section:
        text = text.split(f"# --8<-- [start:{section}]\n")[1].split(f"# --8<-- [end:{section}]")[0]
    return text.rstrip("\n")


def cell(kind: str, number: int, text: str) -> dict:
    """One cell of a notebook, without output."""
    rest = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(True)} | rest


def notebook(page: str) -> str:
    """A page of docs/ as a notebook: code blocks become cells, all else is text."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    text = FOR_CODE_HOSTS.sub("", text)
    text = INCLUDE.sub(included, re.sub(r"^<!--.*?-->\n", "", text, flags=re.MULTILINE | re.DOTALL))
    cells = [("code", INSTALL)]
    for number, part in enumerate(CODE.split(text)):  # prose and code in turns
        if part.strip():
            cells.append(("code", part) if number % 2 else ("markdown", LINK.sub(r"\1../\2", part)))
    cells.insert(0, cells.pop(1))  # the title first, then how to install
    whole = {
        "cells": [cell(kind, number, part.strip("\n")) for number, (kind, part) in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Writes all of them."""
    for page in PAGES:
        (ROOT / "docs" / "notebooks" / f"{page}.ipynb").write_text(notebook(page), encoding="utf-8")


if __name__ == "__main__":
    main()
