"""Data sets by the words of the command line, ``KIND:FOLDER``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from densessl.evaluation.data import (
    ade20k,
    camvid,
    cityscapes,
    coco_stuff,
    davis,
    own_masks,
    photos,
    spair,
    voc,
)


class Source(NamedTuple):
    """A data set of the command line.

    Attributes:
        kind: Kind of its samples: "labelled", "photos", "videos" or "pairs".
        fit: Name of the split that probes learn from or remember; empty where there is none.
        test: Name of the split that is scored.
        open: Makes the data set from a folder and the name of a split.
    """

    kind: str
    fit: str
    test: str
    open: Callable[[str, str], Any]


SOURCES = {
    "voc": Source("labelled", "trainaug", "val", voc),
    "ade20k": Source("labelled", "training", "validation", ade20k),
    "cityscapes": Source("labelled", "train", "val", cityscapes),
    "cocostuff171": Source("labelled", "train2017", "val2017", coco_stuff),
    "cocostuff27": Source("labelled", "train2017", "val2017", lambda root, split: coco_stuff(root, split, classes=27)),
    "camvid": Source("labelled", "train", "test", camvid),
    "own": Source("labelled", "train", "test", own_masks),
    "photos": Source("photos", "", "", lambda root, split: photos(root)),
    "davis": Source("videos", "", "val", davis),
    "spair": Source("pairs", "", "test", spair),
}


def parse_source(word: str) -> tuple[str, Source, str]:
    """Name, source and folder of ``KIND:FOLDER``.

    Raises:
        ValueError: If the word has another form, or its kind is unknown.
    """
    name, colon, folder = word.partition(":")
    if not colon or not folder or name not in SOURCES:
        raise ValueError(f"--data: expected KIND:FOLDER with KIND one of {', '.join(SOURCES)}, got {word!r}")
    return name, SOURCES[name], folder


class Part(Dataset):
    """Some samples of a data set, in order.

    Args:
        data: All samples of the data set.
        chosen: Numbers of the samples that stay.
    """

    def __init__(self, data: Any, chosen: Sequence[int]) -> None:
        self.data, self.chosen = data, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Any:
        return self.data[self.chosen[index]]  # which raises IndexError behind the last


def limited(data: Any, limit: int | None) -> Any:
    """At most so many samples, spread evenly over all."""
    if limit is None or limit >= len(data):
        return data
    return Part(data, [index * len(data) // limit for index in range(limit)])


class ImagesAlone(Dataset):
    """The images of a labelled set or of photos, all at one size.

    Args:
        data: Images, or pairs of an image and its labels.
        size: Height and width of the images, in pixels.
    """

    def __init__(self, data: Any, size: tuple[int, int]) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        sample = self.data[index]
        image = sample if isinstance(sample, Tensor) else sample[0]
        return resize(image, list(self.size), antialias=True)
