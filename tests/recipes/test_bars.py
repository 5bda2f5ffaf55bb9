"""Bars are seen in every terminal, also in one that does not say its size, as in some containers."""

import fcntl
import os
import pty
import select
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from densessl.evaluation._jobs import Jobs
from examples.pretrain.common import bar as bar_module
from examples.pretrain.common.bar import RunBar
from examples.quickstart import quickstart
from examples.quickstart.scenes import draw_scene


def of_a_run() -> None:
    bar = RunBar()
    trainer = SimpleNamespace(
        global_step=0, log_every_n_steps=9, datamodule=SimpleNamespace(batch_size=4), accumulate_grad_batches=1
    )
    bar.on_train_start(trainer, None)
    for step in range(2):
        bar.on_train_batch_start(trainer, None, None, step)
        trainer.global_step += 1
        bar.on_train_batch_end(trainer, None, None, None, step)
    bar.on_train_end(trainer, None)


def of_an_evaluation() -> None:
    with Jobs._bar(None, "features", 2) as bar:
        bar.update(2)


def of_the_quickstart() -> None:
    args = SimpleNamespace(steps=2, lr=0.5, batch_size=2, size=32)
    quickstart.pretrain(quickstart.make_backbone(), [draw_scene(0, i)[0] for i in range(2)], "pixpro", args, 0)


@pytest.mark.parametrize("shown", [of_a_run, of_an_evaluation, of_the_quickstart])
@pytest.mark.parametrize("size", [(0, 0), (24, 80)])
def test_the_end_is_seen(shown, size, monkeypatch):
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    monkeypatch.setattr(bar_module, "steps_of", lambda trainer: 2)
    with os.fdopen(its, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown()
        terminal.flush()
        written = b""
        while b"100%" not in written and select.select([ours], [], [], 5)[0]:  # a terminal gives it in parts
            written += os.read(ours, 65536)
    os.close(ours)
    assert b"100%" in written
