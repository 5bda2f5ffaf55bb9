"""Every option of every program has a text, which is a sentence."""

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


def texts_of(source: str) -> dict[str, str]:
    """The help text of each option that a program adds itself, by the option's name; empty where there is none."""
    found = {}
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or ast.unparse(call.func).rpartition(".")[2] not in ("add_argument", "add"):
            continue
        if not call.args or not isinstance(call.args[0], ast.Constant) or not isinstance(call.args[0].value, str):
            continue  # a name that is computed, or a set's add
        text = next((word.value for word in call.keywords if word.arg == "help"), ast.Constant(""))
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        found[call.args[0].value] = "".join(p.value if isinstance(p, ast.Constant) else "X" for p in parts)
    return found


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_are_explained_in_sentences(path):
    for name, text in texts_of(path.read_text(encoding="utf-8")).items():
        assert text[:1].isupper(), f"{name}: {text!r}"
        assert text.endswith("."), f"{name}: {text!r}"
