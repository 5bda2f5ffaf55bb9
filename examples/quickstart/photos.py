"""Photos from disk: any folder to learn from, and a labelled data set in CamVid's layout to probe with."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from examples.pretrain.common.data.decode import read_photo, reason, shown
from examples.pretrain.common.data.depths import as_bytes
from examples.pretrain.common.data.finding import find_photos
from examples.pretrain.common.data.label_masks import mask_warning
from examples.pretrain.common.samples import IGNORED, photo_under

CAMVID_CLASSES = 11  # ids 0..10; 11 is "ignore"


def read_photos(folder: str | Path, limit: int, side: int, seed: int = 0, name: str = "folder") -> list[Tensor]:
    """Reads photos into memory, scaled down so that their shorter side is ``side``.

    Decoding each photo once, small, is what makes training on full-size photos bearable on two cores. A photo that
    cannot be read is named in a warning, and another takes its place.

    Args:
        folder: Folder that is searched with its sub-folders.
        limit: Greatest number of photos, chosen by ``seed``.
        side: Side in pixels that larger photos are reduced to; smaller ones stay as they are.
        seed: Seed of the choice of photos.
        name: Name of the argument, for errors.

    Returns:
        uint8 ``(3, H, W)`` each, of differing sizes.

    Raises:
        ValueError: If the folder is missing, holds no photo, or none that can be read.
    """
    paths = list(find_photos(folder, name))
    masks = mask_warning(paths, name)
    if masks is not None:
        warnings.warn(masks, stacklevel=2)
    random.Random(seed).shuffle(paths)
    photos: list[Tensor] = []
    unreadable = 0
    with tqdm(total=min(limit, len(paths)), desc="reading photos", unit="photo", nrows=20) as bar:
        for path in paths:
            if len(photos) == limit:
                break
            try:
                photos.append(_read(path, side))
                bar.update()
            except (RuntimeError, OSError) as error:
                unreadable += 1
                why = reason(error, path)
                warnings.warn(f"{shown(path)}: unreadable, another photo takes its place: {why}", stacklevel=2)
    if not photos:
        raise ValueError(f"{name}: expected photos, got none that can be read among the {len(paths)} files in {folder}")
    if unreadable:
        warnings.warn(f"{folder}: number of photos left out because they could not be read: {unreadable}", stacklevel=2)
    return photos


def _read(path: Path, side: int) -> Tensor:
    image = as_bytes(read_photo(path, 3, side=side))
    height, width = image.shape[1:]
    scale = side / min(height, width)
    if scale < 1:
        image = resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)
    return image.contiguous()


def read_camvid(
    folder: str | Path, split: str, name: str = "folder", classes: int = CAMVID_CLASSES
) -> list[tuple[Tensor, Tensor]]:
    """Reads one split of a labelled data set in CamVid's layout.

    A photo is turned as its EXIF entry says, unless its labels have the size of the pixels as they are stored.

    Args:
        folder: Folder that holds ``images/SPLIT/*.jpg`` (any suffix) and ``labels/SPLIT/*.png`` with equal stems.
        split: ``"train"``, ``"val"`` or ``"test"``.
        name: Name of the argument, for errors.
        classes: Number of classes: labels run 0..classes-1, and the number of classes itself and 255 are ignored.

    Returns:
        Image, uint8 ``(3, H, W)``, and labels, int64 ``(H, W)``, 255 where they are ignored; all of one size.

    Raises:
        ValueError: If a folder or a label is missing, if a label has another number, or if sizes differ.
    """
    labelled = []
    for path in find_photos(Path(folder) / "images" / split, name):
        answer = Path(folder) / "labels" / split / f"{path.stem}.png"
        if not answer.is_file():
            raise ValueError(f"{name}: expected the labels of {path} in {answer}, which is missing")
        try:
            with Image.open(answer) as file:
                if file.mode not in ("L", "P", "1"):
                    raise ValueError(f"expected class numbers in one channel of 8 bits, got mode {file.mode}")
                labels = torch.from_numpy(np.array(file).astype(np.int64))
            image = photo_under(path, labels.shape[:2], 3)
        except Exception as error:  # Pillow raises whatever its decoders do
            raise ValueError(f"{name}: {shown(path)} or its labels cannot be read: {error}") from error
        if labels.shape != (labelled[0][1] if labelled else image[0]).shape or labels.shape != image[0].shape:
            raise ValueError(
                f"{name}: expected one size for all images and (H, W) labels, "
                f"got {tuple(image.shape)} in {path} and {tuple(labels.shape)} in {answer}"
            )
        wrong = labels[(labels > classes) & (labels != IGNORED)]
        if len(wrong):
            raise ValueError(
                f"{name}: expected numbers 0..{classes - 1}, {classes} or 255 where ignored, "
                f"got {int(wrong[0])} in {answer}"
            )
        labelled.append((image, labels.masked_fill(labels == classes, IGNORED)))
    return labelled
