"""Labelled images of a folder, for the probes: which are read, how they lie under their masks, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.pretrain.common.preview.page import labelled
from examples.pretrain.common.samples import read_labels
from examples.quickstart.photos import read_camvid

TURN = Image.Exif()
TURN[274] = 6  # shown a quarter turn clockwise


def put(root: Path, name: str, numbers: np.ndarray, kind: str = "masks", **saving) -> None:
    """A mask, and a PNG whose red channel is its numbers times 20."""
    for folder, pixels in ((kind, numbers), ("images", np.stack([numbers * 20, 0 * numbers, 0 * numbers], 2))):
        path = root / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, **(saving if folder == "images" else {}))


def blocks(index: int) -> np.ndarray:
    """Numbers 1..12 in blocks of 8x8 pixels, 24 rows and 32 columns."""
    return np.kron(np.arange(12).reshape(3, 4) + 1, np.ones((8, 8), int)) * (index != 2) + (index == 2)


def of(pairs: list) -> list[list[int]]:
    return [labels.unique().tolist() for _, labels in pairs]


@pytest.mark.parametrize("size", [24, 12, 48])
def test_masks_lie_under_their_images(size, tmp_path):
    for index in (0, 1):
        put(tmp_path, f"{index}", blocks(index))
    labels = read_labels(str(tmp_path), 3, size)
    assert labels.classes == 12 + 1
    expected = np.kron(np.arange(12).reshape(3, 4) + 1, np.ones((size // 3, size // 3), int))
    middle = expected[:, size // 6 : size // 6 + size]
    for image, mask in (*labels.fit, *labels.test):
        assert (image.dtype, mask.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(mask, torch.from_numpy(middle))
        inner = torch.zeros(size, size, dtype=torch.bool)
        inner[1:-1, 1:-1] = True  # of blocks: at their rims the image is interpolated
        for step, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            inner &= mask == mask.roll(step, axis)
        assert inner.any()
        assert torch.equal(image[0][inner].long(), mask[inner] * 20)


def test_the_layouts(tmp_path):
    plain, split, tested = tmp_path / "plain", tmp_path / "split", tmp_path / "tested"
    for index in range(5):
        put(plain, f"deep/{index}", np.full((9, 11), index))
        put(split, f"{'train' if index < 3 else 'val'}/{index}", np.full((9, 11), index), "labels")
        put(tested, f"{'train' if index == 4 else 'test'}/{index}", np.full((9, 11), index))
    put(split, "test/9", np.full((9, 11), 9), "labels")  # val goes before
    read = read_labels(str(plain), 3, 8)
    assert (of(read.fit), of(read.test), read.classes) == ([[0], [2], [4]], [[1], [3]], 5)
    read = read_labels(str(split), 3, 8)
    assert (of(read.fit), of(read.test)) == ([[0], [1], [2]], [[3], [4]])
    read = read_labels(str(tested), 3, 8)
    assert (of(read.fit), of(read.test)) == ([[4]], [[0], [1], [2], [3]])
    assert [len(part) for part in read_labels(str(plain), 3, 8, most=2)[:2]] == [2, 2]
    assert read_labels(str(plain), 1, 8).fit[0][0].shape == (1, 8, 8)


def test_names_of_classes_and_what_is_ignored(tmp_path):
    numbers = np.arange(99).reshape(9, 11) % 4
    numbers[0] = 255
    for index in range(2):
        put(tmp_path, f"{index}", numbers)
    read = read_labels(str(tmp_path), 3, 9)
    assert (of(read.fit), read.classes) == ([[0, 1, 2, 3, 255]], 4)
    (tmp_path / "classes.txt").write_text("0 ground\n1 Void\n\n2 roof\n3 tree\n4 car\n")
    read = read_labels(str(tmp_path), 3, 9)
    assert (of(read.fit), of(read.test), read.classes) == ([[0, 2, 3, 255]], [[0, 2, 3, 255]], 5)


def test_palettes_hold_numbers_and_turned_photos_lie_under_masks_of_both_kinds(tmp_path):
    stored = blocks(0)
    for index in range(2):
        put(tmp_path, f"{index}", stored, exif=TURN)
    palette = Image.fromarray(stored.astype(np.uint8), "P")
    palette.putpalette([*range(255, -1, -1)] * 3)
    palette.save(tmp_path / "masks" / "0.png")  # as the pixels are stored
    Image.fromarray(np.rot90(stored, -1).astype(np.uint8)).save(tmp_path / "masks" / "1.png")  # as viewers show them
    read = read_labels(str(tmp_path), 3, 24)
    for image, mask in (*read.fit, *read.test):
        assert torch.equal(image[0].long(), mask * 20)
    assert torch.equal(read.test[0][1], read.fit[0][1].new_tensor(np.rot90(stored, -1)[4:28].copy()))
    for kind in ("images", "masks"):
        (tmp_path / kind).rename(tmp_path / {"images": "all", "masks": "drawn"}[kind])
        (tmp_path / {"images": "images", "masks": "labels"}[kind]).mkdir()
    (tmp_path / "all").rename(tmp_path / "images" / "val")
    (tmp_path / "drawn").rename(tmp_path / "labels" / "val")
    (tmp_path / "images" / "val" / "1.png").unlink()
    (image, mask), = read_camvid(tmp_path, "val", classes=13)  # fmt: skip
    assert torch.equal(image[0].long(), mask * 20)


def test_classes_are_counted_without_those_that_are_ignored(tmp_path):
    for index in (0, 1):
        put(tmp_path, f"{index}", blocks(index))
    nameless = "(no classes.txt names them, so every number except 255 counts as a class)"
    assert labelled(read_labels(str(tmp_path), 3, 24)) == f"1 to fit on, 1 to test on, 13 classes {nameless}"
    names = [f"class {index}" for index in range(12)]
    (tmp_path / "classes.txt").write_text("\n".join([*names, "Void"]))
    labels = read_labels(str(tmp_path), 3, 24)
    assert (labels.classes, labels.counted) == (13, 12)
    assert labelled(labels) == "1 to fit on, 1 to test on, 12 classes and 1 ignored number"
    (tmp_path / "classes.txt").write_text("\n".join(["unlabelled", *names[:-1], "Void"]))
    assert labelled(read_labels(str(tmp_path), 3, 24)).endswith("11 classes and 2 ignored numbers")


def deep(numbers: np.ndarray) -> Image.Image:
    return Image.fromarray(numbers.astype(np.uint16) * 257)


HALF = (np.arange(99) > 50).reshape(9, 11)


@pytest.mark.parametrize(
    ("mask", "names", "message"),
    [
        (deep(HALF), None, r"masks of class numbers in one channel of 8 bits, got .*1.png: I;16"),
        (Image.fromarray(HALF), None, r"in one channel of 8 bits, got .*1.png: 1$"),
        (Image.fromarray(np.stack([HALF] * 3, 2).astype(np.uint8)), None, r"one channel of 8 bits, got .*1.png: RGB"),
        (Image.fromarray(HALF.astype(np.uint8) * 4), "a\nb\nc", r"numbers 0..2 of .*classes.txt, or 255, got 4 in .*1"),
        (
            Image.fromarray(HALF.astype(np.uint8) * 255),
            None,
            r"at least 2 classes, got the number 0 alone in .*; 255 is ignored",
        ),
        (Image.fromarray(HALF[:, :10].astype(np.uint8)), None, r"a mask of the image's size, got \(9, 10\) in .*1.png"),
        (None, None, r"expected the mask of .*images/1.png in .*masks/1.png, which is missing"),
        (b"no mask", None, r"1.png or its mask cannot be read"),
        (Image.fromarray(HALF.astype(np.uint8)), b"caf\xe9\n", r"classes.txt cannot be read as UTF-8"),
    ],
)
def test_what_is_refused(mask, names, message, tmp_path):
    for index in range(2):
        put(tmp_path, f"{index}", 0 * HALF)
    path = tmp_path / "masks" / "1.png"
    path.unlink()
    if isinstance(mask, bytes):
        path.write_bytes(mask)
    elif mask is not None:
        mask.save(path)
    if names is not None:
        (tmp_path / "classes.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    with pytest.raises(ValueError, match=rf"--labels: .*{message}"):
        read_labels(str(tmp_path), 3, 8, name="--labels")


def test_one_image_and_no_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"probe.labels: expected the folders images and masks \(or labels\) in "):
        read_labels(str(tmp_path), 3, 8)
    put(tmp_path, "0", HALF)
    with pytest.raises(ValueError, match=r"probe.labels: expected at least 2 images, one to fit and one to test on"):
        read_labels(str(tmp_path), 3, 8)


def test_numbers_that_are_no_class_of_camvids_layout_are_refused(tmp_path):
    put(tmp_path, "val/0", blocks(0), "labels")
    assert len(read_camvid(tmp_path, "val", classes=12)) == 1  # the last number is ignored
    with pytest.raises(
        ValueError, match=r"--probe-data: expected numbers 0..10, 11 or 255 where .*, got 12 in .*0.png"
    ):
        read_camvid(tmp_path, "val", "--probe-data")
    for wrong, mode in ((deep(HALF), "I;16"), (Image.new("RGB", (11, 9)), "RGB"), (Image.new("F", (11, 9)), "F")):
        wrong.save(tmp_path / "labels" / "val" / "0.png", "TIFF" if mode == "F" else "PNG")
        with pytest.raises(
            ValueError, match=rf"0.png or its labels cannot be read: expected class .* got mode {mode}$"
        ):
            read_camvid(tmp_path, "val", "--probe-data")
