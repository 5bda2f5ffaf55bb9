"""Optical flow from disk: Middlebury's .flo, NumPy's .npy, KITTI's PNG of 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.pretrain.common.data.decode import read_photo, shown

FLOW_SUFFIXES = {".flo", ".npy", ".png"}
_MAGIC = 202021.25  # the first number of a .flo file, which says that it is one
_UNKNOWN = 1e9  # a larger number in a .flo file means that the flow is not known there


def read_flow(path: str | Path) -> Tensor:
    """Reads one file of optical flow.

    A ``.flo`` file holds the magic number 202021.25, width and height, then x and y pixel by pixel. An ``.npy`` file
    holds floating point ``(H, W, 2)`` or ``(2, H, W)``. A PNG of 16 bits holds, as KITTI has it, ``64 x + 2^15``,
    ``64 y + 2^15``, and whether the flow is known.

    Args:
        path: Path of the file; its suffix says which of the three it is.

    Returns:
        float32 ``(2, H, W)``, x and y in pixels; NaN where the flow is not known.

    Raises:
        RuntimeError: If the file cannot be read rightly; the message names it.
        OSError: If the file system cannot read it.
    """
    path = Path(path)
    read = {".flo": _read_flo, ".npy": _read_npy, ".png": _read_kitti}[path.suffix.lower()]
    try:
        return read(path)
    except (ValueError, EOFError) as error:
        raise RuntimeError(f"{shown(path)} cannot be read: {error}") from error


def write_flow(path: str | Path, flow: Tensor) -> None:
    """Writes flow ``(2, H, W)`` as a .flo file; NaN becomes the number that means that it is not known."""
    height, width = flow.shape[1:]
    values = torch.where(flow.isfinite().all(0), flow, 10 * _UNKNOWN).permute(1, 2, 0).numpy().astype("<f4")
    header = np.array([_MAGIC], "<f4").tobytes() + np.array([width, height], "<i4").tobytes()
    Path(path).write_bytes(header + values.tobytes())


def _read_flo(path: Path) -> Tensor:
    data = np.fromfile(path, np.uint8)
    if len(data) < 12 or data[:4].view("<f4")[0] != np.float32(_MAGIC):
        raise ValueError(f"expected a .flo file, which begins with {_MAGIC}, got another one of {len(data)} bytes")
    width, height = (int(side) for side in data[4:12].view("<i4"))
    if width < 1 or height < 1 or len(data) != 12 + 8 * width * height:
        raise ValueError(f"expected {width} x {height} x 2 numbers of 4 bytes, got {len(data) - 12} bytes")
    flow = torch.from_numpy(data[12:].view("<f4").reshape(height, width, 2).astype(np.float32)).permute(2, 0, 1)
    return torch.where((flow.abs() < _UNKNOWN).all(0), flow, torch.nan)


def _read_npy(path: Path) -> Tensor:
    values = np.load(path, allow_pickle=False)
    first, last = (values.shape[0] == 2, values.shape[2] == 2) if values.ndim == 3 else (False, False)
    if values.dtype.kind != "f" or first == last:
        raise ValueError(f"expected floating point (H, W, 2) or (2, H, W), got {values.dtype} {values.shape}")
    flow = torch.from_numpy(np.ascontiguousarray(values if first else np.moveaxis(values, 2, 0), np.float32))
    return torch.where(flow.isfinite().all(0), flow, torch.nan)


def _read_kitti(path: Path) -> Tensor:
    image = read_photo(path, 3, turn=False)
    if image.dtype != torch.float32:
        raise ValueError("expected 16 bits in each of three channels, as KITTI's flow has them, got 8 bits")
    numbers = (image.double() * 65535).round()
    flow = ((numbers[:2] - 2**15) / 64).float()
    return torch.where(numbers[2] > 0, flow, torch.nan)
