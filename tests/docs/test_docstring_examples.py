"""The examples in the package's docstrings run, and no part that an API page shows is without one."""

import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

import densessl

PAGES = sorted((Path(__file__).parents[2] / "docs" / "api").glob("*.md"))
EXTRAS = {"densessl.losses.neighbor_order": "diffsort", "densessl.plots": "matplotlib"}


def examples() -> Iterator[doctest.DocTest]:
    """Every docstring with an example, for a reader who has imported torch and what densessl exports."""
    names = {"torch": torch, "nn": nn, "v2": v2, "densessl": densessl}
    names |= {name: getattr(densessl, name) for name in densessl.__all__}
    for info in pkgutil.walk_packages(densessl.__path__, "densessl."):
        if ".evaluation" not in info.name and not info.name.endswith("._triton"):
            module = importlib.import_module(info.name)
            yield from (test for test in doctest.DocTestFinder().find(module, extraglobs=names) if test.examples)


EXAMPLES = list(examples())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the file that the examples read."""
    path = tmp_path_factory.mktemp("examples")
    torch.save(torchvision.models.resnet18().state_dict(), path / "checkpoint.pth")
    return path


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
def test_example_runs(test, folder, monkeypatch):
    for module, package in EXTRAS.items():
        if test.name.startswith(module):
            pytest.importorskip(package)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    failures = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=failures.append)
    assert not failures, "".join(failures)


def test_every_part_on_an_api_page_has_an_example():
    pages = [page.read_text(encoding="utf-8") for page in PAGES if not page.stem.startswith("evaluation")]
    shown = {name for text in pages for name in re.findall(r"^ {8}- (\w+)$", text, re.MULTILINE)} - {"main"}
    assert set(densessl.__all__) <= shown
    assert shown <= {test.name.rsplit(".", 1)[-1] for test in EXAMPLES}
