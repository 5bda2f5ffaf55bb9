"""The end of a run of several processes: see processes.py for the abort that it prevents."""

import signal
from pathlib import Path

import pytest
import torch
from making import TINY, cli
from torch import distributed
from torchvision.io import write_png

from examples.pretrain.common.processes import ending_together
from examples.pretrain.pixcontrast import PixContrast


@pytest.fixture
def group():
    """A group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_after_a_run_the_group_is_closed(group):
    with ending_together():
        assert distributed.is_initialized()
    assert not distributed.is_initialized()


def test_after_a_signal_all_processes_end_at_the_same_step(group):
    with pytest.raises(SystemExit) as stop, ending_together():
        raise SystemExit(128 + signal.SIGTERM)
    assert stop.value.code == 143
    assert not distributed.is_initialized()


@pytest.mark.parametrize("error", [ValueError("from one process"), SystemExit("error: from one process")])
def test_after_an_error_no_process_waits(group, error):
    with pytest.raises(type(error)), ending_together():
        raise error
    assert distributed.is_initialized()


def test_without_processes_nothing_happens():
    with ending_together():
        assert not distributed.is_initialized()


def test_a_recipe_closes_its_group(tmp_path):
    folder = Path(tmp_path, "photos")
    folder.mkdir()
    for index in range(4):
        pixels = torch.randint(0, 256, (3, 40, 48), dtype=torch.uint8)
        write_png(pixels, str(folder / f"{index}.png"))
    run = cli(PixContrast, *TINY, f"--data.folder={folder}", f"--out={tmp_path / 'run'}", "--data.size=32",
              "--data.batch_size=4", "--data.workers=0", "--trainer.accelerator=cpu", "--trainer.strategy=ddp",
              "--trainer.devices=1", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false")  # fmt: skip
    began = []
    run.trainer.callbacks[0].on_train_start = lambda *args: began.append(distributed.get_backend())
    run.fit()
    assert began == ["gloo"]
    assert not distributed.is_initialized()
