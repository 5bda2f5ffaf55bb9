"""What a run survives: signals, kills inside a window of accumulated gradients, full disks, settings of the epoch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from making import TINY, cli
from pytorch_lightning.callbacks import Callback
from torchvision.io import write_jpeg

from examples.pretrain.common import stop_signals
from examples.pretrain.common.callbacks import StopOnCollapse
from examples.pretrain.common.checkpoint_files import WholeFiles
from examples.pretrain.common.data.loader import kill_readers
from examples.pretrain.common.stop_signals import StopSignals
from examples.pretrain.pixpro import PixPro

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twenty-four photos: six batches of four."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(24):
        noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(index)) * 255
        pixels = torch.nn.functional.interpolate(noise, (36, 48), mode="bilinear")[0].byte()
        write_jpeg(pixels, str(root / f"{index:02}.jpg"))
    return root


def run_of(folder: Path, out: Path, *args: str, callback: Callback | None = None):
    """A run of PixPro that has not begun."""
    made = cli(PixPro, *TINY, "--backbone.layer=layer1", f"--data.folder={folder}", "--data.size=32",
               "--data.batch_size=4", "--data.workers=0", f"--out={out}", "--trainer.accelerator=cpu",
               "--data.photometric=none", "--trainer.enable_progress_bar=false",
               "--trainer.enable_model_summary=false", "--save_every_n_steps=2", *args)  # fmt: skip
    if callback is not None:
        made.trainer.callbacks.insert(0, callback)
    return made


def last(out: Path) -> dict:
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=False)


def assert_equal_parameters(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for key, value in one.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other.state_dict()[key]), key


class At(Callback):
    """Does something before a batch; keeps the crops of all."""

    def __init__(self, batch: int = -1, do=lambda: None) -> None:
        self.batch, self.do, self.seen, self.coords = batch, do, 0, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.coords.append(batch.view1.coords)
        if self.seen == self.batch:
            self.do()
        self.seen += 1


def killed() -> None:
    raise KeyError("as if killed")


WINDOWS = ["--trainer.max_epochs=2", "--trainer.accumulate_grad_batches=3"]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> torch.nn.Module:
    """The method at the end of a run of four steps of three batches that nobody disturbed."""
    run = run_of(folder, tmp_path_factory.mktemp("whole"), *WINDOWS)
    run.fit()
    return run.method


@pytest.mark.parametrize("batch", [6, 7])
def test_sigterm_inside_a_window_ends_after_its_last_batch(batch, whole, folder, tmp_path):
    """The signal comes in the first or second batch of a window, whose gradients must not be lost."""
    stop = At(batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            run_of(folder, tmp_path / "part", *WINDOWS, callback=stop).fit()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert end.value.code == 128 + signal.SIGTERM
    assert stop.seen % 3 == 0
    assert last(tmp_path / "part")["global_step"] == stop.seen // 3
    again = run_of(folder, tmp_path / "part", *WINDOWS, "--ckpt_path=last")
    again.fit()
    assert_equal_parameters(whole, again.method)


def test_a_run_that_goes_on_writes_nothing_inside_its_first_window(whole, folder, tmp_path):
    for batch, more in ((8, []), (1, ["--ckpt_path=last"])):  # the second kill falls into the window after step 2
        with pytest.raises(KeyError):
            run_of(folder, tmp_path / "part", *WINDOWS, *more, callback=At(batch, killed)).fit()
        assert last(tmp_path / "part")["global_step"] == 2
    again = run_of(folder, tmp_path / "part", *WINDOWS, "--ckpt_path=last")
    again.fit()
    assert again.trainer.global_step == 4
    assert_equal_parameters(whole, again.method)


def test_an_epochs_file_is_there_after_a_kill_at_its_end(folder, tmp_path):
    """Were last.ckpt of an epoch's last step written before epoch=1.ckpt, nobody would write that one again."""

    class AtTheEnd(Callback):
        def on_train_epoch_end(self, trainer, module) -> None:
            if trainer.current_epoch == 1:
                killed()

    options = ["--trainer.max_epochs=2", "--save_every_n_epochs=1"]
    with pytest.raises(KeyError):
        run_of(folder, tmp_path, *options, callback=AtTheEnd()).fit()
    run_of(folder, tmp_path, *options, "--ckpt_path=last").fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
    assert last(tmp_path)["global_step"] == 12


