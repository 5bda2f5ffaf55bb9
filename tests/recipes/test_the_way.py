"""The way of docs/own_images.md from the first look to a fine-tuned network, as a new user walks it."""

import base64
import csv
import io
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torchvision.models import resnet18

from densessl.export import main as export
from examples import evaluate
from examples.pretrain import adapt
from examples.pretrain.common.cli import main
from examples.transfer.common.command import TransferCLI
from examples.transfer.datasets.segmentation_data import SegmentationData
from examples.transfer.segmentation import Segmentation

ROOT = Path(__file__).parents[2]
STEPS = 24


def draw(path: Path, number: int, mask: Path | None = None) -> None:
    """A disc and a box on soft noise; in the mask they are the classes 1 and 2."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((80, 64), Image.BILINEAR)
    classes = Image.new("L", image.size, 0)
    for label, shape in ((1, "ellipse"), (2, "rectangle")):
        x, y, side = (int(value) for value in rng.integers((0, 0, 16), (50, 36, 28)))
        for picture, colour in ((image, tuple(int(value) for value in rng.integers(0, 256, 3))), (classes, label)):
            getattr(ImageDraw.Draw(picture), shape)((x, y, x + side, y + side), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    if mask is not None:
        mask.parent.mkdir(parents=True, exist_ok=True)
        classes.save(mask)


class Links(HTMLParser):
    """What a page takes from elsewhere, and the pictures that it holds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elsewhere: list[str] = re.findall(r"url\(|@import", page)
        self.pictures: list[Image.Image] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data"):
                kind, _, code = value.partition("base64,")
                if kind == "data:image/png;":
                    self.pictures.append(Image.open(io.BytesIO(base64.b64decode(code, validate=True))).convert("RGB"))
                else:
                    self.elsewhere.append(value)


