"""The preview of a run: its counts, its warnings, its files."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from making import TINY, drawing
from PIL import Image

from densessl import View
from examples.pretrain.common.cli import main
from examples.pretrain.common.preview import look, speed
from examples.pretrain.common.preview.draw import joined, outlined, seen
from examples.pretrain.common.preview.look import crop_sides, draw_pairs, look_at_files, share_without_data
from examples.pretrain.common.preview.page import numbers, warnings
from examples.pretrain.common.preview.speed import Speed
from examples.pretrain.common.scores import Form
from examples.pretrain.pixpro import recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve photos, one smaller than the views, one cut off in the middle, one no photo."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        size = (24, 20) if index == 3 else (72, 48)
        Image.fromarray(noise).resize(size, Image.BILINEAR).save(root / f"{index:02}.jpg")
    (root / "rubbish.jpg").write_bytes(b"no photo")
    whole = (root / "05.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[:-60])
    return root


def test_files_are_counted(folder):
    files = look_at_files(sorted(folder.iterdir()), 2, 32)
    assert (files.found, files.held_out, files.looked_at, files.small) == (14, 2, 14, 1)
    assert [path.name for path in files.unreadable] == ["rubbish.jpg"]
    assert files.sides == (72, 48)


def test_pairs_are_those_of_the_run(folder):
    paths = sorted(folder.iterdir())
    draw = drawing(redraws=4, scale=(0.02, 0.1))
    pairs, drawn, unreadable = draw_pairs(paths, draw, 3, (7, 7), 0.7, False)
    assert {path.name for path in unreadable} >= {"rubbish.jpg"}
    assert draw.redraws == 4
    assert pairs.unmatched > pairs.unmatched_redrawn + 0.2
    assert pairs.enlarged == 1  # at most a tenth of 72 x 48 px for 32 px
    assert pairs.nodata == 0
    assert pairs.drawn == sum(len(photo.pairs) for photo in drawn)
    index = paths.index(next(path for path in paths if path.name == drawn[0].name))
    image = drawn[0].image
    again = draw(image, drawn[0].name, 1, index)  # of epoch 1
    assert torch.equal(again.view1.image, drawn[0].pairs[1].view1.image)


@pytest.mark.parametrize(("images", "most"), [(8, 400), (400, 204)])
def test_the_loader_is_timed_without_what_it_had_ready(images, most, monkeypatch):
    """Of two workers that read 100 images/s each, whatever they have read before the clock starts."""

    class Slow(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return images

        def __getitem__(self, index: int) -> int:
            time.sleep(0.01)
            return index

    def loader(*parts, batch_size, workers, **options):
        return torch.utils.data.DataLoader(Slow(), batch_size, num_workers=workers, persistent_workers=True)

    monkeypatch.setattr(speed, "SECONDS", 1.0)
    source = SimpleNamespace(loader=loader)
    run = SimpleNamespace(data=SimpleNamespace(batch_size=4, workers=2, source=source, draw=None, channels=3))
    rate, first = speed.time_loader(run, images)
    assert 0 < rate < most
    assert first.tolist() == [0, 1, 2, 3]


def test_the_side_of_a_crop_and_the_share_outside():
    coords = torch.tensor([[0.5, 0, 0.25], [0, 0.25, 0], [0, 0, 1.0]])
    view = View(torch.zeros(3, 8, 8), coords, torch.tensor([40, 90]))
    assert float(crop_sides(view)) == pytest.approx((45 * 10) ** 0.5)
    assert share_without_data(view) == 0
    half = View(view.image, torch.tensor([[1.0, 0, 0.5], [0, 1, 0], [0, 0, 1.0]]), view.source_size)
    assert share_without_data(half) == pytest.approx(0.5)


def test_pictures():
    view = View(torch.randn(1, 3, 8, 8), torch.eye(3)[None], torch.tensor([[40, 90]]))
    form = Form(3, 8, (0.5,) * 3, (0.5,) * 3)
    flat = view._replace(image=torch.full((1, 3, 8, 8), -1.0))
    assert np.asarray(seen(flat, form)[0]).max() == 0  # -1 is black before the normalisation
    assert np.asarray(seen(flat._replace(image=-flat.image), form)[0]).min() == 255
    single = View(*(part[0] for part in view))
    picture = outlined(torch.zeros(3, 40, 90, dtype=torch.uint8), [(single, single)])
    assert picture.size == (420, 187)
    one, other = seen(view, form) * 2
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1, 4] = True
    assert not np.array_equal(np.asarray(joined(one, other, mask, (2, 3))),
                              np.asarray(joined(one, other, mask & False, (2, 3))))  # fmt: skip


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(look, "PAIRS", 48)


def options(folder: Path) -> list[str]:
    return [*TINY, "--data.folder", str(folder), "--data.size=32", "--data.batch_size=4", "--data.workers=0",
            "--trainer.accelerator=cpu"]  # fmt: skip


def test_the_command_writes_a_page_and_pictures_and_leaves_the_run_alone(folder, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(f"out: {tmp_path / 'run'}\n")
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    (tmp_path / "metrics.csv").write_text("of a run")
    main(recipe(), ["preview", *options(folder), "--config", str(tmp_path.parent / "own.yaml"),
                    "--trainer.max_steps=5000", "--data.redraws=1", "--probe.images=2"])  # fmt: skip
    assert (tmp_path / "metrics.csv").read_text() == "of a run"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "preview"}
    text = (tmp_path / "preview" / "preview.html").read_text()
    assert text.count("data:image/png;base64,") >= 12
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing from elsewhere
    assert "rubbish.jpg" in text
    names = {path.name for path in (tmp_path / "preview").glob("*.png")}
    assert {"crops-1.png", "views-1.png", "draw-4-crops.png"} <= names
    printed = capsys.readouterr().out
    for name in ("images to train on", "pairs that match nothing", "loader", "probe", "the run will take", "memory"):
        assert name in printed
        assert name in text
    assert "12 images are fewer than 20 batches" in printed
    assert "more than 300" in printed  # 5,000 steps of 4
    assert "map of a view                   4 x 4 cells" in printed
    assert "WARNING: The map of a view has 4 x 4 cells" in printed
    assert "26 readings of " in printed  # at the start and every 200 of 5,000 steps
    assert " for the probe" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--trainer.max_epochs=1", "--data.batch_size=99"],
            "error: data.batch_size: expected 1 to 14, the images of",
        ),
        (["--trainer.max_epochs=-1"], "error: trainer: expected a budget"),
        (["--trainer.max_epochs=1", "--data.folder=a.tar", "--data.images=9"], "error: preview: expected a folder of"),
        (["--trainer.max_epochs=1", "--data.folder=/no/such"], "error: data.folder: expected a folder"),
        (["--trainer.max_epochs=1", "--out="], "error: out: expected the name of a folder, got none"),
        (
            ["--trainer.max_epochs=1", f"--out={__file__}"],
            "error: out: expected a folder .*test_preview.py/preview: Not",
        ),
        (["--trainer.max_epochs=1", "--ckpt_path=last"], "error: ckpt_path: a preview is of a run that begins"),
    ],
)
def test_bad_input_is_one_line(args, message, folder, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(recipe(), ["preview", *options(folder), "--out", str(tmp_path), *args])


@pytest.mark.parametrize("option", ["--backbone.init=/no/such.pth", "--data.batch_size=99"])
def test_a_preview_that_cannot_begin_leaves_no_folder(option, folder, tmp_path):
    with pytest.raises(SystemExit, match=option.partition("=")[0].strip("-")):
        main(recipe(), ["preview", *options(folder), "--out", str(tmp_path / "run"), "--trainer.max_epochs=1", option])
    assert not (tmp_path / "run").exists()


def test_warnings_name_what_is_off_alone():
    from jsonargparse import Namespace

    data = Namespace(
        size=64, batch_size=8, scale=(0.2, 1.0), redraws=2, photometric="device", preset="mocov2", workers=1
    )
    config = Namespace(data=data, backbone=Namespace(init="random"))
    files = look_at_files([], 0, 64)._replace(found=5000)
    pairs = draw_pairs_of(unmatched_redrawn=0.05)
    taken = Speed(100.0, 0.5, 8, 2**30, "CPU", 1000, 0.5, 1, 0, 0.0)
    cells = (7, 7)
    assert warnings(config, files, pairs, taken, cells) == []
    assert warnings(config, files, pairs, taken, (4, 5)) == []
    assert (
        "14% of the pairs share no cell"
        in warnings(config, files, draw_pairs_of(unmatched_redrawn=0.14), taken, cells)[0]
    )
    assert "30% of the crops" in warnings(config, files, draw_pairs_of(enlarged=0.3), taken, cells)[0]
    few = warnings(config, files._replace(found=100), pairs, taken, cells)[0]
    assert "100 images are fewer than 20 batches of 8" in few
    assert "begin from weights" in few
    config.backbone.init = "weights.pth"
    assert "begin from weights" not in warnings(config, files._replace(found=100), pairs, taken, cells)[0]
    data.preset = "byol"
    assert "details below some 12 px" in warnings(config, files, draw_pairs_of(shrinking=3.0), taken, cells)[0]
    small, _ = warnings(config, files, pairs, taken, (4, 4))
    assert "map of a view has 4 x 4 cells, one for" in small
    assert "data.size (now 64)" in small
    assert "backbone.layer" not in small  # of a backbone that has no such option
    config.backbone.layer = "layer4"
    assert "backbone.layer (now layer4)" in warnings(config, files, pairs, taken, (4, 3))[0]


def test_the_hours_are_those_of_the_steps_and_of_the_probe():
    from jsonargparse import Namespace

    config = Namespace(data=Namespace(size=64, batch_size=8, redraws=0))
    files = look_at_files([], 0, 64)._replace(found=5000)
    taken = Speed(100.0, 0.5, 8, 2**30, "CPU", 1000, 0.5, 1, 0, 0.0)
    values = numbers(config, files, draw_pairs_of(), taken, (7, 7))
    assert (values["probe"], values["the run will take"]) == ("off", "30.0 minutes")
    probed = numbers(config, files, draw_pairs_of(), taken._replace(readings=6, reading=100.0), (7, 7))
    assert probed["probe"] == "6 readings of 100.00 s"
    assert probed["the run will take"] == "40.0 minutes, 10.0 minutes of them (25.0%) for the probe"


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(250, 50, 6), (250, 60, 6), (30, 200, 2), (1, 1, 2), (250, 0, 0)]
)
def test_the_probe_is_read_at_the_start_every_n_steps_and_at_the_end(steps, every, expected):
    reads = {0, steps, *range(every, steps + 1, every)} if every else set()
    assert speed.readings_of(steps, every) == len(reads) == expected


def test_one_reading_of_the_probe_is_timed(folder, tmp_path, monkeypatch):
    from making import cli

    from examples.pretrain.pixpro import PixPro

    def slow(features, photos, labels):
        features(torch.stack(photos))
        time.sleep(0.2)
        return {"pck": 0.5}

    monkeypatch.setattr(speed, "scores", slow)
    args = [*options(folder), "--trainer.max_steps=7", "--probe.every_n_steps=3", "--probe.images=2"]
    for index, (more, readings, least) in enumerate(
        [([], 4, 0.2), (["--probe.every_n_steps=0"], 0, 0.0), (["--probe.images=0"], 0, 0.0)]
    ):
        run = cli(PixPro, *args, *more, "--out", str(tmp_path / str(index)))
        before = [value.clone() for value in (*run.method.parameters(), *run.method.buffers())]
        watch = speed.probe_of(run)
        found = speed.time_probe(run, watch, 7, torch.device("cpu"))
        after = [*run.method.parameters(), *run.method.buffers()]
        assert found[0] == readings
        assert least <= found[1] < least + 2
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert watch.readings == []


def draw_pairs_of(**changed):
    from examples.pretrain.common.preview.look import Pairs

    return Pairs(100, 0.2, 0.05, 3.0, 0.0, 2.0, 0.0)._replace(**changed)
