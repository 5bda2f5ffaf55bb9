"""The examples run, on a few tiny steps, and are clear about bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import compose_your_own
from examples.quickstart import photos, quickstart, report, scenes

TINY = [
    *("--steps", "3", "--batch-size", "4", "--size", "32", "--seeds", "1"),
    *("--images", "6", "--probe-images", "4"),
]
FIGURES = ("loss", "correspondence", "similarity-untrained", "similarity", "pca-untrained", "pca")


def _save_photos(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = scenes.draw_scene(9, index, size=70)[0].permute(1, 2, 0).numpy()
        Image.fromarray(image[: 70 - 5 * index]).save(folder / f"photo{index}.jpg")


def _check_run(folder: Path) -> str:
    for name in FIGURES:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert pixels.std() > 10, f"{name}.png is blank"
    return (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", quickstart.METHODS)
def test_quickstart_trains_and_reports(method, tmp_path, capsys, monkeypatch):
    def filled(backbone: torch.nn.Module, draw: object) -> None:
        """The untrained row: statistics of batch norm filled, weights as they were."""
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        fill_statistics(backbone, draw, steps=2)
        moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
        kinds.append({name.rpartition(".")[2] for name in moved})

    def seen(backbone: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        norms.append(int(backbone.get_buffer("bn1.num_batches_tracked")))
        return frozen_features(backbone, images)

    kinds: list[set[str]] = []
    norms: list[int] = []
    fill_statistics, frozen_features = quickstart.fill_statistics, quickstart.frozen_features
    monkeypatch.setattr(quickstart, "fill_statistics", filled)
    monkeypatch.setattr(quickstart, "frozen_features", seen)
    (outcome,) = quickstart.main([*TINY, "--method", method, "--out", str(tmp_path / "run")])
    text = _check_run(tmp_path / "run")
    assert len(outcome.losses) == 3
    assert kinds == [{"running_mean", "running_var", "num_batches_tracked"}]
    assert norms[0] == 4  # of 2 steps with 2 views each, before the first probe
    assert norms[-1] == 10
    assert method in text
    assert f"{outcome.untrained:.3f} | {outcome.trained:.3f}" in text
    seen = capsys.readouterr()
    assert text in seen.out
    assert "std=0." in seen.err  # the name of the report's column
    assert "sqrt(C)" not in seen.err


def test_quickstart_is_reproducible_and_its_backbone_loads_into_torchvision(tmp_path):
    first = quickstart.main([*TINY, "--out", str(tmp_path / "a")])
    again = quickstart.main([*TINY, "--out", str(tmp_path / "b")])
    assert first == again

    # The line that the report prints, as it stands there.
    code = (tmp_path / "a" / "report.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code.replace("resnet.load", "result = resnet.load"), names)
    assert not names["result"].unexpected_keys
    assert {key.split(".")[0] for key in names["result"].missing_keys} == {"layer3", "layer4", "fc"}
    resnet = names["resnet"].eval()
    backbone = quickstart.make_backbone()
    backbone.load_state_dict({k: v for k, v in resnet.state_dict().items() if k in backbone.state_dict()})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = resnet.layer2(resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))))
        torch.testing.assert_close(backbone.eval()(x), plain, rtol=1e-4, atol=1e-5)


def test_quickstart_on_photos_with_broken_ones_and_a_labelled_set(tmp_path):
    data = tmp_path / "photos"
    _save_photos(data / "nested" / "deeper", 5)
    whole = (data / "nested" / "deeper" / "photo0.jpg").read_bytes()
    (data / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "text.jpg").write_text("no photo")
    (data / "notes.txt").write_text("not looked at")
    labelled = tmp_path / "labelled"
    for split in ("train", "test"):
        for kind in ("images", "labels"):
            (labelled / kind / split).mkdir(parents=True)
        for index in range(3):
            image, labels = scenes.draw_scene(7, index, size=48)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(labelled / "images" / split / f"{index}.jpg")
            Image.fromarray(labels.numpy().astype(np.uint8)).save(labelled / "labels" / split / f"{index}.png")
    places = ["--data", str(data), "--probe-data", str(labelled), "--out", str(tmp_path / "run")]
    with pytest.warns(UserWarning, match="unreadable") as seen:
        quickstart.main([*TINY, *places])
    messages = [str(warning.message) for warning in seen]
    for name in ("truncated.jpg", "text.jpg"):
        assert any(name in message for message in messages)
    assert any("they could not be read: 2" in message for message in messages)
    assert "5 photos" in _check_run(tmp_path / "run")


def test_photos_without_labels_are_scored_on_some_that_are_kept_out(tmp_path, capsys):
    data = tmp_path / "photos"
    for index in range(4):
        _save_photos(data / str(index), 5)
    (outcome,) = quickstart.main([*TINY, "--data", str(data), "--images", "20", "--out", str(tmp_path / "run")])
    text = _check_run(tmp_path / "run")
    assert "18 photos of" in text  # trained on
    assert f"2 photos of {data}, kept out of the training" in text
    assert "PCK within one cell" in text
    assert "mIoU" not in text
    assert f"PCK untrained {outcome.untrained:.3f}, trained {outcome.trained:.3f}" in text
    assert "later they separate again" in text  # the dip is explained
    images = quickstart.read_photos(data, 20, side=64)
    left, probe = quickstart.make_probe(images, quickstart.arguments([*TINY, "--data", str(data)]))
    assert not any(image is kept for image in left for kept in (images[5], images[15]))
    assert probe.images.shape == (2, 3, 64, 64)


def test_one_photo_trains_pixpro_and_is_refused_by_the_instance_loss(tmp_path):
    _save_photos(tmp_path / "one", 1)
    where = ["--data", str(tmp_path / "one"), "--out", str(tmp_path / "run")]
    assert len(quickstart.main([*TINY, "--method", "pixpro", *where])) == 1
    with pytest.raises(SystemExit, match=r"--data: .* needs at least 2, got 1"):
        quickstart.main([*TINY, *where])


def test_too_few_photos_for_a_batch_of_different_ones_lower_it(tmp_path, capsys):
    _save_photos(tmp_path / "three", 3)
    quickstart.main([*TINY, "--data", str(tmp_path / "three"), "--out", str(tmp_path / "run")])
    assert "--batch-size: lowered to 3" in capsys.readouterr().out


def test_folders_without_photos_are_clear_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "text.jpg").write_text("no photo")
    (tmp_path / "file.jpg").write_text("no folder")
    for name, message in [
        ("empty", "--data: expected images .* found none among its 0 files"),
        ("missing", "--data: expected a folder, got .*missing"),
        ("file.jpg", "--data: expected a folder, got .* a file"),
    ]:
        with pytest.raises(SystemExit, match=message):
            quickstart.main([*TINY, "--data", str(tmp_path / name)])
    with pytest.warns(UserWarning, match=r"text\.jpg"), pytest.raises(SystemExit, match=r"--data: .* none that can be"):
        quickstart.main([*TINY, "--data", str(tmp_path / "broken")])
    with pytest.raises(SystemExit, match="--probe-data: expected a folder"):
        quickstart.main([*TINY, "--probe-data", str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("option", "value"), [("--size", "8"), ("--steps", "0"), ("--batch-size", "1"), ("--lr", "nan"), ("--seeds", "0")]
)
def test_bad_numbers_are_named(option, value, capsys):
    with pytest.raises(SystemExit):
        quickstart.main([option, value])
    assert f"{option}: " in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(SystemExit, match=r"loss is nan .* Try a lower --lr"):
        quickstart.main([*TINY, "--lr", "1e38", "--steps", "10", "--out", str(tmp_path)])


def test_the_report_says_collapsed_only_after_the_dip(tmp_path):
    def written(outcome: report.Outcome) -> str:
        return report.write_report(tmp_path / "r.md", [outcome], 128, {"method": "any"}, "load")

    healthy = report.Outcome(0, 0.2, 0.3, 0.7, 40.0, 0.6, 30.0, [1.0] * 100, [0.6] * 100)
    assert "| not collapsed |" in written(healthy)
    assert "ended below" not in written(healthy)
    for dead, what in (({"projected_std": 0.01}, "projected"), ({"std": 0.01, "rank": 4.0}, "backbone's")):
        text = written(healthy._replace(trained=0.1, **dead))
        assert "| **collapsed** |" in text
        assert f"In at least one run the {what} features had nearly all drawn together at the end. In a run" in text
        assert "NOT better" in text
    assert healthy._replace(std=0.2, rank=9.0).collapsed
    assert "| not collapsed |" in written(healthy._replace(std=0.2, rank=40.0))  # close together, in many directions
    short = healthy._replace(projected_std=0.01, losses=[1.0] * 99, deviations=[0.01] * 99)
    assert not short.collapsed
    assert "| too short to judge |" in written(short)
    assert "**collapsed**" not in written(short)
    assert "| too short to judge |" in written(short._replace(projected_std=0.6))  # it may yet fall
    alike = healthy._replace(projected_std=0.14)  # as NeCo's: close together, in many directions
    assert "| not collapsed |" in written(alike)
    assert alike._replace(projected_rank=5.0).collapsed


def test_the_report_shows_its_figures_and_says_what_to_see(tmp_path):
    outcome = report.Outcome(0, 0.2, 0.3, 0.7, 40.0, 0.6, 30.0, [2.0], [0.6])
    facts = {"method": "any"}
    text = report.write_report(tmp_path / "r.md", [outcome], 128, facts, "load", about_loss=report.LOSS["pixcontrast"])
    assert "| seed | untrained | trained | std | rank | std, backbone | rank of 128, backbone | health |" in text
    assert "InfoNCE" in text
    lines = text.splitlines()
    for name in FIGURES:
        (at,) = [index for index, line in enumerate(lines) if line.startswith("![") and f"]({name}.png)" in line]
        assert lines[at + 2].startswith(f"{name}.png: ")
    assert "colours mean alike features" in text
    assert "3 components hold 39%" in text
    below = report.write_report(
        tmp_path / "r.md", [outcome._replace(losses=[-2.0])], 128, facts, "load", about_loss=report.LOSS["pixcontrast"]
    )
    assert "InfoNCE" not in below


@pytest.mark.parametrize("method", quickstart.METHODS)
def test_every_method_of_the_quickstart_says_what_its_loss_is(method):
    assert report.LOSS[method].startswith("The loss is ")


@pytest.mark.parametrize(("steps", "smoothed"), [(3, False), (49, False), (50, True)])
def test_the_figure_of_the_loss_names_what_it_draws(steps, smoothed):
    values = [0.5] * steps
    figure = report.plot_losses(
        [report.Outcome(seed, 0.2, 0.3, 0.7, 40.0, 0.6, 30.0, values, values) for seed in range(2)]
    )
    left, right = figure.axes
    assert ("running mean" in left.get_title()) is smoothed
    assert len(left.lines) == (4 if smoothed else 2)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["seed 0", "seed 1"]
    assert max(line.get_alpha() or 1 for line in left.lines) == 1
    assert right.get_title().startswith("std ")
    assert left.get_xlim() == right.get_xlim()
    assert right.get_ylim() == (0, 1.05)  # the same in every run
    assert left.get_ylabel() == "loss (no unit)"
    assert right.get_ylabel() == "std x sqrt(C) (no unit)"
    styles = {(line.get_color(), line.get_linestyle()) for line in right.lines[:2]}
    assert len({style for _, style in styles}) == 2  # told apart without colours, too


def test_compose_your_own_runs(capsys):
    losses = compose_your_own.main(steps=2)
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert "pairs of cells" in capsys.readouterr().out


def test_scenes_are_a_function_of_seed_and_index():
    data = scenes.Scenes(30, seed=3, size=48)
    image, labels = data[5]
    again, same = scenes.draw_scene(3, 5, 48)
    assert torch.equal(image, again)
    assert torch.equal(labels, same)
    assert image.shape == (3, 48, 48)
    assert image.dtype == torch.uint8
    assert not torch.equal(image, data[6][0])
    assert not torch.equal(image, scenes.draw_scene(4, 5, 48)[0])
    assert torch.cat([data[i][1].unique() for i in range(30)]).unique().tolist() == list(range(len(scenes.CLASSES)))
    with pytest.raises(IndexError, match="index: expected"):
        data[30]


def test_colour_is_no_cue():
    labelled = [scenes.draw_scene(0, i) for i in range(300)]
    pixels = torch.stack([image for image, _ in labelled]).float().permute(1, 0, 2, 3)
    labels = torch.stack([label for _, label in labelled])
    means = torch.stack([pixels[:, labels == c].mean(1) for c in range(len(scenes.CLASSES))])
    assert (means - 127.5).abs().max() < 20


def test_photos_are_scaled_down_and_chosen_by_seed(tmp_path):
    _save_photos(tmp_path, 4)
    (tmp_path / "._photo0.jpg").write_bytes(b"left by macOS")
    read = photos.read_photos(tmp_path, limit=3, side=40, seed=1)
    assert [min(photo.shape[1:]) for photo in read] == [40, 40, 40]
    again = photos.read_photos(tmp_path, limit=3, side=40, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(read, again, strict=True))