def test_an_epochs_checkpoint_goes_on_with_the_next_epoch(folder, tmp_path):
    """Lightning restores a loader's position in the middle of an epoch only: the first would come again."""
    options = ["--trainer.max_epochs=2", "--save_every_n_epochs=1"]
    seen, rest, part = At(), At(), tmp_path / "part"
    whole = run_of(folder, tmp_path / "whole", *options, callback=seen)
    whole.fit()
    with pytest.raises(KeyError):
        run_of(folder, part, *options, callback=At(6, killed)).fit()
    assert last(part)["global_step"] == 6  # of the epoch's last step, which is a sixth
    start = part / "checkpoints" / "epoch=0.ckpt"
    again = run_of(folder, part, *options, f"--ckpt_path={start}", callback=rest)
    again.fit()
    assert torch.equal(torch.cat(seen.coords[6:]), torch.cat(rest.coords))
    assert_equal_parameters(whole.method, again.method)


def end_of_a_fork(do: Callable[[], None]) -> tuple[int, float]:
    """The exit code of a process that does something, and how long it took."""
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        with suppress(BaseException):
            do()
        os._exit(1)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def test_ctrl_c_ends_a_run_that_hangs_and_a_second_one_ends_it_at_once(monkeypatch):
    def hang(times: int) -> None:
        StopSignals().install(SimpleNamespace(_signal_connector=SimpleNamespace()))
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        until = time.monotonic() + 8
        while time.monotonic() < until:  # as a queue does that waits for a thread which is gone
            with suppress(BaseException):
                time.sleep(8)

    assert stop_signals.SECONDS_TO_END < 10
    monkeypatch.setattr(stop_signals, "SECONDS_TO_END", 0.5)
    code, seconds = end_of_a_fork(lambda: hang(1))
    assert code == -signal.SIGALRM
    assert 0.5 < seconds < 5
    assert end_of_a_fork(lambda: hang(2))[0] == -signal.SIGINT


@pytest.mark.parametrize(("steps", "to_end", "alive", "least"), [(2, 0.5, False, 1.7), (0, 3.0, True, 3.3)])
def test_who_presses_ctrl_c_has_the_time_of_a_step_and_the_rest_anew(steps, to_end, alive, least, monkeypatch):
    """A step of ten seconds, as CPUs and accumulated gradients make them, would be killed before its checkpoint."""

    def hang() -> None:
        signals = StopSignals()
        signals.install(SimpleNamespace(_signal_connector=SimpleNamespace()))
        for _ in range(steps):
            signals.agreed(SimpleNamespace(world_size=1))
            time.sleep(0.6)
        signals.agreed(SimpleNamespace(world_size=1))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        if alive:
            signals.alive(to_end)
        time.sleep(8)

    monkeypatch.setattr(stop_signals, "SECONDS_TO_END", to_end)
    code, seconds = end_of_a_fork(hang)
    assert code == -signal.SIGALRM
    assert least + 0.6 * steps < seconds < least + 0.6 * steps + 4


def test_readers_that_end_with_the_program_raise_no_error(folder, tmp_path):
    """torch looks after its readers by a signal handler, which would print a traceback at the end of a run."""

    def end() -> None:
        data = run_of(folder, tmp_path, "--trainer.max_steps=1", "--data.workers=1").data
        data.trainer = SimpleNamespace(world_size=1, global_rank=0, limit_train_batches=1.0)
        next(iter(data.train_dataloader()))
        kill_readers()
        time.sleep(0.2)
        os._exit(0)

    assert end_of_a_fork(end)[0] == 0


@pytest.mark.parametrize("budget", ["--trainer.max_epochs=1", "--trainer.max_steps=5", "--trainer.max_steps=7"])
def test_a_last_checkpoint_is_there_at_the_end_of_every_run(budget, folder, tmp_path):
    made = run_of(folder, tmp_path, budget, "--save_every_n_steps=1000")
    made.fit()
    assert last(tmp_path)["global_step"] == made.trainer.global_step in (5, 6, 7)


