"""FPN pretraining against backbone pretraining on tiny runs: what reaches the detector, rows, and going on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.io import write_jpeg

from benchmarks.studies import heads, heads_detection, resumable
from benchmarks.studies.rows import read_rows

HEIGHT, WIDTH = 64, 80


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four noisy photos with a box each in COCO's layout, two to train on and two to evaluate on."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        images, entries = [], []
        for number in range(4):
            pixels = torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=generator)
            write_jpeg(pixels, str(tmp_path / "images" / split / f"{number}.jpg"))
            images.append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
            entries.append({"id": number + 1, "image_id": number, "category_id": 1, "bbox": [8, 8, 32, 40],
                            "area": 1280, "iscrowd": 0})  # fmt: skip
        content = {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "nucleus"}]}
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def command(folder, monkeypatch) -> list[str]:
    monkeypatch.setitem(heads_detection.SETS, "nuclei", heads_detection.BoxSet(1, (64,), 80))
    return [
        *("--photos", str(folder / "images" / "train"), "--sets", f"nuclei={folder}", "--seeds=0", "--steps=2"),
        *("--batch-size=2", "--size=72", "--tune-steps=2", "--every=1", "--out", str(folder / "out")),
    ]


def trained_parts(name: str, folder: Path, tmp_path: Path) -> tuple[dict, dict]:
    """The encoder of an arm, and the detector that fine-tuning begins with."""
    (encoder,) = folder.glob(f"out/{name}-*-seed0.safetensors")
    made = heads_detection.recipe("nuclei", str(folder), str(encoder), 0, 2, 1, str(tmp_path / "logs"))
    return load_file(encoder), made.model.detector.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_each_arm_makes_its_rows_once_and_brings_its_weights(command, folder, tmp_path, monkeypatch):
    text = heads.main(command)
    rows = read_rows(folder / "out" / "rows.csv")
    assert [(row["arm"], row["steps"], row["tuned"]) for row in rows] == [
        (arm, steps, tuned) for arm, steps in (("fpn", "2"), ("backbone", "2"), ("rate-0", "0")) for tuned in ("1", "2")
    ]
    assert all(0 <= float(row[name]) <= 100 for row in rows for name in ("ap", "ap50", "ap75"))
    pretraining = read_rows(folder / "out" / "pretraining.csv")
    assert [row["arm"] for row in pretraining] == list(heads.ARMS)
    assert all(float(row["std"]) > 0 for row in pretraining[:2])
    assert text.count("| nuclei | 2 |") == 4  # an arm each, and the difference

    held = {name: trained_parts(name, folder, tmp_path) for name in heads.ARMS}
    encoder, detector = held["fpn"]
    parts = {name for name in encoder if not name.startswith("backbone.body.")}
    assert any(".fpn." in name for name in parts)
    assert any(name.startswith("head.regression_head.conv.") for name in parts)
    assert all(torch.equal(encoder[name], detector[name]) for name in encoder)
    _, alone = held["backbone"]
    _, untrained = held["rate-0"]
    for name in parts:  # the backbone arm has the random pyramid of the seed, the other one has moved weights
        assert torch.equal(alone[name], untrained[name])
        if name.endswith("weight") and encoder[name].ndim > 1:
            assert not torch.equal(encoder[name], alone[name]), name
    for name, value in held["backbone"][0].items():
        assert torch.equal(alone[f"backbone.body.{name}"], value)
    first = "backbone.body.conv1.weight"
    assert not torch.equal(alone[first], untrained[first])
    assert not torch.equal(detector[first], untrained[first])
    new = "head.classification_head.cls_logits.weight"
    assert torch.equal(detector[new], alone[new])
    torch.manual_seed(0)
    network, _ = heads.ARMS["fpn"].network(size=72)  # before its training: the same backbone as in the other arms
    assert torch.equal(network.state_dict()[first], untrained[first])

    monkeypatch.setattr(heads, "pretrain", lambda *args: pytest.fail("made an encoder that was there"))
    monkeypatch.setattr(heads, "fine_tune", lambda *args: pytest.fail("made a row that was there"))
    assert heads.main(command) == text
    with pytest.raises(ValueError, match=r"--lr: expected 2.0, with which rows in .* were made, got 0.25"):
        heads.main([*command, "--lr=0.25"])
    with pytest.raises(ValueError, match=r"--tune-steps: expected 2, with which rows in .* were made, got 1"):
        heads.main([*command, "--tune-steps=1"])  # the rate falls in other steps


@pytest.mark.filterwarnings("ignore")
def test_a_killed_pretraining_goes_on_to_the_same_encoder(command, folder, monkeypatch):
    monkeypatch.setattr(heads, "fine_tune", lambda *args: None)
    heads.main([*command, "--only=backbone"])
    whole = next(folder.glob("out/*.safetensors")).read_bytes()
    again, drawing = [*command, "--only=backbone", "--out", str(folder / "parts")], heads.drawing

    def killed(*given):
        drawn = drawing(*given)

        def draw(step):
            if step == 1:
                raise KeyboardInterrupt
            return drawn(step)

        return draw

    def continued(*given):
        drawn = drawing(*given)

        def draw(step):
            steps.append(step)
            return drawn(step)

        return draw

    steps = []
    monkeypatch.setattr(heads, "drawing", killed)
    monkeypatch.setattr(resumable, "SAVE_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        heads.main(again)
    monkeypatch.setattr(heads, "drawing", continued)
    monkeypatch.setattr(resumable, "SAVE_EVERY", 100)
    assert list(folder.glob("parts/*.pt"))
    assert not list(folder.glob("parts/*.safetensors"))
    heads.main(again)
    assert next(folder.glob("parts/*.safetensors")).read_bytes() == whole
    assert not list(folder.glob("parts/*.pt"))
    assert (
        read_rows(folder / "parts" / "pretraining.csv")[0]["loss"]
        == (read_rows(folder / "out" / "pretraining.csv")[0]["loss"])
    )


def row(arm: str, seed: int, ap: str, steps: str = "300", seconds: str = "90") -> dict[str, str]:
    return {"set": "cards", "arm": arm, "seed": str(seed), "steps": steps, "tuned": "100", "ap": ap,
            "pretraining_seconds": seconds}  # fmt: skip


def test_the_difference_is_paired_by_seed_and_by_number_of_steps():
    rows = [row("backbone", 0, "10.0"), row("backbone", 1, "14.0"), row("fpn", 1, "15.0"), row("fpn", 0, "13.0")]
    rows += [row("backbone", 0, "20.0", "900"), row("rate-0", 0, "1.0", "0", "3")]
    assert heads.report(rows).splitlines()[2:] == [
        "| cards | 100 | PixPro on backbone, FPN and towers | 300 | 90 | 2 | 14.0 ± 1.4 |",
        "| cards | 100 | PixPro on the backbone | 300 | 90 | 2 | 12.0 ± 2.8 |",
        "| cards | 100 | PixPro on the backbone | 900 | 90 | 1 | 20.0 |",
        "| cards | 100 | learning rate 0 | 0 | 3 | 1 | 1.0 |",
        "",
        "| set | steps | pretraining steps | FPN - backbone | by seed |",
        "|---|---|---|---|---|",
        "| cards | 100 | 300 - 300 | +2.0 ± 1.4 | 0: +3.0, 1: +1.0 |",
        "| cards | 100 | 300 - 900 | -7.0 | 0: -7.0 |",
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--only=simclr", "--only: expected some of fpn, backbone, rate-0, got simclr"),
        ("--sets=coco=folder", "--sets: expected NAME=FOLDER, NAME one of cards, nuclei, got coco=folder"),
        ("--steps=0", "--steps: expected at least 1, got 0"),
        ("--every=3", "--every: expected a divisor of --tune-steps 400, got 3"),
        ("--seeds=x", "--seeds: expected whole numbers with commas between, got x"),
        ("--lr=1", "--sets: expected at least one NAME=FOLDER, got none"),
    ],
)
def test_bad_options_are_named(option, message, capsys):
    given = [] if option == "--lr=1" or option.startswith("--sets") else ["--sets=cards=folder"]
    with pytest.raises(SystemExit):
        heads.main([*given, option])
    assert message in capsys.readouterr().err
