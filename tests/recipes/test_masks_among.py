"""Masks of class numbers in a folder of photos are noticed, and photos are not taken for masks."""

import logging

import numpy as np
import pytest
from PIL import Image

from examples.pretrain.common.data.masks_among import masks_among
from examples.pretrain.common.data.sources import FolderSource


@pytest.fixture
def folder(tmp_path):
    """Ten photos as PNG in one folder, their masks in another: in grey and with a palette."""
    random = np.random.default_rng(0)
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for index in range(10):
        noise = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{index}.png")
        mask = Image.fromarray(random.integers(0, 12, (20, 30), dtype=np.uint8))
        if index % 2:
            mask = mask.convert("P")
        mask.save(tmp_path / "labels" / f"{index}.png")
    return tmp_path


def test_masks_are_noticed_and_photos_are_not(folder):
    photos, masks = (sorted((folder / part).iterdir()) for part in ("images", "labels"))
    assert masks_among(photos) is None
    assert masks_among([]) is None
    told = masks_among([*photos, *masks])
    assert told.startswith("10 of 20 files that were looked at have at most 32 colours and may be label masks")
    assert str(masks[0]) in told


def test_a_photo_of_few_colours_in_jpeg_and_a_broken_file_are_no_masks(tmp_path):
    Image.new("RGB", (20, 20), "grey").save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes(b"no photo")
    assert masks_among(sorted(tmp_path.iterdir())) is None


def test_a_run_says_so(folder, caplog):
    with caplog.at_level(logging.WARNING):
        FolderSource(str(folder / "images")).count(1, 0)
        assert not caplog.records
        FolderSource(str(folder)).count(1, 0)
    assert "data.folder: 10 of 20 files" in caplog.text