def test_a_limited_epoch_makes_the_planned_steps_and_draws_anew(folder, tmp_path):
    """Four of six batches, three epochs: twelve steps, each epoch with its own permutation and crops."""
    options = ["--trainer.max_epochs=3", "--trainer.limit_train_batches=4"]
    seen = At()
    whole = run_of(folder, tmp_path / "whole", *options, callback=seen)
    whole.fit()
    assert whole.trainer.global_step == 12
    assert torch.cat(seen.coords).flatten(1).unique(dim=0).shape[0] == 48
    for batch, more in ((7, []), (3, ["--ckpt_path=last"])):
        with pytest.raises(KeyError):
            run_of(folder, tmp_path / "part", *options, *more, callback=At(batch, killed)).fit()
    again = run_of(folder, tmp_path / "part", *options, "--ckpt_path=last")
    again.fit()
    assert_equal_parameters(whole.method, again.method)
    share = run_of(folder, tmp_path / "share", "--trainer.max_epochs=2", "--trainer.limit_train_batches=0.5")
    share.data.trainer = share.trainer
    assert share.data.batches_taken() == 3


def test_loaders_that_are_made_anew_go_on_with_the_crops(folder, tmp_path):
    coords = []
    for every in (0, 1):
        seen = At()
        made = run_of(folder, tmp_path / str(every), "--trainer.max_epochs=2", callback=seen)
        made.trainer.reload_dataloaders_every_n_epochs = every
        made.trainer.fit_loop.epoch_loop.trainer.reload_dataloaders_every_n_epochs = every
        made.fit()
        coords.append(torch.cat(seen.coords))
    assert torch.equal(*coords)


def test_a_guard_that_goes_on_remembers_the_last_healthy_reading():
    before = StopOnCollapse()
    before.healthy_at = 20000
    after = StopOnCollapse()
    after.load_state_dict(before.state_dict())
    assert after.healthy_at == 20000


def test_files_are_written_beside_and_have_the_usual_mode(tmp_path, monkeypatch):
    path, mask = tmp_path / "checkpoints" / "last.ckpt", os.umask(0o027)
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: renamed.append((Path(a).parent, Path(b))) or replace(a, b))
    try:
        WholeFiles().save_checkpoint({"step": 1}, path)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640
    assert renamed == [(path.parent, path)]
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RuntimeError, match=r"last.ckpt cannot be written: No space left .*before is kept"):
        WholeFiles().save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_ends_a_run_in_one_line_and_keeps_its_checkpoint(folder, tmp_path, monkeypatch):
    def full(self, checkpoint, path, storage_options=None) -> None:
        monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        save(self, checkpoint, path)

    run_of(folder, tmp_path, "--trainer.max_steps=2").fit()
    save = WholeFiles.save_checkpoint
    monkeypatch.setattr(WholeFiles, "save_checkpoint", full)
    with pytest.raises(RuntimeError, match=r"last.ckpt cannot be written: No space left on device"):
        run_of(folder, tmp_path, "--trainer.max_steps=2", "--extend_to=4", "--ckpt_path=last").fit()
    assert last(tmp_path)["global_step"] == 2


def test_what_a_killed_run_was_writing_is_removed(folder, tmp_path):
    parts = [tmp_path / "checkpoints" / "epoch=3.ckpt.part", tmp_path / "best.safetensors.part"]
    parts[0].parent.mkdir()
    for part in parts:
        part.write_bytes(b"half a file")
    run_of(folder, tmp_path, "--trainer.max_steps=1").fit()
    assert not any(part.exists() for part in parts)


def test_a_selection_of_the_torture_program():
    """SIGKILL to a run and its reader of shards; SIGTERM to one of two processes."""
    pytest.importorskip("webdataset")
    command = [sys.executable, "benchmarks/torture.py", "--kills=2", "--first=1", "--seed=130646", "--processes=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(": equal\n") == 2
