"""The end of a run of several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from examples.pretrain.common.stop_signals import stopped_by


@contextmanager
def ending_together() -> Iterator[None]:
    """Lets the processes of a run on CPUs wait for each other at its end, and closes their group.

    The threads of gloo free the tensors of an exchange some time after it. A thread that does so while Python is
    shutting down aborts its process, and torchrun then reports a run as failed that has done all its work. While the
    processes wait here, the threads have the time. With NCCL, Lightning closes the group itself. After an error no
    process waits, because the others may never come.
    """
    try:
        yield
    except SystemExit as stop:
        if stopped_by(stop):  # all processes stop after the same step
            _end()
        raise
    _end()


def _end() -> None:
    if distributed.is_available() and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.barrier()
        distributed.destroy_process_group()
