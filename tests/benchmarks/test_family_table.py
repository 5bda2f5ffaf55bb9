"""The comparison of all recipes on generated scenes: rows are made once, and become a table."""

import sys
from pathlib import Path

import pytest

for _extra in ("matplotlib", "safetensors", "tqdm", "lightly", "kornia", "torchmetrics", "pytorch_lightning"):
    pytest.importorskip(_extra)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import family  # noqa: E402

TINY = ["--steps=2", "--batch-size=4", "--size=40", "--images=8", "--probe-images=4"]
ALL = list(family.ROWS)


@pytest.mark.filterwarnings("ignore")
def test_every_method_makes_its_row_once(tmp_path, capsys, monkeypatch):
    command = [*TINY, "--seeds=1", "--out", str(tmp_path)]
    text = family.main(command)
    rows = family.read_rows(tmp_path / "rows.csv")
    assert [row["method"] for row in rows] == ALL
    trained = [row for row in rows if row["method"] in family.METHODS]
    assert {row["steps"] for row in trained} == {"2"}
    assert {row["steps"] for row in rows if row not in trained} == {"0"}
    assert all(0 <= float(row["miou"]) <= 1 for row in rows)
    assert all(float(row["last_std"]) > 0 for row in trained)
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:]] == ALL
    for method in family.METHODS:
        assert (tmp_path / f"{method}-0" / "encoder.safetensors").exists()

    monkeypatch.setattr(family, "train", lambda *args: pytest.fail("made a row that was there"))
    assert family.main(command) == text
    assert family.main([*command, "--report"]) == text
    assert text in capsys.readouterr().out


def test_means_and_spread_over_seeds():
    row = dict.fromkeys(family.FIELDS, "1.0")
    rows = [row | {"method": "densecl", "seed": str(seed), "miou": miou} for seed, miou in enumerate(("0.2", "0.3"))]
    assert family.table(rows).splitlines()[2] == "| densecl | 2 | 0.250 ± 0.071 | 1.00, 1.00 | 1.00, 1.00 | 1 | 1 |"


@pytest.mark.parametrize(("option", "message"), [("--only=simclr", "got simclr"), ("--seeds=0", "--seeds: expected")])
def test_bad_options_are_named(option, message, capsys):
    with pytest.raises(SystemExit):
        family.main([option])
    assert message in capsys.readouterr().err
