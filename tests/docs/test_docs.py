"""Documentation that cannot go stale: its code runs, its API pages are whole, and it names no machine."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
import torch

import densessl
from benchmarks.concept_figure import concept_figure

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = sorted({*PAGES, *ROOT.glob("*.md"), ROOT / "CITATION.cff", ROOT / "mkdocs.yml", ROOT / "Makefile"})
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MEMBER = re.compile(r"^ {8}- (\w+)$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Every python block of a page with its line number; ``--8<-- "path"`` stands for that file, or a section of it."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        include = re.fullmatch(r'--8<-- "([^:]+):?(\w*)"\n', match[1])
        code = included(ROOT / include[1], include[2]) if include else match[1]
        found.append((text.count("\n", 0, match.start()) + 1, code))
    return found


def included(path: Path, section: str) -> str:
    """What pymdownx.snippets puts in its place."""
    text = path.read_text(encoding="utf-8")
    return text.split(f"# --8<-- [start:{section}]\n")[1].split(f"# --8<-- [end:{section}]")[0] if section else text


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_on_the_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}  # as in a notebook
    for line, code in blocks(page):
        # Leading newlines make the line numbers of a traceback those of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_pages_with_code_are_found():
    assert {"README.md", "concepts.md", "compose.md"} <= {page.name for page in PAGES if blocks(page)}


def api_members() -> dict[str, list[str]]:
    """Names that the API pages show, by module."""
    members = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        module = re.search(r"^::: ([\w.]+)$", text, re.MULTILINE)
        if module:
            members[module[1]] = MEMBER.findall(text)
    return members


def test_every_public_name_is_on_an_api_page():
    shown = {name for names in api_members().values() for name in names}
    assert set(densessl.__all__) <= shown


@pytest.mark.parametrize(("module", "names"), sorted(api_members().items()))
def test_api_pages_show_what_exists_and_is_documented(module, names):
    assert names
    for name in names:
        assert getattr(importlib.import_module(module), name).__doc__, name


def test_navigation_lists_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_names_a_registry_or_a_machine(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"pypi[.]|python[h]osted|anaconda[.]org|registry[.]", text)
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp|mnt|Users)/", text)


def test_readme_states_the_lowest_versions_that_the_package_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \| [\d.]+ \|$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE))
    declared = dict(dependency.split(">=") for dependency in project["dependencies"])
    assert rows == declared | {"Python": project["requires-python"].removeprefix(">=")}


def test_concept_figure_is_drawn_by_the_same_parts_and_always_the_same():
    pytest.importorskip("matplotlib")
    once, twice = concept_figure(), concept_figure()
    assert once.startswith(b"\x89PNG")
    assert once == twice
