"""The console command opens the doors that it names."""

import sys

import pytest

import densessl
from densessl.__main__ import main


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"densessl {name} " in text for name in ("evaluate", "export", "preview"))
    assert main([]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "--out" in capsys.readouterr().out


def test_the_help_of_export_names_the_command_as_it_was_given(capsys):
    for command, name in ((["export", "--help"], "densessl export"), (["evaluate", "--help"], "densessl evaluate")):
        with pytest.raises(SystemExit, match="0"):
            main(command)
        assert capsys.readouterr().out.startswith(f"usage: {name} ")


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"densessl {densessl.__version__}\n"


def test_what_does_not_exist_is_named(capsys, tmp_path, monkeypatch):
    assert main(["train"]) == 2
    assert "expected evaluate, export or preview, got train" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.argv", [])
    assert main(["preview", "pixpro"]) == 2
    assert "run it from a clone" in capsys.readouterr().err
    (tmp_path / "examples" / "pretrain").mkdir(parents=True)
    (tmp_path / "examples" / "pretrain" / "pixpro.py").write_text("import sys\nprint(sys.argv[1:])\n")
    assert main(["preview", "pixcontrast"]) == 2
    assert "expected a method (pixpro), got pixcontrast" in capsys.readouterr().err
    assert main(["preview", "pixpro", "--data.folder", "x"]) == 0
    assert "['preview', '--data.folder', 'x']" in capsys.readouterr().out
