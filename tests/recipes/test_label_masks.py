"""Folders of label masks in place of photos are told, once, and folders of photos are not."""

import logging
from pathlib import Path

import numpy as np
import pytest
from making import TINY, cli
from PIL import Image
from test_probe import draw

from examples.pretrain.common.cli import main
from examples.pretrain.common.data.label_masks import mask_warning
from examples.pretrain.common.preview import look
from examples.pretrain.pixpro import PixPro, recipe


def mask(path: Path, index: int, palette: bool = False) -> None:
    numbers = np.kron(np.random.default_rng(index).integers(0, 5, (5, 7), dtype=np.uint8), np.ones((8, 8), np.uint8))
    image = Image.fromarray(numbers)
    if palette:
        image.putpalette(list(range(256)) * 3)
    path.parent.mkdir(exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> Path:
    """Eighteen masks, every second one with a palette, and two photos."""
    root = tmp_path_factory.mktemp("masks")
    for index in range(18):
        mask(root / f"{index:02}.png", index, palette=bool(index % 2))
    for index in (18, 19):
        draw(root / f"{index}.png", index)
    return root


def test_masks_are_told_with_an_example(masks):
    said = mask_warning(sorted(masks.iterdir()), "data.folder")
    assert said == (
        "data.folder: 18 of 20 sampled files have at most 32 colours and look like label masks, not like photos: "
        f"{masks / '00.png'} has 5 (grey values 0 to 4). Give a folder that holds photos alone."
    )
    odd = mask_warning([path for path in sorted(masks.iterdir()) if int(path.stem) % 2], "--photos")
    assert odd.startswith("--photos: 9 of 10 sampled files have at most 32 colours")
    assert "01.png has 5 (with a palette)" in odd


def test_masks_beside_their_photos_are_told(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(30):
        draw(tmp_path / "images" / f"{index}.png", index)
        mask(tmp_path / "masks" / f"{index}.png", index)
    said = mask_warning(sorted(tmp_path.rglob("*.png")), "data.folder")
    assert said.startswith("data.folder: 20 of 40 sampled files have at most 32 colours")
    assert str(tmp_path / "masks") in said
    assert said.endswith(f"Give a folder that holds photos alone, such as {tmp_path / 'images'}.")
    for index in range(9, 30):
        (tmp_path / "masks" / f"{index}.png").unlink()  # a mask for some photos alone
    assert mask_warning(sorted(tmp_path.rglob("*.png")), "data.folder") is not None


@pytest.mark.parametrize("pairs", [2, 40, 100, 200])
def test_masks_between_their_photos_are_told(pairs, tmp_path, monkeypatch):
    from examples.pretrain.common.data import label_masks

    monkeypatch.setattr(label_masks, "few_colours", lambda path: "5 (grey)" if "mask" in path.name else None)
    paths = [tmp_path / f"{index:03}{kind}.png" for index in range(pairs) for kind in ("", "_mask")]
    assert mask_warning(paths, "data.folder") is not None
    # A list may hold paths of both kinds, and masks of a fifth of its photos.
    mixed = [Path("near") / path.name if index % 2 else path for index, path in enumerate(paths)]
    assert mask_warning(mixed, "data.folder") is not None


def test_a_single_drawing_among_few_photos_is_no_mask(tmp_path):
    for index in range(4):
        draw(tmp_path / f"{index}.png", index)
    mask(tmp_path / "logo.png", 0)
    assert mask_warning(sorted(tmp_path.iterdir()), "data.folder") is None


def test_photos_are_not_taken_for_masks(tmp_path):
    for index in range(6):
        draw(tmp_path / f"{index}.png", index)
    mask(tmp_path / "one.png", 0)
    Image.new("RGB", (40, 30)).save(tmp_path / "black.jpg")  # JPEGs are no masks, and are not even decoded
    (tmp_path / "rubbish.png").write_bytes(b"no photo")
    assert mask_warning(sorted(tmp_path.iterdir()), "data.folder") is None
    assert mask_warning([], "data.folder") is None


def test_few_files_are_read_of_a_folder_of_photos(tmp_path, monkeypatch):
    from examples.pretrain.common.data import label_masks

    read = []
    monkeypatch.setattr(label_masks, "few_colours", lambda path: read.append(path))
    assert mask_warning([tmp_path / f"{index}.png" for index in range(5000)], "data.folder") is None
    assert len(read) <= 10


def options(folder: Path, out: Path, *args: str) -> list[str]:
    return [*TINY, "--data.folder", str(folder), "--data.size=32", "--data.batch_size=4", "--data.workers=0",
            "--out", str(out), "--trainer.accelerator=cpu", "--trainer.max_steps=2",
            "--trainer.enable_progress_bar=false", "--probe.images=2", *args]  # fmt: skip


def warned(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "look like label masks" in record.getMessage()]


def test_a_run_on_masks_warns_once_and_trains(masks, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made = cli(PixPro, *options(masks, tmp_path))
        made.fit()
    assert made.trainer.global_step == 2
    (said,) = warned(caplog)
    assert said.startswith("data.folder: 16 of 18 sampled files")
    assert said in (tmp_path / "report.md").read_text()


def test_probe_photos_that_are_masks_are_told(masks, tmp_path, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(8):
        draw(photos / f"{index}.png", index)
    with caplog.at_level(logging.WARNING):
        cli(PixPro, *options(photos, tmp_path / "run", "--probe.photos", str(masks), "--probe.images=0")).fit()
    (said,) = warned(caplog)
    assert said.startswith("probe.photos: 18 of 20 sampled files")


def test_the_preview_warns_of_masks(masks, tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(look, "PAIRS", 12)
    with caplog.at_level(logging.WARNING):
        main(recipe(), ["preview", *options(masks, tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("look like label masks") == 1
    assert "WARNING: data.folder: 16 of 18 sampled files" in printed
    assert "look like label masks" in (tmp_path / "preview" / "preview.html").read_text()
    assert not warned(caplog)
