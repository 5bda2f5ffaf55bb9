"""The notebooks hold what the pages hold, whose code test_docs.py runs; and that is what a notebook would run."""

import importlib.util
import json
from pathlib import Path

import pytest
from test_docs import blocks

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("make_notebooks", ROOT / "docs" / "hooks" / "make_notebooks.py")
make_notebooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_notebooks)


@pytest.mark.parametrize("page", make_notebooks.PAGES)
def test_a_notebook_is_its_page(page):
    written = (ROOT / "docs" / "notebooks" / f"{page}.ipynb").read_text(encoding="utf-8")
    assert written == make_notebooks.notebook(page), "run python docs/hooks/make_notebooks.py"
    cells = json.loads(written)["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [text.strip() for text in code[1:]] == [text.strip() for _, text in blocks(ROOT / "docs" / f"{page}.md")]
    assert "".join(cells[0]["source"]).startswith("# ")  # the title, and then the cell that installs
    assert cells[1]["source"][-1].startswith("%pip install")
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert not any(cell.get("outputs") for cell in cells)


def test_links_of_a_notebook_lead_to_files():
    for page in make_notebooks.PAGES:
        for cell in json.loads(make_notebooks.notebook(page))["cells"]:
            for match in make_notebooks.LINK.finditer("".join(cell["source"])):
                target = match[2].rstrip(")").split("#")[0]
                assert (ROOT / "docs" / "notebooks" / target).exists(), (page, target)
