"""Views that are drawn once and kept in a folder, since all arms of a seed see the same ones."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import kornia
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from densessl import View

Draw = Callable[[int], tuple[View, View]]


def views_key(photos: Tensor, *settings: object) -> str:
    """A name for views: equal only where photos, their order, settings, versions and kind of device are.

    Args:
        photos: Images uint8 ``(N, 3, H, W)`` that views are drawn from.
        settings: What else decides about the views, such as their size.
    """
    digest = hashlib.sha256(photos.cpu().contiguous().numpy().data)
    facts = (photos.shape, torch.__version__, kornia.__version__, photos.device.type, *settings)
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def kept_views(draw: Draw, folder: Path, dtype: torch.dtype, device: torch.device) -> Draw:
    """Reads the views of a step from a folder; draws and writes those that are not there yet, or are damaged.

    Several processes may share the folder: a file is there as a whole or not at all. Views come back in the precision
    in which they were written, also where they were drawn just now, so that every arm sees the same numbers.

    Args:
        draw: Draws the two views ``(B, 3, H, W)`` of a step.
        folder: Where the views of this seed lie; a file a step.
        dtype: Precision of the images in the files; bfloat16 changes nothing in a network that computes in it.
        device: Where the views go.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def drawn(step: int, path: Path) -> dict[str, Tensor]:
        views = draw(step)
        parts = {f"image{i}": view.image.to(dtype) for i, view in enumerate(views)}
        parts |= {f"coords{i}": view.coords for i, view in enumerate(views)}
        parts |= {f"source_size{i}": view.source_size for i, view in enumerate(views)}
        # safetensors refuses tensors that share memory, as the sizes of both views do.
        parts = {key: part.clone(memory_format=torch.contiguous_format) for key, part in parts.items()}
        handle, new = tempfile.mkstemp(".part", dir=folder)
        os.close(handle)
        save_file(parts, new)
        os.replace(new, path)
        return parts

    def kept(step: int) -> tuple[View, View]:
        path = folder / f"{step}.safetensors"
        try:
            held = load_file(path)
        except (FileNotFoundError, SafetensorError):  # not there yet, or damaged
            held = drawn(step, path)
        held = {key: part.to(device, non_blocking=True) for key, part in held.items()}
        return tuple(
            View(
                held[f"image{i}"].float().contiguous(memory_format=torch.channels_last),
                held[f"coords{i}"],
                held[f"source_size{i}"],
            )
            for i in (0, 1)
        )

    return kept
