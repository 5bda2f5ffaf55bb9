"""Segmentation and the linear probe: configurations, training on each layout, figures by hand, bad input."""

import copy
import csv
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.models import get_model
from torchvision.transforms.v2.functional import to_pil_image

from densessl.augment.presets import IMAGENET_MEAN, IMAGENET_STD
from examples.pretrain.common.checkpoint_files import WholeFiles
from examples.transfer.common.command import TransferCLI, run
from examples.transfer.datasets.linear_data import ImageFolders, open_folder
from examples.transfer.datasets.segmentation_data import SegmentationData
from examples.transfer.datasets.segmentation_sets import IGNORE, open_set
from examples.transfer.linear import LinearProbe
from examples.transfer.segmentation import Segmentation, keep_stride_16

RECIPES = Path(__file__).parents[2] / "examples" / "transfer" / "configs"
QUIET = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.precision=32", "--data.workers=0"]  # fmt: skip
TINY = [*QUIET, "--model.backbone=resnet18", "--data.batch_size=4", "--trainer.num_sanity_val_steps=0"]
CONFIGS = {"cityscapes": "cityscapes_fcn_r50.yaml", "voc": "voc_fcn_r50.yaml", "camvid": "camvid_fcn_r18.yaml"}


def cli(recipe: type, data: type, *args: str) -> TransferCLI:
    return TransferCLI(recipe, data, args=list(args), run=False, save_config_callback=None)


def segmentation(dataset: str, folder: Path, out: Path, *args: str) -> TransferCLI:
    return cli(Segmentation, SegmentationData, "--config", str(RECIPES / CONFIGS[dataset]), "--data.folder",
               str(folder), "--out", str(out), *TINY, "--data.crop=[32,40]", *args)  # fmt: skip


def linear(folder: Path, out: Path, *args: str) -> TransferCLI:
    return cli(LinearProbe, ImageFolders, "--config", str(RECIPES / "imagenet_linear_r50.yaml"), "--data.folder",
               str(folder), "--out", str(out), *TINY, "--data.size=32", "--model.classes=6", *args)  # fmt: skip


def fit(make: Callable[[], TransferCLI]) -> None:
    made = make()
    made.trainer.fit(made.model, made.datamodule)


# --- data in the layouts of the sets ----------------------------------------------------------------------------------

SIZE = (48, 64)


def write_pair(image: Path, label: Path, seed: int, ids: list[int], size: tuple[int, int] = SIZE) -> None:
    """Quadrants of one id each, in an image whose red is four times the id."""
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    drawn = torch.randint(len(ids), (1, 1, 2, 2), generator=torch.Generator().manual_seed(seed))
    blocks = nn.functional.interpolate(drawn.float(), size)[0].long()
    values = torch.tensor(ids)[blocks].byte()
    to_pil_image(values).save(label)
    pixels = torch.cat([4 * values.int() % 256, values.int() * 0 + 80, values.int() * 0 + 10 * seed]).byte()
    to_pil_image(pixels).save(image)


def make_cityscapes(root: Path) -> Path:
    for split, count in (("train", 5), ("val", 2)):
        for index in range(count):
            name = f"{split}/town{index % 2}/town{index % 2}_{index:06}_000019"
            image, label = root / f"leftImg8bit/{name}_leftImg8bit.png", root / f"gtFine/{name}_gtFine_labelIds.png"
            write_pair(image, label, index, [7, 8, 26, 33, 0, 3])
    return root


