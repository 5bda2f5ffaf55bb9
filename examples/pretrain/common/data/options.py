"""The command line's ``data`` options, turned into the parts of a data module."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from densessl import (
    MultiView,
    View,
    byol_photometric,
    byol_views,
    mocov2_photometric,
    mocov2_views,
    multichannel_photometric,
    multichannel_views,
    multicrop_photometric,
    multicrop_views,
    simclr_photometric,
    simclr_views,
)
from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from examples.pretrain.common.data.datamodule import DeviceViews, PhotoViews
from examples.pretrain.common.data.frames import FrameSource
from examples.pretrain.common.data.segments import Felzenszwalb, Grid, NoData
from examples.pretrain.common.data.sources import source_of
from examples.pretrain.common.data.views import DrawViews, MaskOf

# The two halves of each pipeline: per image on the CPU, per batch on the device.
PRESETS = {
    "byol": (byol_views, byol_photometric),
    "mocov2": (mocov2_views, mocov2_photometric),
    "simclr": (simclr_views, simclr_photometric),
    "multichannel": (multichannel_views, multichannel_photometric),  # ours; any number of channels
}


class QuarterTurn(v2.Transform):
    """Turns by 0, 90, 180 or 270 degrees: for images without an up, as aerial and microscopic ones."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"angle": 90.0 * int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.rotate, inpt, params["angle"], expand=True)


