"""The end of a run of several processes: see processes.py for the abort that it prevents."""

import signal
from types import SimpleNamespace

import pytest
from torch import distributed

from examples.pretrain.common.processes import ending_together
from examples.pretrain.pixcontrast import recipe
from examples.transfer.common import command


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


def test_a_process_whose_peer_has_failed_says_so_and_ends(group, monkeypatch, caplog):
    def broken() -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:37611")

    monkeypatch.setattr(distributed, "barrier", broken)
    with ending_together():
        pass
    with pytest.raises(SystemExit) as stop, ending_together():
        raise SystemExit(128 + signal.SIGTERM)
    assert stop.value.code == 143
    assert caplog.messages == 2 * [
        "another process of the run has ended before this one, probably by an error of its own"
    ]


def test_a_recipe_closes_the_group_of_its_program(group, monkeypatch):
    seen = []
    monkeypatch.setattr("examples.pretrain.common.cli.speak_plainly", lambda: None)
    monkeypatch.setattr("examples.pretrain.common.cli.main", lambda *args: seen.append(distributed.is_initialized()))
    recipe().run()
    assert seen == [True]
    assert not distributed.is_initialized()


def test_a_transfer_recipe_closes_the_group_of_its_program(group, monkeypatch):
    seen = []

    def made(*args, **options):
        seen.append(distributed.is_initialized())
        return SimpleNamespace(trainer=SimpleNamespace(log_dir=""))

    monkeypatch.setattr(command, "speak_plainly", lambda: None)
    monkeypatch.setattr(command, "TransferCLI", made)
    command.run(None, None)
    assert seen == [True]
    assert not distributed.is_initialized()