def make_voc(root: Path) -> Path:
    inner = root / "VOCdevkit" / "VOC2012"
    (inner / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, count in (("train", 5), ("val", 2)):
        names = [f"2007_{split}{index}" for index in range(count)]
        (inner / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for index, name in enumerate(names):
            size = (48 + index, 64 - index)  # of differing sizes, as there
            write_pair(
                inner / f"JPEGImages/{name}.jpg", inner / f"SegmentationClass/{name}.png", index, [0, 15, 20, 255], size
            )
    return root


def make_camvid(root: Path) -> Path:
    for split, count in (("train", 5), ("val", 2), ("test", 2)):
        for index in range(count):
            write_pair(
                root / f"images/{split}/{index}.jpg", root / f"labels/{split}/{index}.png", index, [0, 3, 10, 11]
            )
    return root


MAKE = {"cityscapes": make_cityscapes, "voc": make_voc, "camvid": make_camvid}


def make_folders(root: Path) -> Path:
    """Six classes of one colour each."""
    for split, count in (("train", 2), ("val", 1)):
        for number in range(6):
            folder = root / split / f"n{number:08}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.full((3, 40, 50), 40 * number + index, dtype=torch.uint8)
                to_pil_image(pixels).save(folder / f"{index}.JPEG")
    return root


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(out: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(out) if row[name]]


# --- configurations and architecture ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "classes", "lr", "steps", "crop"),
    [("cityscapes", 19, 0.01, 90000, 769), ("voc", 21, 0.003, 30000, 513), ("camvid", 11, 0.05, -1, 160)],
)
def test_segmentation_configurations(dataset, classes, lr, steps, crop, tmp_path):
    made = cli(Segmentation, SegmentationData, "--config", str(RECIPES / CONFIGS[dataset]), "--data.folder", "x",
               "--out", str(tmp_path), *QUIET)  # fmt: skip
    assert made.model.hparams.lr == lr
    assert made.trainer.max_steps == steps
    assert made.datamodule.classes == classes
    assert made.datamodule.for_training.transforms[1].size == (crop, crop)
    with torch.no_grad():
        assert made.model.eval().net(torch.zeros(1, 3, 50, 70))["out"].shape == (1, classes, 50, 70)
    dilated = [m.dilation for m in made.model.net.classifier if isinstance(m, nn.Conv2d)]
    assert dilated == [(6, 6), (6, 6), (1, 1)]


def test_the_linear_probe_s_configuration(tmp_path):
    made = cli(LinearProbe, ImageFolders, "--config", str(RECIPES / "imagenet_linear_r50.yaml"), "--data.folder", "x",
               "--out", str(tmp_path), *QUIET)  # fmt: skip
    h = made.model.hparams
    assert (h.lr_at_256, h.momentum, h.weight_decay, h.warmup_epochs) == (30.0, 0.9, 0.0, 5.0)
    assert (made.trainer.max_epochs, made.datamodule.batch_size) == (100, 256)
    assert made.datamodule.for_training.transforms[0].scale == (0.08, 1.0)
    assert made.model.classifier.weight.shape == (1000, 2048)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_layer4_at_stride_16_computes_what_it_was_trained_to_compute(name):
    """Every second cell of the finer map is a cell of the original one."""
    model = get_model(name).eval()
    finer = copy.deepcopy(model)
    keep_stride_16(finer)
    x = torch.rand(2, model.layer3[0].conv1.in_channels, 12, 16)
    with torch.no_grad():
        every_second = finer.layer4(finer.layer3(x))[..., ::2, ::2]
        torch.testing.assert_close(every_second, model.layer4(model.layer3(x)), atol=1e-4, rtol=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", MAKE)
def test_segmentation_trains_on_every_layout(dataset, tmp_path):
    made = segmentation(dataset, MAKE[dataset](tmp_path / "data"), tmp_path, "--trainer.max_steps=10",
                        "--trainer.max_epochs=-1", "--trainer.val_check_interval=10",
                        "--trainer.check_val_every_n_epoch=null", "--trainer.log_every_n_steps=1",
                        "--model.lr=0.05")  # fmt: skip
    made.trainer.fit(made.model, made.datamodule)
    losses = column(tmp_path, "loss")
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    rates = column(tmp_path, "lr-SGD")
    assert rates == pytest.approx([0.05] * 7 + [0.005] * 2 + [0.0005])
    assert 0 <= column(tmp_path, "val/miou")[0] <= 1
    assert len([name for name in rows(tmp_path)[-1] if name.startswith("val/iou_")]) == made.datamodule.classes
    assert (tmp_path / "last.ckpt").exists()


def test_the_linear_probe_trains_its_classifier_alone(tmp_path):
    made = linear(make_folders(tmp_path / "data"), tmp_path, "--trainer.max_epochs=6", "--model.warmup_epochs=2",
                  "--trainer.log_every_n_steps=1", "--trainer.check_val_every_n_epoch=6")  # fmt: skip
    before = copy.deepcopy(made.model.state_dict())
    made.trainer.fit(made.model, made.datamodule)
    for key, value in made.model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("backbone."), key  # batch norm's counters included
    assert any("running_mean" in key for key in before)
    peak, warm, steps = 30.0 * 4 / 256, 6, 18
    expected = [peak * (0.01 + 0.99 * s / warm) for s in range(warm)]
    expected += [peak * (1 + math.cos(math.pi * s / (steps - warm))) / 2 for s in range(steps - warm)]
    assert column(tmp_path, "lr-SGD") == pytest.approx(expected)
    assert {"val/top1", "val/top5"} <= rows(tmp_path)[-1].keys()


def test_the_probe_s_backbone_stays_in_evaluation_mode(tmp_path):
    probe = linear(tmp_path, tmp_path).model.train()
    assert probe.classifier.training
    assert not any(module.training for module in probe.backbone.modules())


def test_a_crop_without_a_labelled_pixel_gives_no_nan(tmp_path):
    made = segmentation("camvid", tmp_path, tmp_path)
    made.model.log = lambda *args, **options: None
    loss = made.model.training_step((torch.rand(2, 3, 32, 32), torch.full((2, 32, 32), IGNORE)), 0)
    assert loss == 0


def test_image_and_labels_move_together(tmp_path):
    folder = make_camvid(tmp_path / "data")
    made = segmentation("camvid", folder, tmp_path, "--data.crop=[60,70]")
    train = open_set("camvid", str(folder), "train", made.datamodule.for_training)
    shapes, ignored = set(), 0
    for _ in range(8):
        for image, classes in (train[index] for index in range(len(train))):
            assert image.shape == (3, 60, 70)
            assert classes.shape == (60, 70)
            assert classes.dtype == torch.int64
            padded = image.abs().amax(0) < 0.02  # the mean colour
            assert (classes[padded] == IGNORE).all()
            ids = ((image[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255 / 4).round()
            counted = classes != IGNORE
            agree = ((ids - classes).abs() <= 1)[counted]  # classes are three apart
            assert agree.float().mean() > 0.85  # edges between quadrants are blurred
            shapes.add(tuple(padded.nonzero().amin(0).tolist()) if padded.any() else None)
            ignored += int(padded.sum())
    assert ignored > 0
    assert len(shapes) > 3  # scales differ


# --- figures by hand --------------------------------------------------------------------------------------------------


class RedIsTheClass(nn.Module):
    """Predicts a twentieth of the red value."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        red = (images[:, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255
        return {"out": nn.functional.one_hot((red / 20).round().long(), 11).movedim(-1, 1).float()}


class AlwaysTheFirst(nn.Module):
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": -torch.arange(11.0).view(1, -1, 1, 1).expand(len(images), -1, *images.shape[-2:])}


@pytest.mark.parametrize(("split", "evaluate"), [("val", "validate"), ("test", "test")])
def test_miou_is_that_of_all_pixels_together(split, evaluate, tmp_path):
    """Class 0: 4 of a union of 6; class 1: 2 of 4; class 2: 1 of 3; 7 of 10 pixels. The 11s do not count."""
    cases = {
        "a": ([[0, 0, 0, 0], [1, 1, 1, 11]], [[0, 0, 0, 1], [1, 1, 2, 5]]),
        "b": ([[2, 2, 0, 11]], [[2, 0, 0, 3]]),
    }
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind / split).mkdir(parents=True)
    for name, (labels, predicted) in cases.items():
        to_pil_image(torch.tensor([labels], dtype=torch.uint8)).save(tmp_path / f"data/labels/{split}/{name}.png")
        red = 20 * torch.tensor([predicted]).expand(3, -1, -1)
        to_pil_image(red.byte()).save(tmp_path / f"data/images/{split}/{name}.png")
    made = segmentation("camvid", tmp_path / "data", tmp_path)
    made.model.net = RedIsTheClass()
    (values,) = getattr(made.trainer, evaluate)(made.model, made.datamodule, verbose=False)
    assert [values[f"{split}/iou_{number:02}"] for number in range(3)] == pytest.approx([4 / 6, 2 / 4, 1 / 3])
    # The predictions of 3 and 5 are on ignored pixels: these classes are absent, and their IoU is not 0.
    assert [math.isnan(values[f"{split}/iou_{number:02}"]) for number in range(11)] == [False] * 3 + [True] * 8
    assert values[f"{split}/miou"] == pytest.approx(0.5)  # over the three classes that occur
    assert values[f"{split}/pixel_accuracy"] == pytest.approx(0.7)
    made.model.net = AlwaysTheFirst()
    (values,) = getattr(made.trainer, evaluate)(made.model, made.datamodule, verbose=False)
    assert values[f"{split}/miou"] == pytest.approx(5 / 10 / 3)  # the first evaluation left nothing behind


class BrightnessIsTheClass(nn.Module):
    """Ranks class c first, where the image's value is 40 c; then c + 1 and so on, round to c - 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value = (images[:, 0].mean((1, 2)) * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255
        first = (value / 40).round().long()
        return -((torch.arange(6) - first[:, None]) % 6).float()


def test_accuracy_by_hand(tmp_path):
    """Two right, two among the first five, two last of six."""
    make_folders(tmp_path / "data")
    for number, first in enumerate((0, 1, 3, 2, 0, 0)):
        pixels = torch.full((3, 40, 50), 40 * first, dtype=torch.uint8)
        to_pil_image(pixels).save(tmp_path / f"data/val/n{number:08}/0.JPEG")
    made = linear(tmp_path / "data", tmp_path)
    made.model.backbone, made.model.classifier = BrightnessIsTheClass(), nn.Identity()
    (values,) = made.trainer.validate(made.model, made.datamodule, verbose=False)
    assert values == pytest.approx({"val/top1": 2 / 6, "val/top5": 4 / 6})


def untouched(image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[torch.Tensor, torch.Tensor]:
    return image, mask


@pytest.mark.parametrize(
    ("dataset", "ids", "classes"),
    [
        ("cityscapes", [7, 8, 26, 33, 0, 3, 29], [0, 1, 13, 18, 255, 255, 255]),
        ("voc", [0, 1, 20, 255], [0, 1, 20, 255]),
        ("camvid", [0, 10, 11], [0, 10, 255]),
    ],
)
def test_ids_become_class_numbers(dataset, ids, classes, tmp_path):
    MAKE[dataset](tmp_path)
    first = open_set(dataset, str(tmp_path), "val", untouched)
    path = first.labels[first.order[0]]
    width = first[0][1].shape[1]
    row = torch.tensor(ids).repeat(width)[:width]
    to_pil_image(row.expand(1, first[0][1].shape[0], -1).byte().contiguous()).save(path)
    assert first[0][1][0, : len(ids)].tolist() == classes


def test_images_come_in_the_order_of_their_names(tmp_path):
    found = open_set("cityscapes", str(make_cityscapes(tmp_path)), "train", untouched)
    blue = [int(found[index][0][2].float().mean()) // 10 for index in range(len(found))]
    assert blue == [0, 2, 4, 1, 3]  # town0's, then town1's


def test_sbd_adds_the_images_that_voc_does_not_hold(tmp_path):
    io = pytest.importorskip("scipy.io")
    folder, sbd = make_voc(tmp_path / "voc"), tmp_path / "sbd"
    for name in ("img", "cls"):
        (sbd / name).mkdir(parents=True)
    lists = {"train": ["2008_new0", "2007_val0", "2007_train1"], "val": ["2008_new1", "2007_val1"]}
    for split, names in lists.items():
        (sbd / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            to_pil_image(torch.zeros(3, 20, 30, dtype=torch.uint8)).save(sbd / "img" / f"{name}.jpg")
            io.savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": torch.full((20, 30), 7).byte().numpy()}})
    both = open_set("voc", str(folder), "train", untouched, str(sbd))
    names = sorted(Path(path).stem for path in both.images)
    assert names == [*(f"2007_train{index}" for index in range(5)), "2008_new0", "2008_new1"]
    added = [both[index][1] for index in range(7) if "new" in str(both.images[both.order[index]])]
    assert all(mask.shape == (20, 30) and (mask == 7).all() for mask in added)
    with pytest.raises(ValueError, match=r"data.sbd: expected img, cls, train.txt and val.txt below .*nowhere"):
        open_set("voc", str(folder), "train", untouched, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind", ["checkpoint", "torchvision"])
def test_pretrained_weights_arrive_in_both_recipes(kind, tmp_path):
    source = get_model("resnet18")
    prefix = "encoder.0." if kind == "checkpoint" else ""
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state} if kind == "checkpoint" else state, tmp_path / "weights.pth")
    pretrained = f"--model.pretrained={tmp_path / 'weights.pth'}"
    made = segmentation("camvid", tmp_path, tmp_path, pretrained)
    assert isinstance(made.trainer.strategy.checkpoint_io, WholeFiles)
    fcn = made.model.net.backbone
    probe = linear(tmp_path, tmp_path, pretrained).model.backbone
    for network in (fcn, probe):
        found = network.state_dict()
        assert len(found) == 120
        for key, value in found.items():
            assert torch.equal(value, source.state_dict()[key]), key
    with pytest.raises(ValueError, match=r"model.pretrained for resnet34: .*weights.pth does not fit"):
        segmentation("camvid", tmp_path, tmp_path, pretrained, "--model.backbone=resnet34")


# --- bad input --------------------------------------------------------------------------------------------------------


def label_of_another_id(root: Path) -> None:
    to_pil_image(torch.tensor([[12, 13, 40] + [0] * 61] * 48)[None].byte()).save(root / "labels/train/2.png")


def label_of_another_size(root: Path) -> None:
    to_pil_image(torch.zeros(1, 24, 32, dtype=torch.uint8)).save(root / "labels/train/2.png")


def label_in_colours(root: Path) -> None:
    to_pil_image(torch.zeros(3, *SIZE, dtype=torch.uint8)).save(root / "labels/train/2.png")


def no_label(root: Path) -> None:
    (root / "labels/train/2.png").unlink()


def no_image(root: Path) -> None:
    (root / "images/train/2.jpg").unlink()


def broken_image(root: Path) -> None:
    path = root / "images/train/2.jpg"
    path.write_bytes(path.read_bytes()[:300])


def broken_label(root: Path) -> None:
    path = root / "labels/train/2.png"
    path.write_bytes(path.read_bytes()[:60])


def no_images_at_all(root: Path) -> None:
    for path in [*root.glob("images/train/*"), *root.glob("labels/train/*")]:
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (label_of_another_id, r"data.folder: expected ids among 0..11 in .*labels/train/2.png, got 12..13, 40"),
        (label_of_another_size, r"labels/train/2.png is 32x24 pixels, its image .*images/train/2.jpg 64x48"),
        (label_in_colours, r"expected ids in one channel of 8 bits in .*labels/train/2.png, got mode RGB"),
        (no_label, r"5 images, 1 are missing; the first is .*labels/train/2.png, of the image .*images/train/2.jpg"),
        (no_image, r"labels/train/2.png labels an image that is not in .*images/train \(1 such labels\)"),
        (broken_image, r"images/train/2.jpg or .*labels/train/2.png cannot be read: "),
        (broken_label, r"images/train/2.jpg or .*labels/train/2.png cannot be read: "),
        (no_images_at_all, r"data.folder: expected images/train/\*.jpg .* found no image"),
    ],
)
def test_bad_labels_are_named(damage, message, tmp_path):
    folder = make_camvid(tmp_path)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        open_set("camvid", str(folder), "train", untouched)[2]


def test_a_list_that_names_a_missing_image(tmp_path):
    (make_voc(tmp_path) / "VOCdevkit/VOC2012/JPEGImages/2007_val1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 listed images are missing; the first is .*2007_val1.jpg"):
        open_set("voc", str(tmp_path), "val", untouched)


@pytest.mark.parametrize("dataset", MAKE)
def test_a_folder_of_another_layout(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"data.folder: expected .*train.* below .*nowhere"):
        open_set(dataset, str(tmp_path / "nowhere"), "train", untouched)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.classes=12"], r"model.classes: expected 11, the classes of camvid, got 12"),
        (["--data.batch_size=6"], r"data.batch_size: .*at most the 5 images .*got 6"),
        (["--data.batch_size=0"], r"data.batch_size: .*got 0"),
        (["--data.scale=[2,1]"], r"data.scale: expected 0 < smallest <= largest, got \(2.0, 1.0\)"),
        (["--data.sbd=x"], r"data.sbd: expected none for camvid"),
        (["--trainer.max_epochs=-1"], r"trainer: expected a budget, max_epochs or max_steps"),
        (["--model.backbone=resnet19"], r"model.backbone: .*got 'resnet19'"),
        (["--model.pretrained=/no/such.pth"], r"model.pretrained: .*/no/such.pth"),
    ],
)
def test_bad_settings_stop_before_training(args, message, tmp_path):
    folder = make_camvid(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        fit(lambda: segmentation("camvid", folder, tmp_path, *args))


def test_test_labels_that_are_not_public(tmp_path):
    made = segmentation("cityscapes", make_cityscapes(tmp_path / "data"), tmp_path)
    with pytest.raises(ValueError, match="the test labels of cityscapes are not public: run validate"):
        made.trainer.test(made.model, made.datamodule)


def one_class_less(root: Path) -> None:
    (root / "val/n00000003/0.JPEG").unlink()
    (root / "val/n00000003").rmdir()


def empty_class(root: Path) -> None:
    (root / "val/n00000003/0.JPEG").unlink()


def broken_photo(root: Path) -> None:
    for path in root.glob("train/n00000003/*"):
        path.write_bytes(b"no photo")


def no_folder(root: Path) -> None:
    root.rename(root.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "args", "message"),
    [
        (one_class_less, [], r"expected the same classes in .*train and .*val, got 1 in one alone, .*n00000003"),
        (empty_class, [], r"data.folder: expected a folder of photos for each class in .*val: .*n00000003"),
        (broken_photo, [], r"data.folder: .*train/n00000003/\d.JPEG cannot be read"),
        (no_folder, [], r"data.folder: expected a folder of photos for each class in .*data/train"),
        (None, ["--model.classes=1000"], r"model.classes: expected 6, the folders of .*data/train, got 1000"),
        (None, ["--model.lr_at_256=0"], r"model.lr_at_256: expected a positive learning rate, got 0"),
        (None, ["--data.batch_size=13"], r"data.batch_size: .*at most the 12 images of .*train, got 13"),
    ],
)
def test_bad_input_of_the_linear_probe(damage, args, message, tmp_path):
    folder = make_folders(tmp_path / "data")
    if damage is not None:
        damage(folder)
    with pytest.raises(ValueError, match=message):
        fit(lambda: linear(folder, tmp_path, "--trainer.max_epochs=1", *args))


def test_hidden_folders_are_no_classes_and_linked_ones_are(tmp_path):
    train = make_folders(tmp_path / "data") / "train"
    for place in (train, train / "n00000000"):
        shutil.copytree(train / "n00000001", place / ".ipynb_checkpoints")
    (train / "n00000006").symlink_to(train.parent / "val" / "n00000005", target_is_directory=True)
    (train / "n00000000" / "up").symlink_to(train / "n00000000", target_is_directory=True)
    found = open_folder(train, lambda image: image)
    assert found.classes == [f"n{number:08}" for number in range(7)]
    assert [label for _, label in found.samples] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


# --- the command line -------------------------------------------------------------------------------------------------


def test_fit_and_validate_from_the_command_line(tmp_path, monkeypatch):
    folder, out = make_camvid(tmp_path / "data"), tmp_path / "run"
    common = ["--config", str(RECIPES / CONFIGS["camvid"]), "--data.folder", str(folder), "--out", str(out), *TINY]

    def call(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["segmentation.py", *args])
        run(Segmentation, SegmentationData)

    start = tmp_path / "start.pth"
    torch.save(get_model("resnet18").state_dict(), start)
    common.append(f"--model.pretrained={start}")
    call("fit", *common, "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1")
    start.unlink()  # the checkpoint holds all weights
    with (out / "version_0" / "metrics.csv").open() as file:
        fitted = list(csv.DictReader(file))[-1]
    call("validate", *common, "--ckpt_path", str(out / "last.ckpt"))
    with (out / "version_1" / "metrics.csv").open() as file:
        validated = list(csv.DictReader(file))[-1]
    assert float(fitted["val/miou"]) == pytest.approx(float(validated["val/miou"]))
    last = ["--ckpt_path", str(out / "last.ckpt")]
    call("fit", *common, "--trainer.max_epochs=2", *last)
    assert torch.load(out / "last.ckpt", weights_only=True)["hyper_parameters"]["pretrained"] == str(start)
    for arguments, message in (
        (
            ["--model.lr=0.5", *last],
            r"model.lr: the model in .*last.ckpt has 0.05, got 0.5; continue with --model.lr 0.05",
        ),
        (["--ckpt_path", str(start)], r"ckpt_path: expected a checkpoint of this recipe, got .*no such file"),
        (["--ckpt_path", str(RECIPES / CONFIGS["camvid"])], r"ckpt_path: expected .*which is none or is damaged"),
    ):
        with pytest.raises(SystemExit, match=rf"^error: {message}"):
            call("fit", *common, *arguments)
    # The data are looked for before the weights are.
    with pytest.raises(SystemExit, match=r"^error: data.folder: expected a folder, got .*nowhere: there is no such"):
        call("fit", *common, "--model.pretrained=/no/such.pth", "--data.folder", str(tmp_path / "nowhere"))
