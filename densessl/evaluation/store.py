"""Features on disk: computed once for several probes, by one process or several, and never all in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from densessl.evaluation._batches import Features, check_pair, encode
from densessl.evaluation._disk import Rows
from densessl.evaluation._processes import from_all, from_first, place
from densessl.evaluation._refuse import check_at_least, check_is_pair
from densessl.evaluation._stored import StoredFeatures
from densessl.evaluation._together import same_in_all

__all__ = ["StoredFeatures", "shared_features", "store_features"]

_LEAST, _HIGHEST = -2, torch.iinfo(torch.int16).max  # what lies beyond is no class, nor ignored


def store_features(
    features: Features,
    labelled: Sequence[tuple[Tensor, Tensor]],
    folder: str | Path | None = None,
    *,
    batch_size: int = 16,
    shared: bool = False,
    keep: bool = False,
    held_bytes: int = 1 << 29,
) -> StoredFeatures:
    """Computes the feature maps of a labelled set once, into files that the probes then read by blocks.

    What comes back takes the place of the labelled set in ``in_context_segmentation`` and the other probes on labelled
    images. In float32 the maps of 10,582 images at 32 x 32 x 384 take 16.6 GB on disk.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        labelled: Labelled images: (image uint8 ``(3, H, W)``, labels int64 ``(H, W)``) pairs of one size.
        folder: Folder in which the files are put, into a folder of their own; None takes the system's folder of
            temporary files. With ``shared`` all processes must see it.
        batch_size: Number of images encoded at once; also the block in which several processes share the work, so that
            their results are those of one process to the last bit.
        shared: True where all processes of ``torch.distributed`` make this call together. Each then encodes its part,
            and probes on what comes back must be called by all of them, too.
        keep: Whether the files stay when the store is closed.
        held_bytes: Greatest number of bytes that what a probe makes of the maps may take in memory; beyond that it is
            held in a file.

    Returns:
        The store, which is also a context manager that removes its files at the end.

    Raises:
        ValueError: If there is no image, an argument has another shape or dtype, features are not finite, or processes
            that share the work pass different images.
    """
    check_at_least(batch_size, 1, "batch_size")
    check_at_least(held_bytes, 0, "held_bytes")
    if len(labelled) == 0:
        raise ValueError("labelled: expected (image, labels) pairs, got none")
    if shared and place()[1] > 1 and not same_in_all(labelled[0], (len(labelled),)):
        raise ValueError("labelled: expected the same images in all processes with shared=True, got different ones")
    parent = None if folder is None else Path(folder)
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    rank, world = place() if shared else (0, 1)
    made = tempfile.mkdtemp(prefix="densessl-features-", dir=parent) if rank == 0 else ""
    own = Path(from_first(made) if shared else made)
    starts = range(rank * batch_size, len(labelled), world * batch_size)
    error, written = None, None
    try:
        written = _write(features, labelled, own, starts, batch_size)
    except Exception as caught:  # a process that left alone would keep the others waiting for ever
        error = caught
    told = from_all((written, error and str(error))) if shared else [(written, None)]
    elsewhere = [message for _, message in told if message is not None]
    if error is not None or elsewhere:
        if rank == 0:
            shutil.rmtree(own, ignore_errors=True)
        raise error or ValueError(f"another process: {elsewhere[0]}")
    forms = {form for form, _ in told if form is not None}  # of a process without an image there is none
    if len(forms) != 1:
        raise ValueError(f"labelled: expected images of one size for a store, got maps and labels of {sorted(forms)}")
    row, size, device = forms.pop()
    maps = Rows(own / "maps", row, torch.float32, len(labelled))
    answers = Rows(own / "labels", size, torch.int16, len(labelled))
    return StoredFeatures(own, maps, answers, torch.device(device), held_bytes, shared, keep)


def _write(
    features: Features, labelled: Sequence[tuple[Tensor, Tensor]], folder: Path, starts: range, batch_size: int
) -> tuple[tuple[int, ...], tuple[int, ...], str] | None:
    """Encodes the batches that begin at these images; the shapes of a map and of its labels, and the maps' device."""
    form = None
    for start in starts:
        images, labels = _stacked(labelled, start, min(start + batch_size, len(labelled)))
        encoded = encode(features, images)
        # Of a device its kind: each process has one of its own.
        now = (tuple(encoded.shape[1:]), tuple(labels.shape[1:]), encoded.device.type)
        if form is not None and now != form:
            raise ValueError(
                f"labelled: expected images of one size for a store, got maps of {form[0]} and then of {now[0]}"
            )
        form = now
        Rows(folder / "maps", now[0], torch.float32).write(start, encoded)
        Rows(folder / "labels", now[1], torch.int16).write(start, labels.clamp(_LEAST, _HIGHEST))
    return form


def _stacked(labelled: Sequence[tuple[Tensor, Tensor]], start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch, each pair read once."""
    images: list[Tensor] = []
    answers: list[Tensor] = []
    for index in range(start, stop):
        pair = labelled[index]
        check_is_pair(pair, f"labelled[{index}]")
        image, labels = pair
        check_pair(image, labels, f"labelled[{index}]")
        if image.ndim != 3 or (images and image.shape != images[0].shape):
            expected = "(3, H, W)" if not images else tuple(images[0].shape)
            raise ValueError(
                f"labelled[{index}]: expected images of one size for a store, {expected}, got {tuple(image.shape)}"
            )
        images.append(image)
        answers.append(labels)
    return torch.stack(images), torch.stack(answers)


def shared_features(features: Features, *, block: int = 4) -> Features:
    """The same features, computed by all processes of ``torch.distributed`` together.

    For functions on maps that do not share the work by themselves, such as ``position_share``. All processes must call
    the result with the same images; different ones are refused with a ValueError. One process alone computes the same
    numbers.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        block: Number of images encoded at once, by one process.

    Returns:
        A function of the same kind.
    """
    check_at_least(block, 1, "block")

    def encoded(images: Tensor) -> Tensor:
        rank, world = place()
        if world > 1 and not same_in_all((images,)):
            raise ValueError("images: expected the same in all processes that share the features, got different ones")
        parts = list(images.split(block))
        own = {at: features(parts[at]) for at in range(rank, len(parts), world)}
        device = next(iter(own.values())).device if own else None
        gathered: dict[int, Tensor] = {}
        for given in from_all({at: maps.cpu() for at, maps in own.items()} if world > 1 else own):
            gathered.update(given)
        maps = torch.cat([gathered[at] for at in range(len(parts))])
        return maps if device is None else maps.to(device)

    return encoded
