"""The probe of a run: its values, its images, and that the run does not feel it."""

import copy
import csv
import io
import itertools
import logging
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from making import TINY, cli
from PIL import Image
from pytorch_lightning.callbacks import Callback
from safetensors.torch import load_file
from torch import nn

from densessl.evaluation import correspondence_accuracy, linear_segmentation, nearest_neighbor_segmentation
from examples.pretrain.common import backbones
from examples.pretrain.common import probe as probe_module
from examples.pretrain.common.bar import RunBar
from examples.pretrain.common.cli import main
from examples.pretrain.common.data.sources import FolderSource
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.pictures import heat, similarity
from examples.pretrain.common.probe import DenseProbe
from examples.pretrain.common.report.callback import RunReport
from examples.pretrain.common.samples import read_labels, read_squares
from examples.pretrain.common.scores import Form, frozen, recoloured, scores, settled
from examples.pretrain.pixpro import PixPro, recipe

FORM = Form(3, 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def draw(path: Path, index: int, size: tuple[int, int] = (40, 56)) -> None:
    """A photo of soft noise, a function of the number."""
    noise = np.random.default_rng(index).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size[::-1], Image.BILINEAR).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for index in range(24):
        draw(root / f"class{index % 2}" / f"{index:02}.png", index)
    return root


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    """Images with masks of two halves, the right one of class 2; a corner is ignored."""
    root = tmp_path_factory.mktemp("labelled")
    for index in range(6):
        draw(root / "images" / f"{index}.png", index, (36, 48))
        mask = np.zeros((36, 48), np.uint8)
        mask[:, 24:], mask[:6, :6] = 2, 255
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")
    return root


def made_run(folder: Path, out: Path, *args: str):
    return cli(PixPro, *TINY, "--data.folder", str(folder), "--data.size=32", "--data.batch_size=4",
               "--data.workers=0", "--out", str(out), "--trainer.accelerator=cpu", "--trainer.max_steps=6",
               "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
               "--trainer.log_every_n_steps=1", *args)  # fmt: skip


def fit(folder: Path, out: Path, *args: str):
    made = made_run(folder, out, *args)
    made.fit()
    return made


def probe_of(made) -> DenseProbe:
    return next(callback for callback in made.trainer.callbacks if isinstance(callback, DenseProbe))


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_values_are_those_of_the_library(folder, labelled, tmp_path):
    made = fit(folder, tmp_path, "--probe.images=5", "--probe.every_n_steps=3", f"--probe.labels={labelled}")
    probe = probe_of(made)
    assert [row["step"] for row in probe.readings] == [0, 3, 6]
    backbone = copy.deepcopy(backbone_of(made.method)).eval()
    mean, std = (torch.tensor(made.config.data[name]).view(3, 1, 1) for name in ("mean", "std"))

    def features(images):
        return backbone((images.float() / 255 - mean) / std)

    photos = read_squares(held_out_of(folder, 5), 3, 32)
    fitted, tested, classes = read_labels(str(labelled), 3, 32)[:3]
    assert (len(fitted), len(tested), classes) == (3, 3, 3)
    expected = {
        "pck": correspondence_accuracy(features, photos, distances=(1.0,))[1.0],
        "pck_colour": correspondence_accuracy(features, photos, distances=(1.0,), photometric=recoloured)[1.0],
        "neighbors": nearest_neighbor_segmentation(features, fitted, tested, classes, cells=10_000),
        "linear": linear_segmentation(features, fitted, tested, classes, steps=100),
    }
    assert {k: v for k, v in probe.readings[-1].items() if k != "step"} == pytest.approx(expected, abs=1e-6)
    for step, reading in ((0, 0), (3, 1), (6, 2)):
        logged = [row for row in rows(tmp_path) if row["probe/pck"] and int(row["step"]) == step]
        assert float(logged[0]["probe/pck"]) == pytest.approx(probe.readings[reading]["pck"])
    assert made.trainer.progress_bar_metrics["probe/pck"] == pytest.approx(probe.readings[1]["pck"])
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_the_first_reading_is_of_a_network_whose_batch_norm_has_seen_the_photos(folder, tmp_path):
    made = fit(folder, tmp_path, "--probe.images=5", "--trainer.max_steps=1")
    probe, photos = probe_of(made), read_squares(held_out_of(folder, 5), 3, 32)
    born = backbone_of(made_run(folder, tmp_path / "fresh").method)
    found = []
    for backbone in (settled(born, photos, probe.form), born):
        with frozen(backbone, probe.form) as features:
            found.append(scores(features, photos))
    assert {k: v for k, v in probe.readings[0].items() if k != "step"} == pytest.approx(found[0])
    assert found[1] != pytest.approx(found[0])


