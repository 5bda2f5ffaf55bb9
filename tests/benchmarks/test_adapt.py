"""Going on from pretrained weights, on tiny runs: every recipe makes its row once, and the start is what it was."""

import pytest
import timm
import torch
from torchvision.io import decode_image, write_jpeg, write_png

from benchmarks.studies import adapt, adapt_transfer
from benchmarks.studies.adapt_figure import draw
from benchmarks.studies.rows import read_rows


@pytest.fixture
def command(tmp_path) -> list[str]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "weights.pth")
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for index in range(3):
            write_jpeg(noise(3, 48, 64), str(tmp_path / "images" / split / f"{index}.jpg"))
            write_png(noise(1, 48, 64) % 3, str(tmp_path / "labels" / split / f"{index}.png"))
    return [
        *("--weights", str(tmp_path / "weights.pth"), "--photos", str(tmp_path / "images" / "train")),
        *("--labelled", str(tmp_path), "--classes=2", "--enlarge=2", "--size=64", "--photo-side=40", "--batch-size=2"),
        *("--most-steps=1", "--probe-steps=2", "--seeds=0,1", "--out", str(tmp_path / "out")),
    ]


def test_every_recipe_makes_its_row_once(command, tmp_path, monkeypatch):
    text = adapt.main(command)
    rows = read_rows(tmp_path / "out" / "rows.csv")
    repeated = [name for name, recipe in adapt.RECIPES.items() if recipe.make is not None or name == "random"]
    assert [row["arm"] for row in rows] == [*adapt.RECIPES, *repeated]
    assert all(0 <= float(row[score]) <= 1 for row in rows for score in adapt.SCORES)
    monkeypatch.setattr(adapt, "run_one", lambda *args: pytest.fail("made a row that was there"))
    assert adapt.main(command) == text
    with pytest.raises(ValueError, match=r"--probe-steps: expected 2, with which rows in .* were made, got 3"):
        adapt.main([*command, "--probe-steps=3"])
    lines = {line.split(" | ")[1]: line for line in text.splitlines()[2:]}
    assert "(" not in lines[adapt.RECIPES["start"].title]
    gain = float(rows[2]["pck"]) - float(rows[0]["pck"])
    assert rows[2]["arm"] == "rate-0"
    assert f"({gain:+.3f})" in lines[adapt.RECIPES["rate-0"].title]


def test_frozen_statistics_stay_and_weights_of_another_model_are_refused(command, tmp_path):
    backbone = adapt.make_backbone(tmp_path / "weights.pth", frozen=True)
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone.train()
    backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(before[name], value) for name, value in backbone.named_buffers())
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="--weights: expected the entries"):
        adapt.make_backbone(tmp_path / "other.pth", frozen=True)


def test_an_adapted_backbone_is_fine_tuned_and_read_at_a_finer_stride(command, tmp_path, monkeypatch):
    adapt.main([*command, "--only=pixcontrast"])
    options = [*command, "--tune-steps=2"]
    text = adapt_transfer.main([*options, "--only=start,pixcontrast"])
    rows = read_rows(tmp_path / "out" / "transfer.csv")
    tuned, frozen = list(adapt_transfer.SHARES), [*(f"finer {score}" for score in adapt.SCORES), "colour pck"]
    both = tuned + frozen
    wanted = {("start", "0"): both, ("pixcontrast", "0"): both, ("start", "1"): tuned, ("pixcontrast", "1"): both}
    made = [((row["arm"], row["seed"]), row["score"]) for row in rows]
    assert made == [(key, score) for key, names in wanted.items() for score in names]
    assert all(0 <= float(row["value"]) <= 1 for row in rows)
    of_score = [row for row in rows if row["score"] == "fcn 10%"]
    gains = [float(b["value"]) - float(a["value"]) for a, b in (of_score[:2], of_score[2:])]
    (line,) = [line for line in text.splitlines() if "fcn 10%" in line and "PixContrast" in line]
    assert f"| {sum(gains) / 2:+.3f} ± " in line
    monkeypatch.setattr(adapt_transfer, "fine_tuned_miou", lambda *args, **options: pytest.fail("made again"))
    assert adapt_transfer.main([*options, "--only=start,pixcontrast"]) == text
    with pytest.raises(ValueError, match=r"--tune-steps: expected 2, with which rows in .* were made, got 3"):
        adapt_transfer.main([*options, "--only=start,pixcontrast", "--tune-steps=3"])
    with pytest.raises(ValueError, match=r"--batch-size: expected \d+, with which rows in .*rows.csv were made, got 7"):
        adapt_transfer.main([*options, "--only=start,pixcontrast", "--batch-size=7"])
    adapt_transfer.main([*options, "--only=start", "--seeds=2", "--what", "finer", "colour"])
    assert {row["score"] for row in read_rows(tmp_path / "out" / "transfer.csv") if row["seed"] == "2"} == set(frozen)
    monkeypatch.setattr(adapt_transfer, "recoloured", torch.clone)  # the same colours: plain correspondence
    adapt_transfer.main([*command, "--only=start", "--seeds=3", "--what=colour"])  # needs no options of the tuning
    plain = read_rows(tmp_path / "out" / "transfer.csv")[-1]
    adapt.main([*command, "--only=start", "--seeds=3"])
    assert (plain["score"], plain["value"]) == ("colour pck", read_rows(tmp_path / "out" / "rows.csv")[-1]["pck"])
    with pytest.raises(ValueError, match=r"--out: expected images-infonce-seed0.safetensors, which adapt.py writes"):
        adapt_transfer.main([*options, "--only=infonce"])


def test_rows_of_a_killed_job_are_not_made_twice(command, tmp_path, monkeypatch):
    made, values = adapt_transfer.add_row, dict.fromkeys(adapt.SCORES, 0.5)
    monkeypatch.setattr(adapt_transfer, "scores", lambda *args: values)
    options = [*command, "--only=start", "--seeds=0", "--what=finer"]

    def killed(path, columns, row):
        made(path, columns, row)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt_transfer, "add_row", killed)
    with pytest.raises(KeyboardInterrupt):
        adapt_transfer.main(options)
    monkeypatch.setattr(adapt_transfer, "add_row", made)
    adapt_transfer.main(options)
    rows = read_rows(tmp_path / "out" / "transfer.csv")
    assert [row["score"] for row in rows] == [f"finer {score}" for score in adapt.SCORES]


def test_the_finer_map_is_that_of_the_trained_weights(command, tmp_path):
    args = adapt.checked(adapt.parser_of(""), command)
    adapt.main([*command, "--only=pixcontrast", "--seeds=0"])
    trained = adapt_transfer.backbone_of("pixcontrast", 0, args)
    start = adapt_transfer.backbone_of("start", 0, args)
    images = torch.rand(1, 3, 64, 96)
    maps = [adapt_transfer.finer(backbone, args).eval()(images) for backbone in (trained, start)]
    assert maps[0].shape == (1, 40, 8, 12)
    assert not torch.equal(*maps)


def test_the_figure_shows_every_seed(tmp_path):
    row = {"split": "test", "linear": "0.5", "neighbors": "0.5", "pck": "0.5"}
    rows = [row | {"set": name, "arm": arm} for name in ("camvid", "nuclei") for arm in ("start", "pixcontrast")]
    draw(rows, tmp_path / "adapt.png")
    assert decode_image(str(tmp_path / "adapt.png")).shape[0] in (3, 4)
