"""Refuses what cannot fit into memory, because the system would kill the process without a message."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_SMALL = 1 << 30  # bytes; less than this is never looked into


def check_fits(size: int, device: torch.device, name: str, what: str, instead: str) -> None:
    """Raises ValueError if so many bytes are more than the device's whole memory.

    Args:
        size: Number of bytes.
        device: Device that would hold them.
        name: Name of the argument to blame.
        what: What would take the memory, in words.
        instead: Name of the argument to set instead.

    Raises:
        ValueError: If the bytes do not fit; the message names both arguments.
    """
    if size <= _SMALL or torch.compiler.is_compiling():
        return
    limit = memory_of(device)
    if limit is not None and size > limit:
        raise ValueError(
            f"{name}: {what} takes about {size / 2**30:.0f} GiB, more than the {limit / 2**30:.0f} GiB of {device}; "
            f"set {instead}"
        )


def memory_of(device: torch.device) -> int | None:
    """Bytes of a device's memory, or of the container's share if there is one; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        share = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(share)) if share.isdecimal() else total
