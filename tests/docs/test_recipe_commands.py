"""Commands of recipes that the pages show have options that the recipe has; files of the reader's are left out."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from examples.pretrain.common.cli import fit_parser
from examples.pretrain.common.parsing import parse

ROOT = Path(__file__).parents[2]
OF_THE_READER = ("...", "[...]", "OPTIONS")  # options that the page leaves to the reader


def commands() -> list[tuple[str, str, str]]:
    """Page, recipe and options of each command that a page shows."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for recipe, options in re.findall(r"examples/pretrain/([a-z]\w*)\.py (?:fit|preview)\b([^\n`]*)", text):
            found.append((page.name, recipe, options.partition("  #")[0].strip()))
    return found


def given(options: str) -> list[str]:
    """The words of the options, without files of the reader's own."""
    words = [word for word in shlex.split(options) if word not in OF_THE_READER]
    for place in reversed([place for place, word in enumerate(words[:-1]) if word == "--config"]):
        if not words[place + 1].startswith("examples/"):
            del words[place : place + 2]
    return words if "--data.folder" in words else [*words, "--data.folder", "FOLDER"]


@pytest.mark.parametrize(("page", "recipe", "options"), [entry for entry in commands() if "--help" not in entry[2]])
def test_the_recipe_has_these_options(page, recipe, options, monkeypatch):
    monkeypatch.chdir(ROOT)
    made = importlib.import_module(f"examples.pretrain.{recipe}").recipe()
    parse(fit_parser(made), given(options))


def test_there_are_such_commands():
    assert {"imagenet.md", "own_images.md", "first_evening.md"} <= {page for page, _, _ in commands()}
