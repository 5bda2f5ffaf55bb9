"""Segmentation on one's own masks: trained in a tiny run, and bad masks named before it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from examples.transfer.common.command import TransferCLI
from examples.transfer.datasets.own_masks import class_names
from examples.transfer.datasets.segmentation_data import SegmentationData
from examples.transfer.segmentation import Segmentation

CONFIG = Path(__file__).parents[2] / "examples" / "transfer" / "configs" / "own_masks_fcn_r18.yaml"


@pytest.fixture
def folder(tmp_path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            (tmp_path / kind / split).mkdir(parents=True)
            for number in range(count):
                pixels = torch.zeros(3 if kind == "images" else 1, 36, 52, dtype=torch.uint8)
                pixels[:, 9:20, number : number + 30] = 200 if kind == "images" else 2
                pixels[:, :3] = 0 if kind == "images" else 255
                to_pil_image(pixels).save(tmp_path / kind / split / f"{number}.{suffix}")
    (tmp_path / "classes.txt").write_text("ground\nroof\ntree\n")
    return tmp_path


def fit(folder: Path, *args: str) -> TransferCLI:
    made = TransferCLI(Segmentation, SegmentationData, run=False, save_config_callback=None, args=[
        "--config", str(CONFIG), f"--data.folder={folder}", f"--out={folder / 'run'}", "--model.classes=3",
        "--data.crop=[32,40]", "--data.batch_size=2", "--data.workers=0", "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu", "--trainer.check_val_every_n_epoch=1", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", *args])  # fmt: skip
    made.trainer.fit(made.model, made.datamodule)
    return made


def test_own_masks_train(folder):
    made = fit(folder)
    assert class_names(str(folder)) == ["ground", "roof", "tree"]
    assert made.trainer.global_step == 2
    assert 0 <= made.trainer.callback_metrics["val/miou"] <= 1
    _, classes = made.datamodule.val[0]
    assert classes.unique().tolist() == [0, 2, 255]


def in_colours(folder: Path) -> None:
    to_pil_image(torch.zeros(3, 36, 52, dtype=torch.uint8)).save(folder / "masks/train/1.png")


def deep(folder: Path) -> None:
    Image.fromarray(np.zeros((36, 52), np.uint16)).save(folder / "masks/train/1.png")


def no_file(folder: Path) -> None:
    (folder / "masks/train/1.png").write_text("no image")


def names(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "classes.txt").write_bytes(content)


def no_names(folder: Path) -> None:
    (folder / "classes.txt").unlink()


def no_mask(folder: Path) -> None:
    (folder / "masks/train/1.png").unlink()


def no_image(folder: Path) -> None:
    (folder / "images/train/1.jpg").unlink()


@pytest.mark.parametrize(
    ("damage", "args", "message"),
    [
        (in_colours, [], r"expected masks of class numbers, .* got .*masks/train/1.png in colours"),
        (deep, [], r"expected masks of class numbers, .* got .*masks/train/1.png of mode I;16"),
        (no_file, [], r"data.folder: .*masks/train/1.png cannot be read"),
        (names(b"sky\nroof\nsky"), [], r"data.folder: expected 2 to 255 different names in .*, got 3 lines"),
        (names(b"sky\n"), [], r"data.folder: expected 2 to 255 different names in .*, got 1 lines"),
        (names(b"\n".join(b"%d" % i for i in range(256))), [], r"2 to 255 different names in .*, got 256 lines"),
        (names(b"caf\xe9\nroof\nsky"), [], r"data.folder: expected the names of the classes, a line each, in .*utf-8"),
        (names(b"sky\nroof\n"), ["--model.classes=2"], r"expected ids among 0..1, 255 in .*, got 2"),
        (no_names, [], r"data.folder: expected the names of the classes, a line each, in .*classes.txt"),
        (no_mask, [], r"4 images, 1 are missing; the first is .*masks/train/1.png"),
        (no_image, [], r"masks/train/1.png has no image \(1 such masks\)"),
        (lambda folder: None, ["--model.classes=4"], r"model.classes: expected 3, the classes of own, got 4"),
    ],
)
def test_bad_masks_stop_before_training(damage, args, message, folder):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        fit(folder, *args)