def held_out_of(folder: Path, count: int) -> list[Path]:
    source = FolderSource(str(folder))
    source.hold_out(count)
    return source.held_out()


def test_the_training_is_the_same_bit_for_bit(folder, labelled, tmp_path):
    """Batch norm's statistics, modes and generators too: the probe with labels draws and trains a layer of its own."""
    one = fit(folder, tmp_path / "on", "--probe.images=4", "--probe.every_n_steps=3", f"--probe.labels={labelled}")
    other = fit(folder, tmp_path / "off", "--probe.images=4", "--probe.every_n_steps=0")
    assert len(probe_of(one).readings) == 3
    assert not probe_of(other).readings
    for (name, a), (_, b) in zip(one.method.state_dict().items(), other.method.state_dict().items(), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
    on, off = ([row["loss"] for row in rows(tmp_path / name) if row["loss"]] for name in ("on", "off"))
    assert on == off
    assert not (tmp_path / "off" / "best.safetensors").exists()


def test_what_is_held_out_depends_on_the_list_alone_and_is_never_trained_on(folder, tmp_path):
    held, again = held_out_of(folder, 5), held_out_of(folder, 5)
    assert held == again
    assert len(set(held)) == 5
    made = fit(folder, tmp_path, "--probe.images=5", "--probe.every_n_steps=0")
    assert not set(made.data._loader.dataset.paths) & set(held)
    assert len(made.data._loader.dataset.paths) == 19
    few = FolderSource(str(folder))
    few.hold_out(None)
    assert few.held_out() == []  # of fewer than 100
    assert few.count(1, 0) == 24
    many = tmp_path / "many"
    many.mkdir()
    for index in range(120):
        (many / f"{index}.jpg").touch()
    tenth = FolderSource(str(many))
    tenth.hold_out(None)
    assert len(tenth.held_out()) == 12
    assert tenth.count(1, 0) == 108


def test_the_best_is_kept_and_a_run_that_makes_things_worse_is_told_of(tmp_path, caplog):
    probe, backbone = DenseProbe(None, FORM, str(tmp_path)), nn.Conv2d(3, 4, 1)
    values = iter([0.5, 0.6, 0.4, 0.45, 0.3, 0.2])

    def read(step: int) -> None:
        backbone.bias.data.fill_(step)
        value = next(values)
        probe.readings.append({"step": step, "pck": value})
        if value > max((row["pck"] for row in probe.readings[:-1]), default=-1.0):
            probe._keep(backbone)
        probe._judge()

    with caplog.at_level(logging.WARNING):
        for step in range(4):
            read(step)
        assert not caplog.text
        read(4)
        assert "was 0.400, 0.450, 0.300 in the last three readings, below the 0.500" in caplog.text
        assert "of step 1" in caplog.text
        read(5)
    assert caplog.text.count("worse") == 1
    assert float(load_file(tmp_path / "best.safetensors")["bias"][0]) == 1.0
    assert (tmp_path / "best.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_fall_of_one_score_is_told_without_advice_where_another_rose(tmp_path, caplog):
    def told(**last: float) -> str:
        probe = DenseProbe(None, FORM, str(tmp_path))
        probe.readings = [{"step": step, "pck": 0.5, "linear": 0.6} for step in range(4)]
        for row in probe.readings[1:]:
            row.update(last)
        caplog.clear()
        probe._judge()
        return caplog.text

    with caplog.at_level(logging.WARNING):
        assert told(pck=0.496) == ""  # within the noise
        assert "use adapt.py" in told(pck=0.4)
        assert "use adapt.py" in told(pck=0.4, linear=0.604)
        mixed = told(pck=0.4, linear=0.65)
    assert "was 0.400, 0.400, 0.400 in the last three readings, below the 0.500" in mixed
    assert "the linear probe rose by 0.050" in mixed
    assert "best.safetensors goes by pck alone" in mixed
    assert "adapt.py" not in mixed
    assert "worse" not in mixed


def test_a_continued_run_compares_itself_with_its_own_start(folder, tmp_path):
    options = ["--probe.images=4", "--probe.every_n_steps=2", "--save_every_n_steps=3"]
    whole = fit(folder, tmp_path / "whole", *options)
    fit(folder, tmp_path / "part", *options, "--trainer.max_steps=3")
    again = fit(folder, tmp_path / "part", *options, "--trainer.max_steps=3", "--extend_to=6", "--ckpt_path=last")
    readings = probe_of(again).readings
    assert readings[0] == probe_of(whole).readings[0]
    assert [row["step"] for row in readings] == [
        0,
        2,
        4,
        6,
    ]  # the one at the end of the first part came after its checkpoint


def test_frozen_gives_everything_back(folder, labelled):
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU())
    backbone[2].eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    photos = read_squares(held_out_of(folder, 3), 3, 32)
    state = torch.get_rng_state()
    copied = settled(backbone, photos, FORM)
    with frozen(copied, FORM) as features:
        found = scores(features, photos, read_labels(str(labelled), 3, 32))
    assert set(found) == {"pck", "pck_colour", "neighbors", "linear"}
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in backbone] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    images = (torch.stack(photos).float() / 255 - torch.tensor(FORM.mean).view(3, 1, 1)) / torch.tensor(FORM.std).view(
        3, 1, 1
    )
    of_photos = backbone[0](images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(copied[1].running_mean, of_photos.mean(1))  # filled in the copy
    assert settled(copied, photos, FORM) is copied
    backbone[1].running_mean.fill_(0.1)  # read from a file that does not say how many batches were seen
    assert settled(backbone, photos, FORM) is backbone
    kept, _ = backbones.make_backbone("resnet18", "layer2", "random", 32, freeze_statistics=True)
    assert settled(kept, photos, FORM) is kept  # the training keeps its statistics too


def test_colours_change_alike_at_every_reading():
    for channels in (1, 3, 5):
        images = torch.randint(0, 256, (4, channels, 9, 7), dtype=torch.uint8)
        changed = recoloured(images)
        assert changed.dtype == torch.uint8
        assert changed.shape == images.shape
        assert torch.equal(changed, recoloured(images))
        assert not torch.equal(changed, images)


def test_pictures_of_features():
    maps = torch.randn(2, 6, 3, 5)
    cosine = similarity(maps[0], 7)
    assert float(cosine.flatten()[7]) == pytest.approx(1)
    colours = heat(cosine, float(cosine.min()))
    assert colours.shape == (3, 3, 5)
    assert colours.flatten(1).sum(0).argmax() == 7  # the cell itself is the brightest
    assert torch.equal(heat(torch.tensor([[0.2]]), 0.2), heat(torch.tensor([[0.7]]), 0.7))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--probe.images=-1"], "probe.images: expected at least 0, got -1"),
        (["--probe.images=13"], "probe.images: expected at most half of the 24 images .*, got 13"),
        (["--probe.every_n_steps=-2"], "probe.every_n_steps: expected at least 0, got -2"),
        (["--probe.score=linear"], "probe.score: linear needs probe.labels"),
        (["--probe.images=4", "--probe.photos=/no/such"], "probe.photos: expected a folder"),
        (["--probe.images=4", "--probe.labels=/no/such"], "probe.labels: expected the folders images and masks"),
    ],
)
def test_bad_input_stops_before_training(args, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(folder, tmp_path, *args)


class Ends(Callback):
    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.at.append(time.perf_counter())


def test_rates_and_time_left_are_without_the_probe(folder, tmp_path, monkeypatch):
    """The first reading, before step 1, made a short run look hours long."""
    slept, ends = [], Ends()

    def slow(features, photos, labels):
        time.sleep(1.0)
        slept.append(time.perf_counter())
        return {"pck": 0.5, "pck_colour": 0.5}

    monkeypatch.setattr(probe_module, "scores", slow)
    made = made_run(folder, tmp_path, "--probe.every_n_steps=2", "--probe.images=4", "--trainer.max_steps=3",
                    "--trainer.enable_progress_bar=true")  # fmt: skip
    made.trainer.callbacks.insert(0, ends)
    made.fit()
    bar, report = (next(c for c in made.trainer.callbacks if isinstance(c, kind)) for kind in (RunBar, RunReport))
    training = ends.at[-1] - slept[0]
    assert len(slept) == 3  # before step 1, after step 2, at the end
    assert 0 < 3 * bar.per_step <= training + 0.5  # with the second, since more will come
    with (tmp_path / "metrics.csv").open() as file:
        speeds = [float(row["speed/images_per_s"]) for row in csv.DictReader(file) if row["speed/images_per_s"]]
    assert len(speeds) == 3
    assert sum(4 / speed for speed in speeds) <= training - 1.0 + 0.5
    assert report.begun <= slept[0] - 1.0  # the time of the run has all of the probe's in it
    assert "over the whole time, the probe's included" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("steps", [4, 5])  # the last reading is taken after the last step, or when the run has ended
def test_the_bar_shows_the_newest_reading(steps, folder, tmp_path, monkeypatch):
    counted = itertools.count()
    monkeypatch.setattr(probe_module, "scores", lambda *_: {"pck": next(counted) / 100, "pck_colour": 0.5})
    made = made_run(folder, tmp_path, "--probe.every_n_steps=2", "--probe.images=4", f"--trainer.max_steps={steps}",
                    "--trainer.enable_progress_bar=true")  # fmt: skip
    bar = next(c for c in made.trainer.callbacks if isinstance(c, RunBar))
    bar.file, bar.seconds = io.StringIO(), 0
    made.fit()
    lines = bar.file.getvalue().splitlines()
    shown = [re.search(r"pck ([\d.]+)", line)[1] for line in lines]
    assert shown == ["0", "0.01", "0.01", "0.02", *(["0.02", "0.03"] if steps == 5 else ["0.02"])]


@pytest.mark.parametrize("command", ["fit", "preview"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.folder=/no/such"], "data.folder: expected a folder, got /no/such"),
        (["--data.folder=/no/such.txt"], "data.folder: expected a folder, got /no/such.txt"),
        (["--probe.images=13"], "probe.images: expected at most half of the 24 images"),
        (["--probe.photos=/no/such"], "probe.photos: expected a folder, got /no/such"),
        (["--probe.labels=/no/such"], "probe.labels: expected the folders images and masks"),
    ],
)
def test_folders_are_looked_for_before_weights_are_read(command, args, message, folder, tmp_path, monkeypatch):
    """Weights may take minutes to load or download, and need not be read for a run that cannot begin."""

    def slow(*parts, **options):
        raise AssertionError("the weights were read first")

    monkeypatch.setattr(backbones, "make_model", slow)
    base = [*TINY, "--data.folder", str(folder), "--out", str(tmp_path), "--trainer.max_steps=1"]
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(recipe(), [command, *base, *args])


def test_labels_that_do_not_fit(labelled, tmp_path):
    def with_mask(mask: np.ndarray) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for index in range(2):
            draw(root / "images" / f"{index}.png", index, (36, 48))
            (root / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(root / "masks" / f"{index}.png")
        return str(root)

    with pytest.raises(ValueError, match=r"probe.labels: expected masks of class numbers .* RGB"):
        read_labels(with_mask(np.zeros((36, 48, 3), np.uint8)), 3, 32)
    with pytest.raises(ValueError, match=r"probe.labels: expected a mask of the image's size, got \(35, 48\)"):
        read_labels(with_mask(np.zeros((35, 48), np.uint8)), 3, 32)
    with pytest.raises(ValueError, match=r"probe.labels: expected masks of at least 2 classes, got none in .*; 255"):
        read_labels(with_mask(np.full((36, 48), 255, np.uint8)), 3, 32)
    halves = np.zeros((36, 48), np.uint8)
    halves[:, 24:] = 255
    seven = with_mask(np.where(halves == 255, 7, halves))
    assert read_labels(seven, 3, 32).classes == 8
    Path(seven, "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"probe.labels: expected numbers 0..1 of the lines of .*, got 7 in .*png"):
        read_labels(seven, 3, 32)
    Path(seven, "classes.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"probe.labels: expected at least 2 classes, a line each, .* got 1"):
        read_labels(seven, 3, 32)
    missing = with_mask(np.zeros((36, 48), np.uint8))
    (Path(missing) / "masks" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"probe.labels: expected the mask of .*1.png"):
        read_labels(missing, 3, 32)
