"""The weights of the study: one file for each arm that is done, of seed 0, and their table."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.studies import weights
from benchmarks.studies.compare import COLUMNS, encoder_file
from benchmarks.studies.rows import add_row
from densessl import hub

CARD = "# Card\n\nBefore.\n\n<!-- table -->\nold\n<!-- end of table -->\n\nAfter.\n"
SETS = {"camvid": 0.25, "nuclei": 0.75}


@pytest.fixture
def runs(tmp_path) -> Path:
    """Runs of three arms and several seeds, of which InfoNCE's seed 0 is not scored on all sets yet."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for arm, lr, seeds, steps in (
        ("rate-0", 0.0, (0,), (0,)),
        ("pixpro+infonce", 4.0, (0, 1, 100), (500, 2500)),
        ("infonce", 0.5, (0, 1), (2500,)),
    ):
        for seed in seeds:
            for step in steps:
                torch.manual_seed(10 * seed + step)
                args = type("Options", (), {"out": folder})
                save_file(hub.r10().state_dict(), encoder_file(args, arm, lr, seed, step))
                for of_set, base in SETS.items():
                    if (arm, seed, of_set) == ("infonce", 0, "nuclei"):
                        continue
                    row = dict.fromkeys(COLUMNS, "") | {"arm": arm, "lr": lr, "seed": seed, "step": step}
                    row |= {"split": "val" if seed == 100 else "test", "set": of_set}
                    # Seed 1 is the better one on test, and not to be taken for that.
                    row |= {"linear": base + 0.001 * seed, "device": "cpu x86_64", "torch": "2.9", "commit": "abc1234"}
                    add_row(folder / "rows.csv", COLUMNS, row)
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def test_files_are_those_of_seed_0_at_the_last_step(runs, out, capsys):
    weights.main(["--runs", str(runs), "--out", str(out)])
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == ["pixpro_infonce_r10_study.safetensors", "untrained_r10_study.safetensors"]
    written = load_file(out / names[0])
    expected = load_file(runs / "pixpro+infonce-lr4-seed0-2500.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in written)
    with safe_open(out / names[0], "pt") as file:
        facts = file.metadata()
    assert facts["format"] == "pt"
    assert (facts["arm"], facts["seed"], facts["steps"], facts["commit"]) == ("pixpro+infonce", "0", "2500", "abc1234")
    said = capsys.readouterr().out
    assert "pixpro_infonce_r10_study.safetensors" in said
    assert "infonce: not done yet" in said


def test_the_card_gets_the_table_and_keeps_its_text(runs, out):
    weights.main(["--runs", str(runs), "--out", str(out)])
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Card\n\nBefore.\n\n<!-- table -->\n")
    assert text.endswith("<!-- end of table -->\n\nAfter.\n")
    assert "old" not in text
    assert "| `pixpro_infonce_r10_study` | PixPro + InfoNCE | 4 | 0 | 2500 | 0.250 | 0.750 |" in text
    assert "| `untrained_r10_study` | learning rate 0 | 0 | 0 | 0 | 0.250 | 0.750 |" in text
    assert "abc1234" in text
    held = {path: path.read_bytes() for path in out.iterdir()}
    weights.main(["--runs", str(runs), "--out", str(out)])
    assert {path: path.read_bytes() for path in out.iterdir()} == held  # so that git sees no change


def test_arms_that_come_later_are_added(runs, out):
    weights.main(["--runs", str(runs), "--out", str(out)])
    row = dict.fromkeys(COLUMNS, "") | {"arm": "infonce", "lr": 0.5, "seed": 0, "step": 2500, "split": "test"}
    row |= {"set": "nuclei", "linear": 0.7, "commit": "abc1234"}
    add_row(runs / "rows.csv", COLUMNS, row)
    weights.main(["--runs", str(runs), "--out", str(out)])
    assert len(list(out.glob("*.safetensors"))) == 3
    assert "`infonce_r10_study`" in (out / "README.md").read_text(encoding="utf-8")


def test_what_does_not_fit_is_refused(runs, out, tmp_path, capsys):
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            weights.main(["--runs", str(runs), "--out", str(out), *options])
        return capsys.readouterr().err

    (out / "README.md").write_text("no marks", encoding="utf-8")
    assert "--out: expected the lines <!-- table -->" in refused()
    (out / "README.md").unlink()
    assert "--out: expected a card" in refused()
    assert not list(out.glob("*.safetensors"))
    with pytest.raises(SystemExit):
        weights.main(["--runs", str(tmp_path / "none"), "--out", str(out)])
    assert "--runs: expected rows.csv" in capsys.readouterr().err
    (out / "README.md").write_text(CARD, encoding="utf-8")
    path = runs / "pixpro+infonce-lr4-seed0-2500.safetensors"
    save_file(load_file(path) | {"layer3.0.conv1.weight": torch.zeros(1)}, path)
    assert "layer3.0.conv1.weight" in refused()
