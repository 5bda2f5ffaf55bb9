"""What a run is, and what a continuation may change: identity, budget, the run folder, the log."""

import csv
import io
import re
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from making import TINY, cli
from torch import nn
from torchvision.io import write_png

from examples.pretrain.common.bar import RunBar, clock
from examples.pretrain.common.callbacks import StopOnCollapse
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.fingerprint import fingerprint
from examples.pretrain.common.extension import Extension
from examples.pretrain.densecl import DenseCL
from examples.pretrain.pixcontrast import PixContrast
from examples.pretrain.pixpro import PixPro

QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
SHAPE = ["--data.size=32", "--data.batch_size=4", "--data.workers=0", "--data.photometric=none"]


def photos(folder: Path, count: int = 12, seed: int = 0) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        pixels = torch.randint(0, 256, (3, 40, 48 + index), dtype=torch.uint8, generator=generator)
        write_png(pixels, str(folder / f"{index:02}.png"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve photos: three steps of four."""
    return photos(tmp_path_factory.mktemp("data") / "photos")


def made(method: type[nn.Module], folder: Path, out: Path, *args: str):
    return cli(method, *TINY, *SHAPE, *QUIET, "--data.folder", str(folder), "--out", str(out), *args)


def fit(method: type[nn.Module], folder: Path, out: Path, *args: str):
    run = made(method, folder, out, *args)
    run.fit()
    return run


EPOCHS = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--save_every_n_steps=5"]


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory) -> Path:
    """The folder of a run of two epochs, with a checkpoint of step 5, of six."""
    out = tmp_path_factory.mktemp("begun") / "run"
    fit(PixPro, folder, out, *EPOCHS)
    return out


@pytest.mark.parametrize(
    ("option", "was", "now"),
    [
        ("trainer.max_epochs", "2", "3"),
        ("data.batch_size", "4", "2"),
        ("data.scale", r"\[0.08, 1.0\]", "[0.1,1.0]"),
        ("trainer.accumulate_grad_batches", "1", "2"),
        ("optimizer.lr_at_1024", "4.0", "2.0"),
        ("optimizer.warmup", "0.05", "0.1"),
        ("momentum", r"\[0.99, 1.0\]", "[0.9,1.0]"),
        ("seed", "0", "1"),
        ("method.threshold", "0.7", "0.5"),
        ("backbone.init", "random", "imagenet"),
        ("trainer.limit_train_batches", "None", "2"),
        ("probe.images", "None", "4"),
    ],
)
def test_another_setting_is_refused_when_a_run_is_continued(option, was, now, folder, begun):
    """In one line, before anything is made: the option, both values and the way out."""
    value = re.escape(str(float(now)) if "." in now and now[0] != "[" else now.replace(",", ", "))
    for last in ("last", str(begun / "checkpoints" / "last.ckpt")):
        message = rf"^{option}: the run in .*last.ckpt has {was}, got {value}; .*{option} {was}"
        with pytest.raises(ValueError, match=message) as error:
            made(PixPro, folder, begun, *EPOCHS, f"--ckpt_path={last}", f"--{option}={now}")
        assert "\n" not in str(error.value)
        assert ("--extend_to" if "max_epochs" in option else "--backbone.init") in str(error.value)


def test_another_method_is_refused(folder, begun):
    with pytest.raises(ValueError, match=r"method: the run in .* has PixPro, got PixContrast; .*--backbone.init"):
        made(PixContrast, folder, begun, *EPOCHS, "--ckpt_path=last")


def test_other_images_are_refused_and_a_moved_folder_is_not(folder, begun, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    # Reading processes, logging, and the thresholds of the guards may change as well.
    free = ["--data.workers=1", "--data.max_unreadable=0.5", "--trainer.log_every_n_steps=2", "--save_every_n_epochs=1"]
    again = made(PixPro, moved, run, *EPOCHS, *free, "--ckpt_path=last")
    next(c for c in again.trainer.callbacks if isinstance(c, StopOnCollapse)).patience = 7
    again.fit()
    assert again.trainer.global_step == 6
    for source, message in (
        (photos(tmp_path / "same-names", seed=1), "reads 12 images of .*photos, got other images of .*same-names"),
        (photos(tmp_path / "more", count=13), "reads 12 images of .*photos, got 13 images of .*more"),
    ):
        with pytest.raises(ValueError, match=f"^data.folder: the run that is continued {message}; continue with"):
            fit(PixPro, source, run, *EPOCHS, "--ckpt_path=last")


def test_a_fingerprint_is_that_of_the_files(folder, monkeypatch):
    whole = fingerprint(find_photos(folder))
    assert whole == fingerprint(find_photos(f"{folder}/"))
    assert whole != fingerprint(find_photos(folder).without([0]))
    monkeypatch.chdir(folder)
    assert whole == fingerprint(find_photos("."))


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("method", "rate", "budget", "ends"),
    [(PixPro, "lr-LARS/pg1", "epochs", (1, 2, 3)), (DenseCL, "lr-SGD", "steps", (4, 5, 7))],
)
def test_an_extended_run_goes_on_as_if_it_had_had_the_budget(method, rate, budget, ends, folder, tmp_path, caplog):
    """Rates, momentum and images: those of a run of the longer budget, also when it is extended twice."""
    extra = ["--method.queue=8", "--data.preset=mocov2"] if method is DenseCL else ["--optimizer.warmup=0.25"]
    options = ["--trainer.log_every_n_steps=1", "--momentum=[0.9,1.0]", *extra]
    options += ["--save_every_n_steps=1", "--save_every_n_epochs=1"]
    counted = f"--trainer.max_{budget}="
    fit(method, folder, tmp_path / "long", *options, f"{counted}{ends[2]}")
    expected = {row["step"]: row for row in rows_of(tmp_path / "long")}
    run, of_step = tmp_path / "run", 3 if budget == "epochs" else 1
    fit(method, folder, run, *options, f"{counted}{ends[0]}")
    for before, end in pairwise(ends):
        path = run / "checkpoints" / (f"epoch={before - 1}.ckpt" if budget == "epochs" else "last.ckpt")
        with caplog.at_level("INFO"):
            more = [f"{counted}{ends[0]}", f"--extend_to={end}", f"--ckpt_path={path}"]
            again = fit(method, folder, run, *options, *more)
        assert again.trainer.global_step == end * of_step
    rows = rows_of(run)
    assert [int(row["step"]) for row in rows] == list(range(ends[1] * of_step, ends[2] * of_step))
    assert sorted(path.name for path in run.glob("*.csv")) == ["metrics-1.csv", "metrics-2.csv", "metrics.csv"]
    for row in rows:
        for name in (rate, "momentum"):
            assert float(row[name]) == pytest.approx(float(expected[row["step"]][name]), rel=1e-6)
    assert f"max_{budget}: {ends[2]}" in (run / "config.yaml").read_text()  # it continues the run as it is by now
    said = [record.message for record in caplog.records if record.message.startswith("extend_to: from step")]
    assert re.search(r"those of a run that had \d+ steps from its start; the rate goes from .* to ", said[0])
    path = run / "checkpoints" / (f"epoch={ends[2] - 1}.ckpt" if budget == "epochs" else "last.ckpt")
    for budgets in ([f"{counted}{ends[0]}", f"--extend_to={ends[2]}"], [f"{counted}{ends[2]}"]):
        same = made(method, folder, run, *options, *budgets, f"--ckpt_path={path}")  # the budget that it has by now
        assert not any(isinstance(callback, Extension) for callback in same.trainer.callbacks)


def test_extensions_that_mean_nothing_are_refused(folder, begun):
    with pytest.raises(ValueError, match=r"extend_to: expected more than the trainer.max_epochs=2 of the run .*got 1"):
        made(PixPro, folder, begun, *EPOCHS, "--ckpt_path=last", "--extend_to=1")
    with pytest.raises(ValueError, match=r"extend_to: expected a run with one budget, got .*max_epochs.*max_steps"):
        made(PixPro, folder, begun, *EPOCHS, "--trainer.max_steps=5", "--ckpt_path=last", "--extend_to=9")


def test_a_run_goes_on_after_the_file_that_it_began_from_is_gone(folder, begun, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copy(begun / "encoder.safetensors", start)
    options = ["--trainer.max_epochs=2", "--save_every_n_steps=5", f"--backbone.init={start}"]
    whole = fit(PixPro, folder, tmp_path / "run", *options)
    start.unlink()
    again = fit(PixPro, folder, tmp_path / "run", *options, "--ckpt_path=last")
    assert again.trainer.global_step == 6
    for key, value in whole.method.encoder.state_dict().items():
        assert torch.equal(value, again.method.encoder.state_dict()[key]), key


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_with_the_three_ways_out(folder, begun, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    (run / "notes.txt").write_text("mine")
    before = (run / "encoder.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"out: .*run holds a run: .*--ckpt_path last.*--out.*--overwrite"):
        made(PixPro, folder, run, *EPOCHS)
    with pytest.raises(ValueError, match=r"out: .*run holds a run"):
        made(PixPro, folder, run, *EPOCHS, f"--ckpt_path={begun}/checkpoints/last.ckpt")  # of another run
    with pytest.raises(ValueError, match=r"overwrite: expected a run to begin, got --ckpt_path .*last.ckpt"):
        made(PixPro, folder, run, *EPOCHS, "--ckpt_path=last", "--overwrite")
    assert (run / "encoder.safetensors").read_bytes() == before
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="expected images"):  # nothing is deleted for a run that cannot begin
        fit(PixPro, empty, run, *EPOCHS, "--overwrite")
    assert (run / "checkpoints" / "last.ckpt").exists()
    fit(PixPro, folder, run, "--trainer.max_steps=1", "--overwrite")
    assert torch.load(run / "checkpoints" / "last.ckpt")["global_step"] == 1
    assert (run / "notes.txt").exists()
    assert "max_steps: 1" in (run / "config.yaml").read_text()
    assert not list(run.glob("metrics-*.csv"))


def test_without_a_name_a_run_takes_the_next_number_of_its_method(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [*TINY, *SHAPE, *QUIET, "--data.folder", str(folder), "--trainer.max_steps=1"]
    outs = [cli(method, *args).config.out for method in (PixPro, PixPro, PixContrast)]
    assert outs == ["runs/pixpro-1", "runs/pixpro-2", "runs/pixcontrast-1"]
    with pytest.raises(ValueError, match="out: expected the folder of the run that --ckpt_path last means"):
        cli(PixPro, *args, "--ckpt_path=last")
    monkeypatch.setenv("WORLD_SIZE", "2")  # of torchrun: each process would take a number of its own
    with pytest.raises(ValueError, match="out: expected the folder that all processes share"):
        cli(PixPro, *args)


def test_auto_continues_where_there_is_a_checkpoint_and_begins_otherwise(folder, begun, tmp_path):
    assert made(PixPro, folder, tmp_path, *EPOCHS, "--ckpt_path=auto").config.ckpt_path is None
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    last = run / "checkpoints" / "last.ckpt"
    assert made(PixPro, folder, run, *EPOCHS, "--ckpt_path=auto").config.ckpt_path == str(last)


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "logged"), [(20, [9, 19]), (4, [0, 1, 2, 3])])
def test_the_table_has_one_row_a_step_with_its_rate(steps, logged, folder, tmp_path):
    """The first after at most ten steps, all of a short run, also where gradients are accumulated."""
    fit(PixPro, folder, tmp_path, f"--trainer.max_steps={steps}", "--data.batch_size=2",
        "--trainer.accumulate_grad_batches=2")  # fmt: skip
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows] == logged
    for row in rows:
        assert all(row[name] for name in ("loss", "lr-LARS/pg1", "momentum", "health/std_times_sqrt_c"))
    assert (tmp_path / "encoder.safetensors").stat().st_mode & 0o777 == 0o644


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar_at(step: int, terminal: bool) -> RunBar:
    bar = RunBar(Terminal() if terminal else io.StringIO())
    bar.step, bar.total, bar.per_step, bar.images = step, 20_000, 0.25, 128
    bar.values = {"loss": -2.3456, "std": 0.8713, "pck": 0.4567, "lr": 1.4142}
    bar.bar = object() if terminal else None
    return bar


@pytest.mark.parametrize("columns", [40, 60, 80, 120, 250])
def test_the_bar_is_one_line_over_the_whole_run(columns):
    text = bar_at(5000, True).line(columns)
    assert len(text) <= columns
    for part in (" 25%", "5000/20000", "1:02:30 left"):
        assert part in text
    if columns >= 60:
        assert "loss -2.35" in text
        assert "512 img/s" in text
    if columns >= 80:  # without the rate, for which there is no room
        assert "std 0.871  pck 0.457" in text
    if columns >= 120:
        for part in ("512 img/s", "loss -2.35", "lr 1.41", "std 0.871", "pck 0.457", "█"):
            assert part in text


def test_values_that_few_ask_for_leave_room_for_the_bar():
    bar = bar_at(5000, True)
    bar.values |= {"pck_colour": 0.4321, "neighbors": 0.5432, "linear": 0.6543}
    assert "█" in bar.line(110)
    assert "pck_colour" in bar.line(120)
    assert "linear 0.654" in bar.line(160)


def test_without_a_terminal_it_is_lines_and_not_many(folder, tmp_path):
    run = made(PixPro, folder, tmp_path, "--trainer.max_epochs=1", "--trainer.enable_progress_bar=true",
               "--trainer.log_every_n_steps=3")  # fmt: skip
    bar = next(c for c in run.trainer.callbacks if isinstance(c, RunBar))
    bar.file = io.StringIO()
    run.fit()
    lines = bar.file.getvalue().splitlines()
    assert len(lines) == 2
    assert "1/3" in lines[0]
    assert "100%  3/3" in lines[1]
    for part in ("loss", "img/s", "lr", "std"):
        assert part in lines[1]
    made_of = SimpleNamespace(
        progress_bar_metrics={"loss": 1.0, "probe/pck": 0.5, "probe/linear": 0.25},
        callback_metrics={"health/std_times_sqrt_c": 0.75},
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.125}])],
    )
    bar._read(made_of)  # the probe before the rate, in the order in which they are kept where there is little room
    assert bar.values == {"loss": 1.0, "std": 0.75, "pck": 0.5, "lr": 0.125, "linear": 0.25}
    assert list(bar.values) == ["loss", "std", "pck", "lr", "linear"]


def test_a_clock_reads_as_one():
    assert [clock(s) for s in (5, 65, 3725, 90061)] == ["0:05", "1:05", "1:02:05", "1 d 1:01"]
