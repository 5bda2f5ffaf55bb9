"""Two torchrun "nodes" on this machine, one killed and started again: ``python benchmarks/torture.py --nodes``.

The real launcher and the real program, each process with its own imports, so that it takes minutes on two cores.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.torturing.settings import Setting

ROOT = Path(__file__).parents[2]
SETTING = Setting(2, "folder", 1, 3, "pixpro", "device")
STEPS_BEFORE = 4  # of the first checkpoint after which the node is killed


def torchrun(photos: Path, out: Path, port: int, nodes: int, epochs: int) -> subprocess.Popen[bytes]:
    """Starts one node: of two with a process each, or alone with two."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    # With torch 2.14 a node that comes anew waits for an address that the others have told in the first round only.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    log = (out.parent / f"{out.name}.log").open("ab")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=torture", "--max-restarts=3"),
            *("--local-addr=127.0.0.1", str(ROOT / "examples" / "pretrain" / f"{SETTING.method}.py")),
            *SETTING.arguments(photos, out),
            *(f"--trainer.max_epochs={epochs}", f"--trainer.devices={2 // nodes}", f"--trainer.num_nodes={nodes}"),
        ],
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def processes_of(pid: int) -> list[int]:
    """A process and all below it."""
    children: list[int] = []
    with suppress(FileNotFoundError):
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(below for child in children for below in processes_of(child))]


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the agent, its processes and their readers, as where a machine loses its power."""
    for pid in processes_of(node.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def end_of(photos: Path, out: Path, epochs: int, killed: bool) -> dict[str, Any]:
    """The last checkpoint of a run on one node, or on two of which the second is killed and started again."""
    out.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [torchrun(photos, out, port, 2 if killed else 1, epochs)]
    last, log = out / "checkpoints" / "last.ckpt", out.parent / f"{out.name}.log"
    try:
        if killed:
            time.sleep(5)  # the first node holds the rendezvous
            nodes.append(torchrun(photos, out, port, 2, epochs))
            while not last.exists() or torch.load(last, weights_only=False)["global_step"] < STEPS_BEFORE:
                if any(node.poll() is not None for node in nodes):
                    raise RuntimeError(
                        f"a node has ended early: {(out.parent / f'{out.name}.log').read_text()[-3000:]}"
                    )
                time.sleep(0.05)
            kill_node(nodes[1])
            nodes[1] = torchrun(photos, out, port, 2, epochs)
        codes = [node.wait(900) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                kill_node(node)
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {log.read_text()[-3000:]}")
    return torch.load(last, weights_only=False)
