"""DAVIS 2017: videos with a mask of objects for each frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from densessl.evaluation.data._files import images_below, lines_of, need_files, need_folder, read_ids, read_image


class Videos(Dataset):
    """Videos, each read as a whole: frames uint8 ``(T, 3, H, W)`` and masks int64 ``(T, H, W)``.

    In the masks 0 is the background, and each object has a number.

    Args:
        frames: Paths of the frames, in order, of each video.
        masks: Paths of the masks, of the same stems.
        names: Names of the videos.

    Raises:
        ValueError: If a file is missing, or there is none.
    """

    def __init__(self, frames: Sequence[Sequence[Path]], masks: Sequence[Sequence[Path]], names: Sequence[str]) -> None:
        for paths, annotated, name in zip(frames, masks, names, strict=True):
            need_files(paths, f"the frames of {name}")
            need_files(annotated, f"a mask for each frame of {name}")
        self.frames, self.masks, self.names = list(frames), list(masks), list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self.names):
            raise IndexError(f"index: expected 0..{len(self.names) - 1}, got {index}")
        frames = torch.stack([read_image(path) for path in self.frames[index]])
        masks = torch.stack([read_ids(path) for path in self.masks[index]])
        if frames.shape[2:] != masks.shape[1:]:
            raise ValueError(
                f"folder: expected masks of {tuple(frames.shape[2:])} as the frames of {self.names[index]}, "
                f"got {tuple(masks.shape[1:])}"
            )
        return frames, masks


def davis(folder: str | Path, split: str = "val") -> Videos:
    """DAVIS 2017 at 480p.

    Args:
        folder: Folder that holds ``DAVIS``, or is that folder: ``JPEGImages/480p/NAME/*.jpg``,
            ``Annotations/480p/NAME/*.png`` and ``ImageSets/2017/SPLIT.txt``.
        split: "train" or "val".

    Raises:
        ValueError: If folders or files are missing.
    """
    root = Path(folder)
    root = root / "DAVIS" if (root / "DAVIS").is_dir() else root
    layout = f"DAVIS 2017's JPEGImages/480p, Annotations/480p and ImageSets/2017/{split}.txt in {root}"
    names = lines_of(root / "ImageSets" / "2017" / f"{split}.txt", layout)
    frames = [images_below(need_folder(root / "JPEGImages" / "480p" / name, layout)) for name in names]
    annotated = [need_folder(root / "Annotations" / "480p" / name, layout) for name in names]
    masks = [[place / f"{path.stem}.png" for path in paths] for place, paths in zip(annotated, frames, strict=True)]
    return Videos(frames, masks, names)
