"""Sums and rows over the processes of torch.distributed, each of which works on its own share of the images.

Processes either pass different images, each its share, or all the same, which are then dealt out. The order of all
images takes one of each process in turn, as ``data[rank::processes]`` deals them out. Without a process group
everything here gives back what it got.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from densessl.evaluation._processes import from_all, place

__all__ = ["Share", "dealt", "in_batches", "in_turn", "joined", "order", "processes", "rank", "same_in_all", "summed"]

_T = TypeVar("_T")
_Told = TypeVar("_Told")


def processes() -> int:
    """How many processes share the work."""
    return place()[1]


def rank() -> int:
    """The number of this process."""
    return place()[0]


class Share:
    """Every so manieth item of a sequence, which reads no other."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items, self._places = items, range(rank(), len(items), processes())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Any:
        return self._items[self._places[index]]

    def __iter__(self) -> Iterator[Any]:
        return (self._items[place] for place in self._places)


def dealt(items: Iterable[Any]) -> Iterable[Any]:
    """The items themselves, or this process's share of them if all processes pass the same items.

    Items are tuples of tensors and numbers. Sets of one length whose first items are equal are taken for the same.
    """
    if processes() == 1:
        return items
    if isinstance(items, Iterator):
        first = list(islice(items, 1))
        every = chain(first, items)
        return islice(every, rank(), None, processes()) if same_in_all(*first) else every
    if hasattr(items, "__getitem__") and hasattr(items, "__len__"):
        sequence = cast(Sequence[Any], items)
        first = [sequence[0]] if len(sequence) else []
        return Share(sequence) if same_in_all(*first, (len(sequence),)) else sequence
    first = list(islice(iter(items), 1))
    return islice(iter(items), rank(), None, processes()) if same_in_all(*first) else items


def in_turn(items: Iterable[_T], told: Callable[[_T], _Told], ahead: int) -> Iterator[tuple[_Told, _T | None]]:
    """What is told of each item of all processes, in the order of all; with the item, where this process holds it.

    Args:
        items: The items of this process.
        told: What the other processes learn of an item.
        ahead: Number of items of each process that are held at once, the same in all processes.
    """
    own = iter(items)
    while True:
        held = list(islice(own, ahead))
        every = from_all([told(item) for item in held])
        if not any(every):
            return
        for turn in range(max(map(len, every))):
            for process, facts in enumerate(every):
                if turn < len(facts):
                    yield facts[turn], held[turn] if process == rank() else None


def in_batches(items: Iterable[_T], size: Callable[[_T], Any], count: int) -> Iterator[list[_T]]:
    """In order, as many items at once as are of one size, and at most ``count``."""
    batch: list[_T] = []
    for item in items:
        if batch and (len(batch) == count or size(batch[-1]) != size(item)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def same_in_all(*items: Iterable[Any]) -> bool:
    """Whether all processes pass the same items, tuples of tensors and numbers."""
    made = hashlib.sha1()
    for part in chain.from_iterable(items):
        made.update(part.cpu().contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    told = [""] * processes()
    dist.all_gather_object(told, made.hexdigest())
    return len(set(told)) == 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, of one shape in all of them."""
    if processes() == 1:
        return values
    total = values.to(_device()).contiguous()
    if total.data_ptr() == values.data_ptr():
        total = total.clone()
    dist.all_reduce(total)
    return total.to(values.device)


def order(images: int) -> list[tuple[int, int]]:
    """Process and place of every image of all processes, in the order of all images.

    Args:
        images: Number of images that this process holds.
    """
    counts = torch.zeros(processes(), dtype=torch.int64)
    counts[rank()] = images
    held = summed(counts).tolist()
    places = ((process, place) for process, count in enumerate(held) for place in range(count))
    return sorted(places, key=lambda at: at[::-1])


def joined(parts: list[Tensor]) -> list[Tensor]:
    """The parts of all processes, one for each image, in the order of all images; parts may differ in length."""
    if processes() == 1:
        return parts
    like = parts[0] if parts else None
    own = (None if like is None else (like.shape[1:], like.dtype, like.device.type), [len(part) for part in parts])
    told: list[tuple] = [own] * processes()
    dist.all_gather_object(told, own)
    form = next((form for form, _ in told if form is not None), None)
    if form is None:
        return []
    shape, dtype, _ = form
    home = torch.device("cpu") if like is None else like.device
    row = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    # As bytes, since gloo does not exchange every dtype.
    mine = torch.zeros(max(sum(lengths) for _, lengths in told) * row, dtype=torch.uint8, device=_device())
    if like is not None:
        own_bytes = torch.cat(parts).reshape(-1).view(torch.uint8)
        mine[: len(own_bytes)] = own_bytes.to(mine.device)
    gathered = [torch.empty_like(mine) for _ in told]
    dist.all_gather(gathered, mine)
    split = [
        data[: sum(lengths) * row].to(home).view(dtype).reshape(-1, *shape).split(lengths)
        for data, (_, lengths) in zip(gathered, told, strict=True)
    ]
    return [split[process][place] for process, place in order(len(parts))]


def _device() -> torch.device:
    """Where the processes exchange tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
