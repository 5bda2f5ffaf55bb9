"""Views of pairs of frames: where frame B's pixels lie in frame A is known from optical flow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from densessl import coords_from_flow
from examples.pretrain.common.data.decode import read_photo, reason, shown
from examples.pretrain.common.data.depths import alike
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.fingerprint import fingerprint
from examples.pretrain.common.data.flow import FLOW_SUFFIXES, read_flow
from examples.pretrain.common.data.loader import ResumableLoader
from examples.pretrain.common.data.names import Names
from examples.pretrain.common.data.views import Batch, DrawViews


class Pair(NamedTuple):
    """The files of two frames.

    Attributes:
        source: Frame A, the one after; positions are counted in it.
        frame: Frame B.
        flow: File of the flow from frame B's pixels to where they are in frame A.
        occluded: Not 0 where a pixel of frame B is hidden in frame A; None: only the flow says what is not known.
    """

    source: Path
    frame: Path
    flow: Path
    occluded: Path | None


class FramePairs(Dataset):
    """Views of pairs of frames, addressed by (epoch, index); the first view is of frame A, the second of frame B.

    Args:
        pairs: The files of each pair.
        draw: Draws the two views.
        channels: Number of channels of the frames.
    """

    def __init__(self, pairs: Sequence[Pair], draw: DrawViews, *, channels: int) -> None:
        self.pairs, self.draw, self.channels = pairs, draw, channels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        for unreadable in range(len(self.pairs)):
            pair = self.pairs[(index + unreadable) % len(self.pairs)]
            try:
                source, frame, coords = self._read(pair)
            except ImportError:
                raise  # a missing package is no unreadable frame
            except (RuntimeError, OSError) as error:
                self.draw.name_once(
                    str(pair.frame), f"unreadable, another takes its place: {reason(error, pair.frame)}"
                )
                continue
            return self.draw.of_pair(
                source, frame, coords, str(self.pairs[index].frame), epoch, index, unreadable=unreadable
            )
        raise ValueError(f"data.folder: expected frames with flow, got {len(self.pairs)} pairs, none of which is whole")

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """Frame A, frame B, and the coords of B's pixels in A."""
        # Not turned as an EXIF entry may say: the flow is that of the stored pixels.
        source, frame = alike([read_photo(path, self.channels, turn=False) for path in (pair.source, pair.frame)])
        flow, visible = read_flow(pair.flow), None
        if pair.occluded is not None:
            visible = read_photo(pair.occluded, 1, turn=False)[0] == 0
        for path, found in ((pair.flow, flow), (pair.occluded, visible)):
            if found is not None and found.shape[-2:] != frame.shape[1:]:
                raise RuntimeError(
                    f"{path} is of another size, {tuple(found.shape[-2:])}, than its frame, {tuple(frame.shape[1:])}"
                )
        return source, frame, coords_from_flow(flow, visible, source.shape[1:])[0]


class FrameSource:
    """Pairs of frames, each frame with the next one of its folder.

    Args:
        folder: Folder of frames, a sub-folder a scene; their order is that of the numbers in their names.
        flow: Folder of flow files with the same sub-folders and names but for the suffix; each leads from the frame of
            its name to the next one. It may be ``folder`` itself, but for PNG files.
        occluded: Folder of masks with the same names, not 0 where the frame's pixels are hidden in the next one; None:
            there are none.
    """

    def __init__(self, folder: str, flow: str, occluded: str | None = None) -> None:
        self.folder, self.flow, self.occluded = folder, flow, occluded
        self._found: list[Pair] | None = None

    def hold_out(self, images: int | None) -> None:
        """Holds nothing out: frames of one scene are too much alike to be kept apart.

        Raises:
            ValueError: If a number of images is asked for.
        """
        if images:
            raise ValueError(
                f"probe.images: pairs of frames hold no images out, got {images}; probe.photos names other photos"
            )

    def held_out(self) -> list[Path]:
        """None."""
        return []

    def count(self, processes: int, workers: int) -> int:
        """Number of pairs, of which every process needs one.

        Raises:
            ValueError: If there are fewer, a folder is missing, or frames are missing to a flow.
        """
        found = len(self._pairs())
        if found < processes:
            raise ValueError(
                f"data.flow: expected a flow for each of {processes} processes, found {found} in {self.flow}"
            )
        return found

    def fingerprint(self) -> str:
        """What tells these frames from others, wherever their folder lies: their names, and the bytes of a few."""
        names = (str(pair.frame.relative_to(self.folder)) for pair in self._pairs())
        return fingerprint(Names.of(self.folder, names))

    def loader(
        self,
        draw: DrawViews,
        channels: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        workers: int,
        batches: int | None = None,
    ) -> ResumableLoader:
        """The loader of one process. The arguments are those of FolderSource's."""
        return ResumableLoader(
            FramePairs(self._pairs(), draw, channels=channels),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=draw.seed,
            workers=workers,
            batches=batches,
        )

    def _pairs(self) -> list[Pair]:
        if self._found is None:
            self._found = find_pairs(self.folder, self.flow, self.occluded)
        return self._found


def find_pairs(folder: str | Path, flow: str | Path, occluded: str | Path | None = None) -> list[Pair]:
    """The pairs of ``FrameSource``.

    Raises:
        ValueError: If a folder is missing or holds no such file, if a flow has no frame or its frame none after it, or
            a frame has no mask although there is a folder of masks.
    """
    folder, flow = Path(folder), Path(flow)
    frames = _by_name(folder, find_photos(folder))
    following: dict[str, str] = {}
    for name, after in zip(frames, list(frames)[1:], strict=False):
        if Path(name).parent == Path(after).parent:
            following[name] = after
    if not flow.is_dir():
        raise ValueError(f"data.flow: expected a folder, got {shown(flow)}")
    suffixes = FLOW_SUFFIXES - ({".png"} if flow.resolve() == folder.resolve() else set())
    flows = _by_name(flow, [path for path in flow.rglob("*") if path.suffix.lower() in suffixes])
    if not flows:
        raise ValueError(f"data.flow: expected flow ({', '.join(sorted(suffixes))}) below {shown(flow)}, found none")
    masks = None if occluded is None else _by_name(Path(occluded), find_photos(occluded, "data.occluded"))
    pairs = []
    for name, path in flows.items():
        if name not in following:
            what = "it is the last one of its folder" if name in frames else "there is none"
            raise ValueError(
                f"data.flow: expected a frame {name} in data.folder, and one after it; {what}: {shown(path)}"
            )
        if masks is not None and name not in masks:
            raise ValueError(f"data.occluded: expected a mask {name} as for every flow, found none in {occluded}")
        pairs.append(Pair(frames[following[name]], frames[name], path, None if masks is None else masks[name]))
    return pairs


def _by_name(root: Path, paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by their place below a folder, without suffix, in the order of the numbers in their names."""

    def order(path: Path) -> list[tuple[str, int]]:
        parts = re.findall(r"(\D*)(\d*)", path.relative_to(root).with_suffix("").as_posix())
        return [(text, int(number or 0)) for text, number in parts]

    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(paths, key=order)}
