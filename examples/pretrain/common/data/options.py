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
        folder: Folder of photos, which are found in its sub-folders too; or a text file with the path of a photo a
            line; or tar shards, as ``shards/{000..099}.tar``, a URL, or ``pipe:`` and a command that writes one.
        size: Side of the square views in pixels, at least 1.
        batch_size: Number of images in a batch, summed over all GPUs; a multiple of their number. A step of the
            optimiser takes one batch, or as many as ``trainer.accumulate_grad_batches`` says.
        workers: Number of processes that read images, for each GPU. 0 reads in the training's own process. By default
            8, or as many as there are cores if those are fewer.
        scale: Smallest and largest share of an image's area that a crop covers, above 0 and at most 1.
        preset: How colours and blur are changed: ``byol`` as in BYOL and PixPro, ``mocov2`` as in MoCo v2 and DenseCL,
            ``simclr`` as in SimCLR, and ``multicrop`` as in DINO. ``multichannel`` is ours, for images of any number of
            channels.
        photometric: Where colours and blur are changed: ``device`` changes them on the GPU with kornia, ``cpu`` in the
            processes that read, and ``none`` leaves them as they are.
        vertical_flip: Whether a view is also flipped upside down, with probability 0.5; for images without an up.
        quarter_turns: Whether a view is also turned by 0, 90, 180 or 270 degrees, each as likely; for images without an
            up.
        channels: Number of channels of the images, at least 1. If it is not 3, ``preset`` must be ``multichannel`` or
            ``photometric`` be ``none``, and ``mean`` and ``std`` need as many numbers.
        mean: Mean of each channel, for pixels in 0..1, which is subtracted. The default is that of ImageNet, with which
            most pretrained weights were trained.
        std: Standard deviation of each channel, above 0, by which the pixels are then divided. The default is that of
            ImageNet.
        redraws: Largest number of times that the two views of an image are drawn again because they have no cell in
            common, at least 0. With 0, as in the published code, such views are kept. Take 5 for elongated images,
            whose views often have no cell in common.
        max_unreadable: Share of the files, in 0..1, that may be unreadable. Another image takes the place of each; the
            run stops if there are more.
        images: Number of images in all tar shards together, which tells how many steps an epoch has. Shards need it;
            the images of a folder are counted.
        segments: What each image is divided into, for methods that compare regions: ``grid`` are equal rectangles,
            ``felzenszwalb`` segments of similar colour, and ``none`` leaves it whole.
        grid: Number of rectangles along each side of an image, in 1..15, if ``segments`` is ``grid``.
        segment_scale: Least number of pixels of a segment, and at the same time the scale of Felzenszwalb's algorithm:
            larger values give larger segments. At least 1; used if ``segments`` is ``felzenszwalb``.
        nodata: Value that a pixel without data has in all channels: 0 to 255 in images of 8 bits, 0 to 1 in images of
            16 bits. A cell with data in less than half of its area then matches nothing. By default every pixel has
            data.
        flow: Folder of optical flow in pixels, as ``.flo``, ``.npy`` or PNG files in the format of KITTI. The file with
            a frame's name says where the pixels of this frame are in the next one. ``folder`` then holds the frames,
            with a sub-folder for each scene. The first view is of the next frame, the second of this one.
        occluded: Folder of masks with the names of the frames. A mask is 0 where a pixel is visible in the next frame,
            and another number where it is hidden. By default all that ``flow`` covers counts as visible.
        reduced: Whether large JPEGs are decoded at a half, a quarter or an eighth of their size where the drawn crops
            need no more; only those whose shorter side is at least four times that of the views. False decodes every
            pixel, which takes about twice as long at 12 million pixels, and gives views that are sharper by some
            percent.
        small: Number of small views of an image, beside its two large ones; at least 0, and 0 unless ``preset`` is
            ``multicrop``.
        small_size: Side of the small views in pixels, at least 1.
        small_scale: Smallest and largest share of an image's area that a small view covers, above 0 and at most 1.
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
