"""From a decoded image to two views, and small ones beside them.

Every draw is a function of (seed, epoch, sample index, view): the number of workers and processes changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from densessl import DistanceMatcher, MaskedView, MultiView, View
from examples.pretrain.common.data.decode import decode_photo, shown
from examples.pretrain.common.data.depths import alike
from examples.pretrain.common.data.reduced import FilePixels, large_jpeg, shrinking, step_for
from examples.pretrain.common.data.seeds import seed_of
from examples.pretrain.common.step import valid_cells

log = logging.getLogger(__name__)

LARGE = 4  # times the side of the views: from here on a JPEG need not be decoded whole
# A decoded image (C, H, W) to a map (H, W), uint8 or int64, that moves with the views: what lies where, 0 for nothing.
MaskOf = Callable[[Tensor], Tensor]


class Batch(NamedTuple):
    """Batches of views, and what happened while they were read.

    Attributes:
        view1: The first views, of B images; with a mask where the loader makes one.
        view2: The second views, of the same images.
        unreadable: Number of files that could not be read before each image could, int64 ``(B,)``.
        enlarged: Which images are smaller than the views, bool ``(B,)``.
        small: Further views of the same images, of a smaller size; none in most recipes.
    """

    view1: View | MaskedView
    view2: View | MaskedView
    unreadable: Tensor
    enlarged: Tensor
    small: Sequence[View | MaskedView] = ()

    @property
    def views(self) -> list[View | MaskedView]:
        """All views, the two large ones first."""
        return [self.view1, self.view2, *self.small]

    def with_views(self, views: Sequence[View | MaskedView]) -> Batch:
        """The same with other views."""
        return self._replace(view1=views[0], view2=views[1], small=tuple(views[2:]))


class DrawViews:
    """Views of an image, drawn from the seed and the numbers that stand for the image in its epoch.

    Args:
        views: Two pipelines, one for each view; and one for each small view.
        seed: Seed of everything that is drawn.
        redraws: How often to draw again where the first two views share no cell, or none with data; for elongated
            images, where that is common.
        size: Side of the views in pixels, to know which images are smaller.
        mask_of: Gives each image a mask, so that its views are ``MaskedView``; a function of the image alone. None: no
            masks.
        reduced: Whether large JPEGs may be decoded at a fraction of their size, see reduced.py.
    """

    def __init__(
        self,
        views: MultiView,
        *,
        seed: int,
        redraws: int,
        size: int,
        mask_of: MaskOf | None = None,
        reduced: bool = True,
    ) -> None:
        self.views, self.seed, self.redraws, self.size, self.mask_of = views, seed, redraws, size, mask_of
        firsts = [next(iter(getattr(transform, "transforms", ())), None) for transform in views.transforms]
        is_crop = reduced and mask_of is None and all(type(first) is v2.RandomResizedCrop for first in firsts)
        self._crops = MultiView(*firsts) if is_crop else None
        self._overlap = DistanceMatcher(0.7)
        self._named: set[str] = set()

    def __call__(self, image: Tensor, name: str, *numbers: int, unreadable: int = 0) -> Batch:
        mask = self._mask(image)

        def draw(seeds: list[int]) -> list[Any]:
            return self.views(image, mask, seeds=seeds)

        return self._drawn(draw, image, name, *numbers, unreadable=unreadable)

    def decoded(self, data: Tensor, name: str, channels: int, *numbers: int) -> Tensor:
        """The image of a file, to be drawn from with the same numbers.

        Args:
            data: The file's bytes, uint8.
            name: Name of the file, for errors.
            channels: Number of channels wanted.
            *numbers: What stands for the image in the seeds.

        Returns:
            As of ``decode_photo``; of a large JPEG ``FilePixels``, with the pixels that these crops need.

        Raises:
            RuntimeError: If the file cannot be read rightly; the message names it.
        """
        photo = large_jpeg(data, channels, LARGE * self.size) if self._crops is not None else None
        if photo is None:
            return decode_photo(data, name, channels)
        crops, outline = self._crops, FilePixels.of(photo.size, channels)
        views = self._attempted(lambda seeds: crops(outline, seeds=seeds), *numbers)
        try:
            photo.decode(step_for([shrinking(view, photo.size) for view in views]))
        except Exception as error:  # the codecs raise whatever they do
            raise RuntimeError(f"{shown(name)} cannot be read: {error}") from error
        return FilePixels.of(photo.size, channels, photo)

    def of_pair(
        self, source: Tensor, frame: Tensor, coords: Tensor, name: str, *numbers: int, unreadable: int = 0
    ) -> Batch:
        """One view of each of two frames; both hold positions in the source.

        Args:
            source: Frame A, ``(C, H, W)``.
            frame: Frame B, ``(C, H', W')``.
            coords: Where the pixels of frame B lie in frame A, dense ``(2, H', W')`` or ``(3, 3)``.
            name: What stands for the pair in the log.
            *numbers: What stands for the pair in the seeds.
            unreadable: Number of pairs that could not be read before this one.
        """
        first, second = (MultiView(transform) for transform in self.views.transforms)
        masks, size = [self._mask(image) for image in (source, frame)], source.shape[-2:]

        def draw(seeds: list[int]) -> list[Any]:
            of_frame = second(frame, masks[1], coords, seeds[1:], source_size=size)
            return [*first(source, masks[0], seeds=seeds[:1]), *of_frame]

        return self._drawn(draw, source, name, *numbers, unreadable=unreadable)

    def _mask(self, image: Tensor) -> Tensor | None:
        return None if self.mask_of is None else self.mask_of(image)

    def _drawn(
        self, draw: Callable[[list[int]], list[Any]], image: Tensor, name: str, *numbers: int, unreadable: int
    ) -> Batch:
        height, width = image.shape[-2:]
        enlarged = min(height, width) < self.size
        if enlarged:
            self.name_once(name, f"is smaller than the views ({width}x{height}): enlarged")
        views = self._attempted(draw, *numbers)
        return Batch(*views[:2], torch.tensor(unreadable), torch.tensor(enlarged), tuple(views[2:]))

    def _attempted(self, draw: Callable[[list[int]], list[Any]], *numbers: int) -> list[Any]:
        """Draws until the views share a cell, or there are no redraws left."""
        for attempt in range(self.redraws + 1):
            views = draw([seed_of(self.seed, *numbers, view, attempt) for view in range(len(self.views.transforms))])
            if attempt == self.redraws or self.share_cells(*views[:2]):
                break
        return views

    def share_cells(self, view1: View | MaskedView, view2: View | MaskedView) -> bool:
        """Whether any cell of one view matches one of the other."""
        size = (7, 7)
        one, other = (type(view)(*(part[None] for part in view)) for view in (view1, view2))
        valid = {"valid_q": valid_cells(one, size), "valid_k": valid_cells(other, size)}
        return bool(self._overlap(one.coords, other.coords, size, **valid).any())

    def name_once(self, name: str, what: str) -> None:
        """Logs what befell an image, the first time."""
        if name not in self._named:
            self._named.add(name)
            log.warning("%s: %s", shown(name), what)


def collate(samples: list[Batch]) -> Batch:
    """Makes a batch of single images; 8 bits beside 16 become floating point in 0..1, as those are."""
    views = [sample.views for sample in samples]
    for number in range(len(views[0])):
        for each, image in zip(views, alike([each[number].image for each in views]), strict=True):
            each[number] = each[number]._replace(image=image)
    return default_collate([sample.with_views(each) for sample, each in zip(samples, views, strict=True)])
