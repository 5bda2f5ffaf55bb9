"""Views that are drawn once and kept in a folder, since all arms of a seed see the same ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from densessl import View

Draw = Callable[[int], tuple[View, View]]


def kept_views(draw: Draw, folder: Path, dtype: torch.dtype, device: torch.device) -> Draw:
    """Reads the views of a step from a folder; draws and writes those that are not there yet.

    Several processes may share the folder: a file is there as a whole or not at all. Views come back in the precision
    in which they were written, also where they were drawn just now, so that every arm sees the same numbers.

    Args:
        draw: Draws the two views ``(B, 3, H, W)`` of a step.
        folder: Where the views of this seed lie; a file a step.
        dtype: Precision of the images in the files; bfloat16 changes nothing in a network that computes in it.
        device: Where the views go.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def kept(step: int) -> tuple[View, View]:
        path = folder / f"{step}.safetensors"
        if not path.exists():
            views = draw(step)
            parts = {f"image{i}": view.image.to(dtype) for i, view in enumerate(views)}
            parts |= {f"coords{i}": view.coords for i, view in enumerate(views)}
            parts |= {f"source_size{i}": view.source_size for i, view in enumerate(views)}
            new = path.with_suffix(f".{os.getpid()}")
            # safetensors refuses tensors that share memory, as the sizes of both views do.
            save_file({key: part.clone(memory_format=torch.contiguous_format) for key, part in parts.items()}, new)
            new.replace(path)
        held = {key: part.to(device, non_blocking=True) for key, part in load_file(path).items()}
        return tuple(
            View(
                held[f"image{i}"].float().contiguous(memory_format=torch.channels_last),
                held[f"coords{i}"],
                held[f"source_size{i}"],
            )
            for i in (0, 1)
        )

    return kept
