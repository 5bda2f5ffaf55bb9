"""Labels of a video's first frame carried through the others, scored as DAVIS scores them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from densessl._tensors import check_tensor
from densessl.evaluation._batches import Features, encode, iter_of
from densessl.evaluation._boundaries import boundary_accuracy, region_similarity
from densessl.evaluation._refuse import check_at_least
from densessl.evaluation._together import dealt, joined
from densessl.evaluation.label_propagation import propagate_labels

Video = tuple[Tensor, Tensor]


class VideoSettings(NamedTuple):
    """Settings of the propagation of labels through videos.

    Attributes:
        source: Where the settings come from.
        side: Shorter side that frames are resized to, in pixels; None leaves frames as they are.
        multiple: Number of pixels to a multiple of which the longer side is rounded down.
        neighbors: Number of cells that vote, over all frames of the context together.
        radius: How many rows and columns away a cell may at most be to vote; 0 lets all vote.
        frames: How many of the last frames are context besides the first one.
        temperature: Temperature of the weights.
    """

    source: str
    side: int | None = 480
    multiple: int = 64
    neighbors: int = 5
    radius: int = 12
    frames: int = 7
    temperature: float = 0.1


DAVIS = VideoSettings("Caron et al. 2021, DINO, eval_video_segmentation.py; scored as davis2017-evaluation")


class VideoScores(NamedTuple):
    """Means over all objects of all videos, each 0..1.

    Attributes:
        j_and_f: The mean of J and F.
        j: The region similarity J, the intersection over union.
        j_recall: Share of frames in which an object's J is above 0.5.
        j_decay: Mean J of the first quarter of the frames minus that of the last; it may be negative.
        f: The accuracy F of the boundaries.
        f_recall: Share of frames in which an object's F is above 0.5.
        f_decay: The same loss over time of F; it may be negative.
        objects: ``(objects, 2)``, J and F of each object, in the order of the videos.
    """

    j_and_f: float
    j: float
    j_recall: float
    j_decay: float
    f: float
    f_recall: float
    f_decay: float
    objects: Tensor


@torch.no_grad()
def video_segmentation(
    features: Features, videos: Iterable[Video], protocol: VideoSettings = DAVIS, *, batch_size: int = 8
) -> VideoScores:
    """Carries the objects of each video's first frame through it and scores the masks.

    An object is one that the first frame shows. The first and the last frame are not scored, and 255 is background, as
    the toolkit of DAVIS 2017 has it. In several processes (``torch.distributed``) the work is shared: pass the same
    videos in all, or each its own share. All return the scores of all videos.

    Args:
        features: Function from images, uint8 ``(B, 3, H, W)``, to feature maps ``(B, C, h, w)`` on any device.
        videos: The videos, of at least 3 frames each: (frames uint8 ``(T, 3, H, W)``, masks int64 ``(T, H, W)``); 0 is
            background, objects are 1, 2, ...
        protocol: DAVIS or settings of your own.
        batch_size: Number of frames encoded at once.

    Returns:
        J, F, their recall and their decay.

    Raises:
        ValueError: If the protocol is unknown, an argument has another shape or dtype, features are not finite, or no
            video shows an object in its first frame.
        ImportError: If SciPy is missing: ``pip install 'densessl[evaluation]'``.
    """
    if not isinstance(protocol, VideoSettings):
        raise ValueError(f"protocol: expected DAVIS or a VideoSettings, got {protocol!r}")
    check_at_least(batch_size, 1, "batch_size")
    parts = []
    for index, video in enumerate(iter_of(dealt(videos))):
        frames, masks = _checked(video, f"videos[{index}]")
        truth = masks.cpu().masked_fill(masks.cpu() == 255, 0)
        objects = int(truth[0].max())
        predicted = _carried(features, frames, truth[0], objects, protocol, batch_size) if objects else truth
        rows = torch.empty(objects, 6, dtype=torch.float64)
        for number in range(objects):
            ours, theirs = predicted[1:-1] == number + 1, truth[1:-1] == number + 1
            j, f = region_similarity(ours, theirs), boundary_accuracy(ours, theirs)
            rows[number] = torch.tensor([*_statistics(j), *_statistics(f)])
        parts.append(rows)
    found = joined(parts)
    if not sum(len(rows) for rows in found):
        raise ValueError("videos: expected at least one object in a first frame, got none")
    rows = torch.cat(found)
    j, j_recall, j_decay, f, f_recall, f_decay = rows.mean(0).tolist()
    return VideoScores((j + f) / 2, j, j_recall, j_decay, f, f_recall, f_decay, rows[:, [0, 3]])


def _checked(video: Video, name: str) -> Video:
    if not isinstance(video, (tuple, list)) or len(video) != 2:
        raise ValueError(f"{name}: expected (frames, masks), got {type(video).__name__}")
    frames, masks = video
    check_tensor(frames, name, "frames uint8 (T, 3, H, W)")
    check_tensor(masks, name, "masks int64 (T, H, W)")
    if frames.ndim != 4 or frames.dtype != torch.uint8 or frames.shape[1] != 3 or len(frames) < 3:
        raise ValueError(
            f"{name}: expected frames uint8 (T, 3, H, W) with T of at least 3, got {frames.dtype} {tuple(frames.shape)}"
        )
    size = (len(frames), *frames.shape[2:])
    if masks.dtype != torch.int64 or tuple(masks.shape) != size:
        raise ValueError(f"{name}: expected masks int64 (T, H, W) = {size}, got {masks.dtype} {tuple(masks.shape)}")
    if int(masks.min()) < 0 or int(masks.max()) > 255:
        raise ValueError(f"{name}: expected masks of 0..255, got {int(masks.min())}..{int(masks.max())}")
    return frames, masks


def _carried(
    features: Features, frames: Tensor, first: Tensor, objects: int, protocol: VideoSettings, batch_size: int
) -> Tensor:
    """Objects of all frames, int64 (T, H, W), the first as it was given."""
    size = _input_size(frames, protocol)
    parts = [encode(features, _resized(part, size)) for part in frames.split(batch_size)]
    maps = torch.cat(parts)
    h, w = maps.shape[2:]
    small = F.interpolate(first[None, None].double(), (h, w), mode="nearest-exact")[0, 0].long()
    one_hot = F.one_hot(small, objects + 1).movedim(-1, 0).to(maps.device, maps.dtype)
    shares = propagate_labels(
        maps,
        one_hot,
        neighbors=protocol.neighbors,
        radius=protocol.radius,
        frames=protocol.frames,
        temperature=protocol.temperature,
    )
    predicted = torch.empty(len(frames), *first.shape, dtype=torch.int64)
    predicted[0] = first
    for time, share in enumerate(shares):  # one at a time: shares at full size are large
        full = F.interpolate(share[None], size, mode="bilinear", align_corners=False)[0]
        answer = _stretched(full).argmax(0)
        predicted[time + 1] = F.interpolate(answer[None, None].double(), first.shape, mode="nearest-exact")[0, 0].long()
    return predicted


def _input_size(frames: Tensor, protocol: VideoSettings) -> tuple[int, int]:
    """Height and width that the frames are encoded at."""
    height, width = frames.shape[2:]
    if protocol.side is None:
        return height, width
    shorter, longer = min(height, width), max(height, width)
    rounded = int(protocol.side * longer / shorter // protocol.multiple) * protocol.multiple
    return (rounded, protocol.side) if height > width else (protocol.side, rounded)


def _resized(frames: Tensor, size: tuple[int, int]) -> Tensor:
    # Without antialiasing, as OpenCV's resize has it, which the published code calls.
    return frames if tuple(frames.shape[2:]) == size else V.resize(frames, list(size), antialias=False)


def _stretched(shares: Tensor) -> Tensor:
    """Shares (K, H, W), each class from 0 to 1 over the frame; a class that the frame lacks stays 0."""
    low = shares.amin((1, 2), keepdim=True)
    high = (shares - low).amax((1, 2), keepdim=True)
    stretched = (shares - low) / torch.where(high > 0, high, 1.0)
    return torch.where(shares.amax((1, 2), keepdim=True) > 0, stretched, shares)


def _statistics(frames: Tensor) -> tuple[float, float, float]:
    """Mean, share above one half, and mean of the first quarter minus mean of the last; quarters share their ends."""
    edges = (torch.linspace(1, len(frames), 5, dtype=torch.float64) + 1e-10).round().long() - 1
    first, last = frames[edges[0] : edges[1] + 1], frames[edges[3] : edges[4] + 1]
    return float(frames.mean()), float((frames > 0.5).double().mean()), float(first.mean() - last.mean())
