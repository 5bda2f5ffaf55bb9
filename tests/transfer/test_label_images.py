"""Photos and their label images of all layouts: turned ones lie under their labels, other modes are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.transfer.datasets.segmentation_sets import open_set

TURN = Image.Exif()
TURN[274] = 6  # shown a quarter turn clockwise
NUMBERS = np.kron(np.arange(6).reshape(2, 3), np.ones((8, 9), int)).astype(np.uint8)


def make(root: Path, label: Image.Image) -> Path:
    for kind in ("images", "labels"):
        (root / kind / "val").mkdir(parents=True)
    Image.fromarray(np.stack([NUMBERS * 30] * 3, 2)).save(root / "images" / "val" / "a.png", exif=TURN)
    label.save(root / "labels" / "val" / "a.png")
    return root


@pytest.mark.parametrize("turned", [False, True])
def test_labels_of_the_stored_pixels_and_of_those_that_are_shown(turned, tmp_path):
    drawn = np.rot90(NUMBERS, -1) if turned else NUMBERS
    found = open_set("camvid", str(make(tmp_path, Image.fromarray(drawn.copy()))), "val", lambda *pair: pair)
    image, labels = found[0]
    assert torch.equal(labels.as_subclass(torch.Tensor), torch.from_numpy(drawn.copy()))
    assert torch.equal(image[0].as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor) * 30)


@pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA", "I;16"])
def test_label_images_of_other_modes_are_refused(mode, tmp_path):
    deep = Image.fromarray(NUMBERS.astype(np.uint16))
    label = deep if mode == "I;16" else Image.fromarray(NUMBERS).convert(mode)
    found = open_set("camvid", str(make(tmp_path, label)), "val", lambda *pair: pair)
    with pytest.raises(ValueError, match=rf"data.folder: expected ids in one channel of 8 bits .*got mode {mode}$"):
        found[0]
