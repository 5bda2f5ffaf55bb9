"""examples/quickstart.ipynb runs from its first cell to its last, with tiny settings, and holds no outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
TINY = "STEPS, IMAGES, HELD_OUT, BATCH, SIZE = 4, 8, 2, 4, 64"


def test_the_notebook_runs(capsys):
    pytest.importorskip("matplotlib")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    install, settings, *rest = ("".join(cell["source"]) for cell in cells)
    assert "%pip install" in install
    names: dict = {"__name__": "__main__"}
    exec(settings, names)
    assert set(TINY.partition(" =")[0].split(", ")) < names.keys()
    for code in (TINY, *rest):
        exec(compile(code, NOTEBOOK.name, "exec"), names)
    assert len(names["losses"]) == 4
    assert 0 <= names["after"] <= 1
    assert f"{names['before']:.3f} before training, {names['after']:.3f} after" in capsys.readouterr().out