def pictures_of(path: Path) -> list[Image.Image]:
    """The pictures of a page that takes nothing from elsewhere."""
    links = Links(path.read_text(encoding="utf-8"))
    assert not links.elsewhere
    return links.pictures


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_until_ctrl_c(arguments: list[str], table: Path) -> str:
    """Starts the program, presses Ctrl-C once there is a row with a loss, and gives what it said."""
    command = [sys.executable, "examples/pretrain/adapt.py", "fit", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    end = time.monotonic() + 120
    while not (table.is_file() and any(row.get("loss") for row in rows_of(table))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the readers too
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    return said


def commands_of(report: Path) -> dict[str, list[str]]:
    """The commands that a report names, in words without ``python PROGRAM``."""
    found = re.findall(r"^([\w-]+):\n\n    (.+)$", report.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: shlex.split(line)[1:] for name, line in found}


def probe_of(report: Path) -> dict[str, list[str]]:
    """The rows of the report's table of scores; the titles of its columns are ``score``."""
    found = re.findall(r"^\| (score|pck|pck_colour|neighbors|linear) \| (.+) \|$", report.read_text(), re.MULTILINE)
    return {name: values.split(" | ") for name, values in found}


def no_network(*args, **options):
    raise URLError(OSError(-2, "Name or service not known"))


@pytest.fixture
def place(tmp_path) -> Path:
    """Photos, other photos with masks, and weights to begin from."""
    for number in range(24):
        draw(tmp_path / "photos" / f"day{number % 2}" / f"{number:02}.png", number)
    for split, numbers in (("train", range(100, 104)), ("val", range(104, 107))):
        for number in numbers:
            names = (f"{split}/{number}.png",) * 2
            draw(tmp_path / "labelled/images" / names[0], number, tmp_path / "labelled/masks" / names[1])
    (tmp_path / "labelled" / "classes.txt").write_text("ground\ndisc\nbox\n")
    start = resnet18()
    start(torch.randn(8, 3, 64, 64))  # batch norm has seen something, as in all weights that one begins from
    torch.save(start.state_dict(), tmp_path / "start.pth")
    return tmp_path


def test_the_way(place, monkeypatch, capsys, caplog):
    monkeypatch.chdir(ROOT)
    out = place / "runs" / "own"
    options = ["--config", "examples/pretrain/configs/own_images.yaml", "--data.folder", str(place / "photos"),
               "--out", str(out), "--backbone.name", "resnet18", "--backbone.init", str(place / "start.pth"),
               "--data.size", "64", "--data.batch_size", "4", "--data.workers", "0", "--probe.images", "6",
               "--probe.labels", str(place / "labelled"), "--trainer.max_steps", str(STEPS),
               "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]  # fmt: skip

    # Look, before.
    main(adapt.recipe(), ["preview", *options])
    assert [path.name for path in out.iterdir()] == ["preview"]
    assert len(pictures_of(out / "preview" / "preview.html")) == 2 * 6 + 2 * 4
    for path in (out / "preview").glob("*.png"):
        Image.open(path).load()
    printed = capsys.readouterr().out
    for line in (
        r"images to train on +18",
        r"kept for the probe +6",
        r"labelled for the probe +\d+ to fit on, \d+ to test on, \d classes",
        rf"steps +{STEPS} of 4",
        r"map of a view +2 x 2",
    ):
        assert re.search(line, printed)

    # Watch, during; and stop.
    said = run_until_ctrl_c([*options, "--data.workers", "1"], out / "metrics.csv")
    for line in ("adapt.py (PixContrast with an instance loss) on ", "img/s", "pck ", "Stopped by SIGINT", "report: "):
        assert line in said
    for noise in ("Tip", "deprecated", "FLOPs", "Warning", "GPU available"):
        assert noise not in said
    stopped_at = torch.load(out / "checkpoints" / "last.ckpt", weights_only=False)["global_step"]
    first = next(row for row in rows_of(out / "metrics.csv") if row["loss"])
    assert 9 >= int(first["step"]) < stopped_at < STEPS
    for name in ("lr-AdamW/pg1", "momentum", "speed/images_per_s", "health/std_times_sqrt_c"):
        assert float(first[name]) > 0
    report = (out / "report.md").read_text()
    assert report.startswith(
        f"# adapt.py (PixContrast with an instance loss): stopped after {stopped_at} of {STEPS} steps\n"
    )
    assert "by the user" in report
    assert "The labels have 3 classes." in report
    before = probe_of(out / "report.md")
    assert before["score"][0] == "before (step 0)"
    assert before["score"][-1] in ("before (step 0)", f"after ({stopped_at})")  # read at the stop where that is quick

    # Continue, with the command of the report.
    command = commands_of(out / "report.md")["continue"]
    assert command[0] == "examples/pretrain/adapt.py"
    caplog.clear()
    main(adapt.recipe(), [*command[1:], "--data.workers", "0"])  # no reader of this test lives on in later ones
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []

    # Know, after.
    after = probe_of(out / "report.md")
    assert after["score"][0::2] == ["before (step 0)", f"after ({STEPS})"]
    assert {name: row[0] for name, row in after.items()} == {name: row[0] for name, row in before.items()}
    start = next(row for row in rows_of(out / "metrics-1.csv") if row["probe/pck"])
    assert all(f"{float(start[f'probe/{name}']):.3f}" == row[0] for name, row in after.items() if name != "score")
    assert len(pictures_of(out / "report.html")) == 4 * 5
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5
    assert all(value in page for name in ("pck", "linear") for value in after[name])
    assert all(Image.open(path).size == (5 * 192 + 4 * 6, 192) for path in (out / "report").glob("photo-[1-4].png"))
    weights = {name: load_file(out / f"{name}.safetensors") for name in ("best", "encoder")}
    for state in weights.values():
        assert resnet18().load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]

    # Evaluate, export and fine-tune, with the commands of the report.
    commands = commands_of(out / "report.md")
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    found = evaluate.main(commands["evaluate"][1:])
    assert list(found) == ["this file", "its start", "random"]
    for name in ("pck", "pck_colour", "neighbors", "linear"):
        assert f"{found['its start'][name]:.3f}" == after[name][0]
        assert f"{found['this file'][name]:.3f}" == after[name][-1]
    assert len(pictures_of(out / "evaluation" / "evaluation.html")) == 4 * 7
    said = capsys.readouterr().out
    assert re.search(f"ImageNet is not in the table: the weights of resnet18 .* belongs in {place}/torch", said)
    assert export(commands["export"][2:]) == 0
    exported = torch.load(out / "backbone.pth", weights_only=True)
    assert resnet18().load_state_dict(exported, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    assert torch.equal(exported["layer4.1.conv2.weight"], weights["encoder"]["layer4.1.conv2.weight"])

    words = commands["fine-tune"][1:]
    assert words[words.index("--data.folder") + 1] == str(place / "labelled")
    TransferCLI(Segmentation, SegmentationData, seed_everything_default=0, args=[
        *words, "--data.crop=[32,40]", "--data.batch_size=2", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
        "--trainer.check_val_every_n_epoch=1", "--trainer.enable_progress_bar=false"])  # fmt: skip
    scores = [row["val/miou"] for row in rows_of(out / "segmentation" / "version_0" / "metrics.csv") if row["val/miou"]]
    assert len(scores) == 1
    assert 0 <= float(scores[0]) <= 1

    # Others may read all of it.
    os.umask(umask := os.umask(0))
    for path in out.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
