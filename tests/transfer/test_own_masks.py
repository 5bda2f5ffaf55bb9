"""Segmentation on one's own masks: trained in a tiny run, and bad masks named before it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from examples.transfer.common.command import TransferCLI, run
from examples.transfer.datasets.own_masks import find_masks, required_class_names
from examples.transfer.datasets.segmentation_data import SegmentationData
from examples.transfer.datasets.segmentation_sets import open_set
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
    assert required_class_names(str(folder)) == ["ground", "roof", "tree"]
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


def redrawn(place: str, change) -> Callable[[Path], None]:
    """A fault: the masks of a place, each made another of."""

    def damage(folder: Path) -> None:
        for path in folder.glob(place):
            to_pil_image(change(pil_to_tensor(Image.open(path)))).save(path)

    return damage


def broken(folder: Path) -> None:
    path = folder / "masks/train/1.png"
    path.write_bytes(path.read_bytes()[:60])


def same_stem(folder: Path) -> None:
    shutil.copy(folder / "images/train/1.jpg", folder / "images/train/1.jpeg")


NUMBERS = "expected ids among 0..2, 255 in .*masks/{}/1.png, got 7"
SIZES = r"the mask .*masks/{}/1.png: expected its size, 52x36 pixels in .*images/{}/1.jpg, got 52x30"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (redrawn("masks/train/1.png", lambda x: x.where(x != 2, 7)), NUMBERS.format("train")),
        (redrawn("masks/val/1.png", lambda x: x.where(x != 2, 7)), NUMBERS.format("val")),
        (redrawn("masks/train/1.png", lambda x: x[:, :30]), SIZES.format("train", "train")),
        (redrawn("masks/val/1.png", lambda x: x[:, :30]), SIZES.format("val", "val")),
        (
            redrawn("masks/*/*.png", lambda x: x.where(x == 0, 255)),
            r"expected at least 2 classes in the masks of .*masks/train, got 0, beside 255, which counts as nothing",
        ),
        (redrawn("masks/*/*.png", lambda x: x * 0 + 255), r"got none, beside 255, which counts as nothing"),
        (broken, r"masks/train/1.png cannot be read"),
        (same_stem, r"expected one image for each mask, got .*train/1.jpeg and .*train/1.jpg for .*train/1.png"),
        (in_colours, r"expected masks of class numbers, .* got .*masks/train/1.png in colours"),
        (no_names, r"data.folder: expected the names of the classes, a line each, in .*classes.txt"),
        (
            names(b"0\n85\n170\n"),
            r"data.folder: expected a name in each line of .*classes.txt, got the number 0 in line 1",
        ),
        (names(b"ground\n\n 2.5 \ntree\n"), r"data.folder: .*classes.txt, got the number 2.5 in line 3"),
        (no_mask, r"4 images, 1 are missing; the first is .*masks/train/1.png"),
        (no_image, r"masks/train/1.png has no image \(1 such masks\)"),
        (
            lambda folder: shutil.rmtree(folder / "images/val"),
            r"expected the folders train and val in .*images, or images without such folders, got train alone",
        ),
    ],
)
def test_bad_masks_stop_before_training(damage, message, folder):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        SegmentationData("own", str(folder)), [open_set("own", str(folder), split, None) for split in ("train", "val")]


@pytest.mark.parametrize(
    ("damage", "args", "message"),
    [
        (deep, [], r"expected masks of class numbers, .* got .*masks/train/1.png of mode I;16"),
        (no_file, [], r"data.folder: .*masks/train/1.png cannot be read"),
        (names(b"sky\nroof\nsky"), [], r"data.folder: expected 2 to 255 different names in .*, got 3 lines"),
        (names(b"sky\n"), [], r"data.folder: expected 2 to 255 different names in .*, got 1 lines"),
        (names(b"\n".join(b"c%d" % i for i in range(256))), [], r"2 to 255 different names in .*, got 256 lines"),
        (names(b"caf\xe9\nroof\nsky"), [], r"data.folder: expected the names of the classes, a line each, in .*utf-8"),
        (names(b"sky\nroof\n"), ["--model.classes=2"], r"expected ids among 0..1, 255 in .*, got 2"),
        (redrawn("masks/val/1.png", lambda x: x.where(x != 2, 7)), [], NUMBERS.format("val")),
        (lambda folder: None, ["--model.classes=4"], r"model.classes: expected 3, the classes of own, got 4"),
    ],
)
def test_a_run_stops_before_its_first_step(damage, args, message, folder):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        fit(folder, *args)
    assert not list(folder.glob("run/*.ckpt"))


def test_without_splits_every_fifth_image_is_evaluated(folder):
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            for path in (folder / kind / split).iterdir():
                path.rename(folder / kind / f"{split}-{path.name}")
            (folder / kind / split).rmdir()
    shutil.copy(folder / "images/val-0.jpg", folder / "images/a.jpg")
    shutil.copy(folder / "masks/val-0.png", folder / "masks/a.png")
    stems = ["a", *(f"train-{n}" for n in range(4)), *(f"val-{n}" for n in range(2))]
    for split, expected in (("train", [s for s in stems if s != "train-1"]), ("val", ["train-1"])):
        images, masks = find_masks(str(folder), split)
        assert [path.stem for path in images] == [path.stem for path in masks] == expected
    assert len(open_set("own", str(folder), "val", lambda *pair: pair)) == 1
    with pytest.raises(ValueError, match=r"expected a folder test in .*images, .* got images without such folders"):
        find_masks(str(folder), "test")


def test_masks_lie_as_their_images_do(folder):
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        for part in "ab":
            (folder / kind / "train" / part).mkdir()
            shutil.copy(folder / kind / "train" / f"0.{suffix}", folder / kind / "train" / part / f"0.{suffix}")
    images, masks = find_masks(str(folder), "train")
    assert [path.relative_to(folder / "masks/train").with_suffix(".jpg") for path in masks] == [
        path.relative_to(folder / "images/train") for path in images
    ]
    (folder / "images/train/b/0.jpg").unlink()
    with pytest.raises(ValueError, match=r"masks/train/b/0.png has no image \(1 such masks\)"):
        find_masks(str(folder), "train")


def test_a_photo_may_be_turned_beside_its_mask(folder):
    """Drawn on the pixels as they are shown, or as they are stored: both are right."""
    path = folder / "images/train/1.jpg"
    exif = Image.Exif()
    exif[274] = 6
    Image.open(path).save(path, exif=exif)
    assert open_set("own", str(folder), "train", lambda *pair: pair)[1][0].shape == (3, 36, 52)
    redrawn("masks/train/1.png", lambda x: x.transpose(1, 2))(folder)
    assert open_set("own", str(folder), "train", lambda *pair: pair)[1][0].shape == (3, 52, 36)


def test_the_command_speaks_plainly_and_names_what_it_wrote(folder, monkeypatch, capsys):
    given = ["fit", "--config", str(CONFIG), f"--data.folder={folder}", f"--out={folder / 'run'}", "--model.classes=3"]
    given += ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu"]
    given += ["--trainer.enable_progress_bar=false", "--data.batch_size=2", "--data.crop=[32, 32]"]
    monkeypatch.setattr("sys.argv", ["segmentation.py", *given])
    run(Segmentation, SegmentationData)
    said = "".join(capsys.readouterr())
    assert not any(noise in said for noise in ("litlogger", "FLOPs", "stopped:"))
    out = folder / "run"
    told = ("val/miou 0.", f"the model is {out / 'last.ckpt'}", f"{out / 'version_0' / 'metrics.csv'}")
    assert all(words in said for words in told)
