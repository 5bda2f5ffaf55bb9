"""The comparison of pairs of frames with single ones runs, and makes each row once."""

import pytest

from benchmarks.studies import moving
from benchmarks.studies.rows import read_rows


def test_every_arm_makes_its_row_once(tmp_path):
    options = ["--seeds=1", "--steps=10", "--batch-size=2", "--scenes=2", "--probe-images=2", "--probe-steps=2"]
    for _ in range(2):
        moving.main([*options, "--size=32", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"--steps: expected 10, with which rows in .* were made, got 20"):
        moving.main([*options, "--steps=20", "--size=32", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "rows.csv")
    assert [row["arm"] for row in rows] == ["rate-0", "pixpro", "pixpro_video"]
    assert [row["steps"] for row in rows] == ["0", "10", "10"]
    assert all(float(row["least_std"]) > 0 for row in rows[1:])
