"""The end of a program that runs as several processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from examples.pretrain.common.stop_signals import stopped_by

log = logging.getLogger(__name__)

SECONDS_TO_FREE = 0.3  # what gloo's threads have to free the tensors of the last exchange


@contextmanager
def ending_together() -> Iterator[None]:
    """Lets the processes of a program on CPUs wait for each other at its end, and closes their group.

    The threads of gloo free the tensors of an exchange some time after it. A thread that does so while Python is
    shutting down aborts its process, and torchrun then reports a run as failed that has done all its work. With torch
    2.6 a process that closes its group may also wait for such a thread for ever. The pause here gives the threads time.

    With NCCL, Lightning closes the group itself. After an error no process waits, because the others may never come.
    This is for the end of a whole program: the processes cannot form another group after it.
    """
    try:
        yield
    except SystemExit as stop:
        if stopped_by(stop):  # all processes stop after the same step
            _end()
        raise
    _end()


def _end() -> None:
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_backend() != "gloo":
        return
    try:
        distributed.barrier()
    except RuntimeError:
        log.warning("another process of the run has ended before this one, probably by an error of its own")
        return
    time.sleep(SECONDS_TO_FREE)
    distributed.destroy_process_group()
