"""SPair-71k: pairs of photos with keypoints on objects of one kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from densessl.evaluation.data._files import lines_of, need_files, need_folder, read_image
from densessl.evaluation.keypoint_pairs import KeypointPair


class KeypointPairs(Dataset):
    """Pairs of a list of SPair-71k.

    Args:
        root: The folder of SPair-71k.
        annotations: Paths of the pairs' json files.

    Raises:
        ValueError: If a file is missing, or there is none.
    """

    def __init__(self, root: Path, annotations: Sequence[Path]) -> None:
        need_files(annotations, f"a json file for each pair in {root / 'PairAnnotation'}")
        self.root, self.annotations = root, list(annotations)

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> KeypointPair:
        if not 0 <= index < len(self.annotations):
            raise IndexError(f"index: expected 0..{len(self.annotations) - 1}, got {index}")
        path = self.annotations[index]
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            folder, names = self.root / "JPEGImages" / entry["category"], (entry["src_imname"], entry["trg_imname"])
            points = [torch.tensor(entry[key], dtype=torch.float32).view(-1, 2) for key in ("src_kps", "trg_kps")]
            left, top, right, bottom = map(float, entry["trg_bndbox"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"folder: expected a pair of SPair-71k in {path}, got {error!r}") from error
        source, target = (read_image(folder / name, turn=False) for name in names)
        if len(points[0]) != len(points[1]):
            counts = " and ".join(str(len(at)) for at in points)
            raise ValueError(f"folder: expected as many points in both images of {path}, got {counts}")
        placed = _placed(points[0], source, path), _placed(points[1], target, path)
        return KeypointPair(source, target, placed[0], placed[1], max(right - left, bottom - top))


def _placed(points: Tensor, image: Tensor, path: Path) -> Tensor:
    """Points at the centres of the pixels whose numbers the annotation gives."""
    sides = torch.tensor([image.shape[2], image.shape[1]])
    # A few points of the annotation lie on the far edge, a pixel outside.
    if bool(((points < -1) | (points > sides + 1)).any()):
        raise ValueError(f"folder: {path} has points outside its image of {image.shape[2]}x{image.shape[1]} pixels")
    return (points + 0.5).clamp(min=0).minimum(sides)


def spair(folder: str | Path, split: str = "test", *, layout: str = "large") -> KeypointPairs:
    """SPair-71k.

    Args:
        folder: Folder that holds ``SPair-71k``, or is that folder: ``JPEGImages/KIND/*.jpg``,
            ``PairAnnotation/SPLIT/*.json`` and ``Layout/LAYOUT/SPLIT.txt``.
        split: "trn", "val" or "test".
        layout: "large" or "small", the lists of pairs.

    Raises:
        ValueError: If folders or files are missing.
    """
    root = Path(folder)
    root = root / "SPair-71k" if (root / "SPair-71k").is_dir() else root
    stated = f"SPair-71k's JPEGImages, PairAnnotation/{split} and Layout/{layout}/{split}.txt in {root}"
    names = lines_of(root / "Layout" / layout / f"{split}.txt", stated)
    place = need_folder(root / "PairAnnotation" / split, stated)
    need_folder(root / "JPEGImages", stated)
    return KeypointPairs(root, [place / f"{name}.json" for name in names])
