"""Rows tell the options that they were made with, and rows of other options are not taken for them."""

from argparse import Namespace

import pytest

from benchmarks.studies.rows import add_row, check_options, options_of, read_rows

COLUMNS = ["set", "score", "options"]


def test_rows_of_other_options_are_refused(tmp_path):
    path, args = tmp_path / "rows.csv", Namespace(size=64, scale=(0.2, 1.0), bfloat16=None)
    options = options_of(args, "size", "scale", "bfloat16")
    assert options == "size=64;scale=0.2,1.0;bfloat16=no"
    check_options(path, options)  # no rows yet
    add_row(path, COLUMNS, {"set": "camvid", "score": 0.5, "options": options})
    check_options(path, options)
    other = options.replace("0.2", "0.1")
    with pytest.raises(
        ValueError, match=r"--scale: expected 0.2,1.0, with which rows in .*rows.csv were made, got 0.1"
    ):
        check_options(path, other)
    check_options(path, other, set="nuclei")
    check_options(path, options + ";images=8")  # an option that those rows did not have yet
    with pytest.raises(ValueError, match="--scale"):
        check_options(path, other, set="camvid")


def test_a_file_of_an_earlier_version_gets_the_columns_that_it_lacks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("score,set,note\n0.1,camvid,x\n")
    check_options(path, "size=64")  # those rows do not tell
    add_row(path, COLUMNS, {"set": "nuclei", "score": 0.5, "options": "size=64"})
    assert read_rows(path) == [
        {"set": "camvid", "score": "0.1", "options": "", "note": "x"},
        {"set": "nuclei", "score": "0.5000", "options": "size=64", "note": ""},
    ]
    with pytest.raises(ValueError, match="--size: expected 64"):
        check_options(path, "size=32")
    with pytest.raises(ValueError, match="scores"):  # a column that no header has
        add_row(path, COLUMNS, {"set": "nuclei", "scores": 0.5})
