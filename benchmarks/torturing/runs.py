"""Runs of recipes as process groups of their own, forked from this process, which has imported everything already.

What a run does after its imports is what the program does: the recipe's own ``main`` with a command line. A forked
process has no state of a run of before, because this one never trains.
"""

from __future__ import annotations

import atexit
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

from benchmarks.torturing.settings import METHODS
from examples.pretrain.common import checkpoint_files, cli


def preload() -> None:
    """Imports what a run would import by and by, and reads every option once."""
    importlib.import_module("torch.utils.tensorboard")
    for method in METHODS:
        recipe = importlib.import_module(f"examples.pretrain.{method}").recipe()
        cli.fit_parser(recipe).parse_args(["--data.folder=."])


class Report(Callback):
    """Tells the program that started the run how far it is: a line per event into a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.batch = pipe, 0

    def say(self, event: str, number: int = 0) -> None:
        """Writes one line."""
        os.write(self.pipe, f"{event} {number}\n".encode())

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.batch = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self.say("started", trainer.global_step)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.say("batch", self.batch)
        self.batch += 1

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.say("step", trainer.global_step)


class Running:
    """The processes of a run, their events, and their exit codes."""

    def __init__(self, method: str, arguments: Sequence[str], processes: int, log: Path) -> None:
        reading, writing = os.pipe()
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}
        self.pipe, self.began = reading, time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                os.setpgid(0, self.pids[0] if rank else 0)
                several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "torture"}
                several |= {"GROUP_RANK": 0}
                if processes > 1:
                    os.environ.update({name: str(value) for name, value in several.items()})
                    rank_zero_only.rank = rank  # Lightning reads it when it is imported
                _be_a_rank(method, arguments, Report(writing) if rank == 0 else None, log)
            self.pids.append(pid)
            os.setpgid(pid, self.pids[0])
        os.close(writing)
        self._rest = b""

    def events(self, seconds: float) -> list[tuple[str, int]] | None:
        """What was told since; waits so long for the first. None: the first process is gone and has told all."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            return []
        data = os.read(self.pipe, 65536)
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [(line.split()[0].decode(), int(line.split()[1])) for line in lines]

    def send(self, number: int, rank: int) -> None:
        """Sends a signal to one process, if it is there."""
        if self.pids[rank] not in self.codes:
            os.kill(self.pids[rank], number)

    def send_group(self, number: int) -> None:
        """Sends a signal to all processes and their readers."""
        with suppress(ProcessLookupError):
            os.killpg(self.pids[0], number)

    def wait(self, seconds: float) -> bool:
        """Waits for the end of all, and says whether it came in time; what is left then is killed.

        As torchrun does, it ends the others with SIGTERM once one has failed.
        """
        end, told = time.monotonic() + seconds, False
        while time.monotonic() < end:
            for pid in self.pids:
                if pid not in self.codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        self.codes[pid] = os.waitstatus_to_exitcode(status)
            if len(self.codes) == len(self.pids):
                self._close()
                return True
            if any(self.codes.values()) and not told:
                told = True
                for rank in range(len(self.pids)):
                    self.send(signal.SIGTERM, rank)
            if self.events(0.01) is None:
                time.sleep(0.01)
        self.send_group(signal.SIGKILL)
        for pid in self.pids:
            if pid not in self.codes:
                os.waitpid(pid, 0)
        self._close()
        return False

    def _close(self) -> None:
        os.close(self.pipe)
        time.sleep(0.05)
        self.send_group(signal.SIGKILL)  # readers that have not noticed yet that their run is gone


def _be_a_rank(method: str, arguments: Sequence[str], report: Report | None, log: Path) -> NoReturn:
    """What a forked process does: it runs the recipe's command line and ends as an interpreter does."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if report is not None:
            _report(report)
        try:
            cli.main(importlib.import_module(f"examples.pretrain.{method}").recipe(), arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            os.write(2, f"{end.code}\n".encode())
        except KeyboardInterrupt:
            code = 130
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _report(report: Report) -> None:
    callbacks, save = cli.standard_callbacks, checkpoint_files.WholeFiles.save_checkpoint

    def reported(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        report.say("saving", checkpoint["global_step"])
        save(self, checkpoint, path, storage_options)
        if Path(path).name == "last.ckpt":
            report.say("saved", checkpoint["global_step"])

    cli.standard_callbacks = lambda *args: [*callbacks(*args), report]
    checkpoint_files.WholeFiles.save_checkpoint = reported
