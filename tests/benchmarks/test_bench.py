"""The benchmark runs and its page can be made; its plain forms compute the same as ours."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.performance import bench, matching, meter, page, plain, relational, work
from densessl import PPM, DistanceMatcher, gram_loss, kernel_alignment_loss, pixcontrast_loss, pixpro_loss

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


def test_quick_run_fills_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests
    result = bench.main(["--quick", "--runs", "1", "--out", str(tmp_path / "performance.json")])
    assert json.loads((tmp_path / "performance.json").read_text()) == json.loads(json.dumps(result))
    text = tmp_path / "page.md"
    text.write_text((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), encoding="utf-8")
    plot = tmp_path / "plot.png"
    page.main(["--data", str(tmp_path / "performance.json"), "--page", str(text), "--plot", str(plot)])
    written = text.read_text(encoding="utf-8")
    of_gpu = json.loads((ROOT / "docs" / "assets" / "performance-gpu.json").read_text())
    for row in [*result["figures"], *of_gpu["figures"]]:
        assert f"| {row['name']} |" in written
    assert plot.stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"^page: expected the markers <!-- circumstances --> "):
        page.filled("nothing", result)


def test_windows_and_rows_are_timed_on_the_same_pairs(capsys, monkeypatch):
    matching.main(["--sizes=6,9", "--images=2", "--runs=1"])
    assert capsys.readouterr().out.count("| 9x9 |") == 2
    monkeypatch.setattr(
        matching, "limited", lambda few, block, *given: DistanceMatcher(0.5 + block / 2**30, sparse=True)(*given)
    )
    with pytest.raises(RuntimeError, match=r"^6x6, crops: the ways found different pairs"):
        matching.main(["--sizes=6", "--images=2", "--runs=1"])


def test_plain_forms_compute_the_same():
    torch.manual_seed(0)
    for views in (work.crops, work.rotations):
        coords = views(20), views(20)
        mask = plain.match(*coords, 9)
        ours = DistanceMatcher()(*coords, (9, 9))
        assert (mask.bool() ^ ours).sum() <= 1e-3 * ours.sum()  # pairs on the threshold, up to rounding
        query, key = torch.randn(2, 20, 6, 9, 9)
        torch.testing.assert_close(plain.pixpro(query, key, ours.float()), pixpro_loss(query, key, ours))
        torch.testing.assert_close(plain.pixcontrast(query, key, ours.float()), pixcontrast_loss(query, key, ours))
        torch.testing.assert_close(plain.PPM(torch.nn.Identity())(query), PPM()(query))


def test_peak_counts_what_is_held_at_once():
    """Tensors of 4 MB, one after the other and together."""
    one = meter.peak(lambda: [torch.ones(1_000_000).sum() for _ in range(2)], "cpu")
    both = meter.peak(lambda: torch.stack([torch.ones(1_000_000), torch.ones(1_000_000)]), "cpu")
    assert 4e6 <= one < 5e6
    assert 16e6 <= both < 17e6


def test_quick_run_of_the_relational_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests
    result = relational.main(["--quick", "--runs", "1", "--out", str(tmp_path / "relational.json")])
    assert json.loads((tmp_path / "relational.json").read_text()) == json.loads(json.dumps(result))
    assert [row["name"] for row in result["losses"]] == ["gram_loss", "kernel_alignment_loss"]
    assert relational.exponent([2, 4], [1.0, 4.0]) == 1.0
    query, key = torch.randn(2, 2, 6, 5, 7)
    torch.testing.assert_close(plain.gram(query, key), gram_loss(query, key))
    torch.testing.assert_close(plain.alignment(query, key), kernel_alignment_loss(query, key))
