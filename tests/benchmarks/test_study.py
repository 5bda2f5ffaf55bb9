"""The study on a tiny folder: rows are made once, can be made again, and are reported."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg, write_png

for _extra in ("matplotlib", "safetensors", "tqdm", "lightly", "kornia", "torchmetrics"):
    pytest.importorskip(_extra)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import study  # noqa: E402

METHODS = ",".join(study.METHODS)
TINY = ["--cpu", "--photos=8", "--steps=2", "--batch-size=4", "--size=32", "--seeds=2", "--lrs=0.5,1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    (folder / "pretrain" / "some").mkdir(parents=True)
    for index in range(8):
        write_jpeg(noise(3, 128, 140), str(folder / "pretrain" / "some" / f"{index}.jpg"))
    for split in ("train", "val", "test"):
        for kind in ("images", "labels"):
            (folder / "camvid" / kind / split).mkdir(parents=True)
        for index in range(2):
            write_jpeg(noise(3, 48, 64), str(folder / "camvid" / "images" / split / f"{index}.jpg"))
            write_png(noise(1, 48, 64) % 12, str(folder / "camvid" / "labels" / split / f"{index}.png"))
    return folder


def rows(out: Path) -> list[dict[str, str]]:
    return study.read_rows(out / "rows.csv")


def test_every_method_makes_its_rows_once(folder, tmp_path, capsys):
    command = ["--data", str(folder), "--out", str(tmp_path), *TINY]
    study.main([*command, "--only", METHODS])
    made = rows(tmp_path)
    assert [(row["method"], row["seed"]) for row in made] == [(m, s) for m in METHODS.split(",") for s in "01"]
    assert all(0 <= float(row[score]) <= 1 for row in made for score in study.SCORES)
    # The grid's two encoders at seed 0, and the chosen one's other seed.
    assert len(list(tmp_path.glob("pixpro-lr*.safetensors"))) == 3
    tuning = study.read_rows(tmp_path / "tuning.csv")
    for row in made:
        tried = {float(t["val_linear"]): float(t["lr"]) for t in tuning if t["method"] == row["method"]}
        assert float(row["lr"]) == tried[max(tried)]

    before = (tmp_path / "rows.csv").read_text(), (tmp_path / "tuning.csv").read_text()
    capsys.readouterr()
    study.main([*command, "--only", METHODS])
    assert ((tmp_path / "rows.csv").read_text(), (tmp_path / "tuning.csv").read_text()) == before
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {name}" for name in study.METHODS.values()]
    pixpro = [float(row["linear"]) for row in made if row["method"] == "pixpro"]
    line = next(line for line in table.splitlines() if line.startswith("| PixPro |"))
    assert f"**{sum(pixpro) / 2:.3f}** ({min(pixpro):.3f} to {max(pixpro):.3f})" in line
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_a_lost_row_is_made_again_the_same(folder, tmp_path):
    command = ["--data", str(folder), "--out", str(tmp_path), *TINY, "--only=pixpro"]
    study.main(command)
    first = rows(tmp_path)
    lines = (tmp_path / "rows.csv").read_text().splitlines(keepends=True)
    (tmp_path / "rows.csv").write_text("".join(lines[:2]))  # the second seed's is gone
    study.main(command)
    again = rows(tmp_path)
    same = ["method", "lr", "seed", *study.SCORES, "loss", "std"]
    assert [[row[name] for name in same] for row in first] == [[row[name] for name in same] for row in again]


def test_an_unknown_method_is_named(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--data", str(folder), "--out", str(tmp_path), "--only=pixpro,moco"])
    assert "got moco" in capsys.readouterr().err


def test_fine_tuning_through_the_transfer_recipes(folder, tmp_path, capsys):
    """The whole backbone goes into both recipes, and their figures into the table."""
    pytest.importorskip("pycocotools", reason="torchmetrics' AP needs it")
    cards, generator = tmp_path / "cards", torch.Generator().manual_seed(1)
    (cards / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (cards / "images" / split).mkdir(parents=True)
        photo = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8, generator=generator)
        for name in "ab":
            write_jpeg(photo, str(cards / "images" / split / f"{name}.jpg"))
        annotations = {
            "images": [{"id": i, "file_name": f"{name}.jpg", "height": 48, "width": 64} for i, name in enumerate("ab")],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1, "bbox": [8, 8, 24, 16], "area": 384, "iscrowd": 0}
                for i in (0, 1)
            ],
            "categories": [{"id": index + 1, "name": name} for index, name in enumerate("abcdef")],
        }
        (cards / "annotations" / f"{split}.json").write_text(json.dumps(annotations))
    options = "--trainer.max_epochs=1 --trainer.check_val_every_n_epoch=1 --trainer.accelerator=cpu --data.batch_size=2"
    command = ["--data", str(folder), "--out", str(tmp_path), "--cards", str(cards), *TINY, "--seeds=1"]
    study.main([*command, "--only=none", "--layer=layer4", "--size=64", f"--options={options}"])
    (row,) = study.read_rows(tmp_path / "finetune.csv")
    assert all(0 <= float(row[name]) <= 1 for name in ("fcn", "ap", "ap50"))
    assert f"| no pretraining | {row['fcn']} | {row['ap']} | {row['ap50']} |" in capsys.readouterr().out


def test_fine_tuning_needs_the_whole_backbone(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--data", str(folder), "--out", str(tmp_path), "--cpu", "--cards", str(folder)])
    assert "needs the whole backbone" in capsys.readouterr().err
