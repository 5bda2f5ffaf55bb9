"""Photos without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import resize

from densessl.evaluation.data._files import SUFFIXES, need_files, need_folder, photos_below, read_image


class Photos(Dataset):
    """Photos, uint8 ``(3, H, W)`` each.

    Args:
        paths: Paths of the files.
        size: ``(H, W)`` to which each is resized when it is read; None keeps the sizes.

    Raises:
        ValueError: If a file is missing, or there is none.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int] | None = None) -> None:
        need_files(paths, "photos")
        self.paths, self.size = list(paths), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self.paths):
            raise IndexError(f"index: expected 0..{len(self.paths) - 1}, got {index}")
        photo = read_image(self.paths[index])
        return photo if self.size is None else resize(photo, list(self.size), antialias=True)


def photos(folder: str | Path, size: tuple[int, int] | None = None) -> Photos:
    """All photos below a folder, in the order of their paths.

    Args:
        folder: Folder of photos, searched with all folders in it, linked ones among them, but for hidden ones.
        size: ``(H, W)`` to which each is resized when it is read; None keeps the sizes.

    Raises:
        ValueError: If the folder is missing, or holds no photo.
    """
    root = need_folder(Path(folder), "a folder of photos")
    paths = photos_below(root)
    if not paths:
        raise ValueError(f"folder: expected photos ({', '.join(SUFFIXES)}) below {root}, found none")
    return Photos(paths, size)