class Normalized:
    """Only normalises a batch of views on its device; stands in for a photometric step.

    Args:
        mean: One number per channel, for images in 0..1.
        std: One number per channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, view: View, *, seed: int) -> View:
        x: Tensor = view.image.float() / 255 if view.image.dtype == torch.uint8 else view.image
        return view._replace(image=(x - self.mean.to(x.device)) / self.std.to(x.device))


def photo_views(
    folder: str,
    size: int = 224,
    batch_size: int = 1024,
    workers: int | None = None,
    scale: tuple[float, float] = (0.08, 1.0),
    preset: Literal["byol", "mocov2", "simclr", "multichannel", "multicrop"] = "byol",
    photometric: Literal["device", "cpu", "none"] = "device",
    vertical_flip: bool = False,
    quarter_turns: bool = False,
    channels: int = 3,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    redraws: int = 0,
    max_unreadable: float = 0.01,
    images: int | None = None,
    segments: Literal["none", "grid", "felzenszwalb"] = "none",
    grid: int = 5,
    segment_scale: int = 1000,
    nodata: float | None = None,
    flow: str | None = None,
    occluded: str | None = None,
    reduced: bool = True,
    small: int = 0,
    small_size: int = 96,
    small_scale: tuple[float, float] = (0.05, 0.4),
    seed: int = 0,
) -> PhotoViews:
    """Views of every photo of a folder, or of tar shards.

    Args:
        folder: Folder of photos, sub-folders included; or tar shards: ``shards/{000..099}.tar``, a URL, or ``pipe:``
            and a command that writes one.
        size: Side of the views in pixels.
        batch_size: Images of a step over all processes, before gradient accumulation.
        workers: Number of reading processes per GPU. None: 8, or as many as there are cores where those are fewer.
        scale: Smallest and largest share of the image's area that a crop covers.
        preset: Whose colours and blur: ``byol`` as PixPro, ``mocov2`` as DenseCL, ``simclr``; ``multichannel`` is ours,
            for images other than colour; ``multicrop`` as DINO, whose small views ``small`` adds.
        photometric: Where colours and blur are changed: ``device``, on the GPU through kornia; ``cpu``, in the workers;
            ``none``, nowhere.
        vertical_flip: Also flip views upside down.
        quarter_turns: Also turn views by multiples of 90 degrees.
        channels: Number of channels of the images. The published photometric steps take 3 (colour), those of
            ``multichannel`` any number.
        mean: Mean of each channel, for images in 0..1.
        std: Standard deviation of each channel.
        redraws: How often to draw views again that share no cell; for elongated images, where that is common.
        max_unreadable: Share of unreadable files, 0..1, above which the run stops.
        images: Number of images in all shards; a folder is counted.
        segments: What each image is divided into, for methods that compare regions. The views then come with a mask of
            segment ids.
        grid: Number of rectangles along each side of the grid.
        segment_scale: Scale of Felzenszwalb's segments and least number of pixels of one, in the image as it is read.
        nodata: Value of pixels without data, in all channels: 0 to 255, and 0 to 1 from 16 bits. Cells of which less
            than half is data then neither match nor count.
        flow: Folder of optical flow, ``.flo``, ``.npy`` or KITTI's PNG, for pairs of frames: the first view is of the
            frame after, the second of the frame of the flow's name, with positions in the one after. ``folder`` then
            holds the frames, a sub-folder a scene.
        occluded: Folder of masks with the names of the frames, not 0 where a pixel is hidden in the frame after.
        reduced: Decode JPEGs whose shorter side is at least four times the views' at a half, a quarter or an eighth,
            as the drawn crops allow; coords stay the file's. False decodes all pixels, which takes about twice as long
            for 12 million of them and leaves views that are sharper by some percent.
        small: Number of small views beside the two of an image; with the preset ``multicrop``.
        small_size: Side of the small views in pixels.
        small_scale: Smallest and largest share of the image's area that a small crop covers.
        seed: Seed of everything that is drawn.

    Raises:
        ValueError: If options contradict each other.
    """
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"data.mean, data.std: expected {channels} numbers, as data.channels, got {mean}, {std}")
    if photometric != "none" and channels != 3 and preset != "multichannel":
        raise ValueError(
            f"data.channels: expected 3 for the colour jitter of data.preset={preset}, got {channels}; set "
            "data.preset to multichannel, or data.photometric to none"
        )
    if flow is None and occluded is not None:
        raise ValueError(f"data.occluded: expected data.flow with it, got {occluded} alone")
    if flow is not None and segments != "none":
        raise ValueError(
            f"data.segments: expected none with data.flow, got {segments}: a frame's are not the next one's"
        )
    if small and (preset != "multicrop" or flow is not None):
        other = f"data.preset={preset}" if flow is None else "data.flow"
        raise ValueError(f"data.small: expected 0 with {other}, got {small}; small views are those of multicrop alone")
    whole, on_device = _halves(preset, small, small_size, small_scale)
    turns = [*([v2.RandomVerticalFlip()] if vertical_flip else []), *([QuarterTurn()] if quarter_turns else [])]
    views = whole(size, photometric=photometric == "cpu", scale=scale, mean=mean, std=std, extra=turns)
    mask_of = _mask_of(segments, grid, segment_scale, nodata)
    draw = DrawViews(views, seed=seed, redraws=redraws, size=size, mask_of=mask_of, reduced=reduced)
    steps = {"device": lambda: on_device(mean=mean, std=std), "cpu": lambda: None}
    steps["none"] = lambda: [Normalized(mean, std)] * len(views.transforms)
    return PhotoViews(
        source_of(folder, images) if flow is None else FrameSource(folder, flow, occluded),
        draw,
        steps[photometric](),
        batch_size=batch_size,
        workers=min(8, cores()) if workers is None else workers,
        channels=channels,
        max_unreadable=max_unreadable,
    )


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _halves(
    preset: str, small: int, small_size: int, small_scale: tuple[float, float]
) -> tuple[Callable[..., MultiView], Callable[..., Sequence[DeviceViews]]]:
    if preset != "multicrop":
        return PRESETS[preset]
    views = partial(multicrop_views, small_size=small_size, small=small, small_scale=small_scale)
    return views, partial(multicrop_photometric, small)


def _mask_of(segments: str, grid: int, segment_scale: int, nodata: float | None) -> MaskOf | None:
    makers = {"none": lambda: None, "grid": lambda: Grid(grid), "felzenszwalb": lambda: Felzenszwalb(segment_scale)}
    mask_of = makers[segments]()
    return mask_of if nodata is None else NoData(nodata, mask_of)
