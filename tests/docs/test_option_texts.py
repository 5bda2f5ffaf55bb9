"""The options that a program names itself have a text, which is a sentence; docstrings give those of the recipes."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    path
    for folder in ("densessl", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "add_argument" in path.read_text(encoding="utf-8")
]


def texts_of(source: str) -> list[tuple[str, str]]:
    """Name and help text of each option that a program adds itself; the text is empty where there is none."""
    found = []
    adders = ("add_argument", "add") if "add = parser.add_argument" in source else ("add_argument",)
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or ast.unparse(call.func).rpartition(".")[2] not in adders:
            continue
        if not call.args or not isinstance(call.args[0], ast.Constant) or not isinstance(call.args[0].value, str):
            continue  # a name that is computed
        text = next((word.value for word in call.keywords if word.arg == "help"), ast.Constant(""))
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        found.append((call.args[0].value, "".join(p.value if isinstance(p, ast.Constant) else "X" for p in parts)))
    return found


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_are_explained_in_sentences(path):
    for name, text in texts_of(path.read_text(encoding="utf-8")):
        assert text[:1].isupper(), f"{name}: {text!r}"
        assert text.endswith("."), f"{name}: {text!r}"
