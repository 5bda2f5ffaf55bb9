"""The benchmark of the evaluation's tensor functions runs, and what it compares is the same."""

import json

import torch

from benchmarks.performance import evaluation
from densessl.evaluation import propagate_labels


def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests
    rows = evaluation.main(["--quick", "--runs", "1", "--out", str(tmp_path / "rows.json")])
    assert json.loads((tmp_path / "rows.json").read_text()) == json.loads(json.dumps(rows))
    assert rows[0]["greatest difference from brute force on a tenth"] < 1e-4
    assert all(row["bytes"] > 0 and row["times"][1] > 0 for row in rows)


def test_the_dense_product_computes_the_same():
    torch.manual_seed(0)
    features, first = torch.randn(2, 5, 6, 9), torch.rand(3, 6, 9)
    torch.testing.assert_close(propagate_labels(features, first, radius=2)[0], evaluation.dense(features, first, 2))
