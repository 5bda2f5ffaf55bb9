"""SIGTERM, Ctrl-C and Slurm's signal: noted when they come, obeyed by all processes after the same step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

SECONDS_TO_END = 9  # of a run that was told to end by Ctrl-C and hangs
SECONDS_TO_REPORT = 30  # when its checkpoint is written
SECONDS_OF_AN_ECHO = 1  # torchrun passes on to its processes a Ctrl-C that the terminal has sent them already


def stopped_by(exception: BaseException) -> str | None:
    """Who asked the run to end, in words; None where it ended by an error."""
    if isinstance(exception, KeyboardInterrupt):
        return "the user"
    code = exception.code if isinstance(exception, SystemExit) else None
    if not isinstance(code, int) or code <= 128:
        return None
    return "the user" if code == 128 + signal.SIGINT else signal.Signals(code - 128).name


class StopSignals:
    """Notes that the run is asked to end.

    Lightning's own handler communicates while it handles the signal, and hangs where another process is in the middle
    of a step. Here a handler only notes the signal. After each optimiser step the processes ask each other, and all
    stop after the same one, whichever of them was asked.

    A first Ctrl-C is obeyed like SIGTERM, and a second one ends the process at once. After the first, a process that
    hangs is ended by the kernel's alarm, which needs no answer from it: in ten seconds and the time of two steps,
    because the step that is under way must be able to end. ``alive`` gives it time anew.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that came; 0 is none
        self._since = 0.0
        self._last_step, self._step_seconds = 0.0, 0.0
        self._before: dict[int, Any] = {}

    def install(self, trainer: pl.Trainer) -> None:
        """Puts the handlers in place, and keeps Lightning from replacing them."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python handles signals in its main thread only
        # Lightning registers its handlers after all hooks but the loop's first: a signal in between must not meet them.
        trainer._signal_connector.register_signal_handlers = lambda: None
        numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
        for number in numbers:
            self._before.setdefault(number, signal.signal(number, self._note))

    def restore(self) -> None:
        """Brings back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def agreed(self, trainer: pl.Trainer) -> int:
        """The signal that any of the processes was sent, the same answer in all of them; 0 if none was.

        Called after each step.
        """
        now = time.monotonic()
        self._last_step, self._step_seconds = now, now - self._last_step if self._last_step else 0.0
        if trainer.world_size == 1:
            return self.number
        number = torch.tensor(self.number, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)

    def alive(self, seconds: float) -> None:
        """Gives a run that ends by Ctrl-C, and has come a part of the way, so many seconds from now on."""
        if self.number == signal.SIGINT and not hasattr(sys, "ps1"):
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self.number = self.number or number
        elif self.number != signal.SIGINT:
            self.number, self._since = number, time.monotonic()
            if not hasattr(sys, "ps1"):  # a notebook's kernel lives on
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_END + 2 * self._step_seconds)
            if rank_zero_only.rank == 0:  # os.write, because a print may have been interrupted
                os.write(
                    2,
                    b"\nThe run ends after this step and writes last.ckpt. Ctrl-C once more ends it at once, and what "
                    b"was trained since the last.ckpt of before is lost.\n",
                )
        elif time.monotonic() - self._since > SECONDS_OF_AN_ECHO or "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
