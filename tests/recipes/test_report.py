"""The way after a run: its report, however it ended, and the comparison that the report names."""

import logging
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from jsonargparse import Namespace
from making import TINY, cli
from PIL import Image
from pytorch_lightning.callbacks import Callback
from safetensors.torch import save_file
from test_probe import draw, probe_of

from densessl import FeatureMap
from densessl.export import main as export
from examples import evaluate
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.pages import chart, thinned
from examples.pretrain.common.pictures import as_pillow, enlarged, heat, similarity
from examples.pretrain.common.report.content import (
    better_or_worse,
    duration,
    next_commands,
    of_a_cut,
    read_curves,
    told_noise,
)
from examples.pretrain.common.report.gallery import gallery
from examples.pretrain.common.report.write import tenths
from examples.pretrain.common.scores import noise_of
from examples.pretrain.common.stop_signals import stopped_by
from examples.pretrain.common.training import spacing
from examples.pretrain.pixpro import PixPro


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for index in range(20):
        draw(root / f"{index:02}.png", index)
    return root


def made_run(folder: Path, out: Path, *args: str):
    return cli(PixPro, *TINY, "--data.folder", str(folder), "--data.size=32", "--data.batch_size=4",
               "--data.workers=0", "--out", str(out), "--trainer.accelerator=cpu", "--trainer.max_steps=4",
               "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--probe.images=4",
               "--trainer.log_every_n_steps=1", "--probe.every_n_steps=2", *args)  # fmt: skip


def written_config(made) -> None:
    """config.yaml, which the command line writes beside the run."""
    from examples.pretrain.common.report.content import settings

    (Path(made.config.out) / "config.yaml").write_text(settings(made.config))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No download in the tests."""
    network = evaluate.network

    def without(setting, init):
        if init == "imagenet":
            raise OSError("no network")
        return network(setting, init)

    monkeypatch.setattr(evaluate, "network", without)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    made = made_run(folder, tmp_path_factory.mktemp("run"))
    made.fit()
    written_config(made)
    return made


def test_the_report_of_a_finished_run(finished, folder):
    out = Path(finished.config.out)
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "http" not in page  # nothing from elsewhere
    assert page.count("data:image/png;base64,") == 4 * 5  # each photo, its components and its similarity twice
    assert page.count("<svg") == 5
    readings = probe_of(finished).readings
    for said in (page, text):
        for value in (readings[0]["pck"], readings[-1]["pck"], readings[-1]["pck_colour"]):
            assert f"{value:.3f}" in said
        for words in ("PixPro: finished", "16 (1.0 passes)", "images to train on", "hidden_dim: 32",
                      "None of these photos was trained on", "python examples/evaluate.py"):  # fmt: skip
            assert words in said
    assert sorted(path.name for path in (out / "report").iterdir()) == [f"photo-{i}.png" for i in (1, 2, 3, 4)]
    assert Image.open(out / "report" / "photo-1.png").height == 192


def test_the_commands_of_the_report_run(finished, folder, capsys):
    out = Path(finished.config.out)
    commands = next_commands(finished.config, out / "encoder.safetensors")
    words = shlex.split(commands["evaluate"])
    found = evaluate.main([*words[2:], "--out", str(out / "evaluation")])
    readings = probe_of(finished).readings
    # The file is the run's end, random weights its start, and the photos are those kept out of it.
    assert found["this file"]["pck"] == pytest.approx(readings[-1]["pck"], abs=1e-9)
    assert found["random (its start)"]["pck"] == pytest.approx(readings[0]["pck"], abs=1e-9)
    assert "4 of " in (out / "evaluation" / "evaluation.md").read_text()
    assert "kept out of the training" in (out / "evaluation" / "evaluation.html").read_text()
    printed = capsys.readouterr().out
    assert f"{readings[-1]['pck_colour']:.3f}" in printed
    assert "ImageNet is not in the table: no network" in printed
    assert export(shlex.split(commands["export"])[3:]) == 0
    assert (out / "backbone.pth").is_file()
    exec(commands["fine-tune"], names := {})  # the recipe's file needs a whole network, and this one ends at layer2
    assert torch.equal(names["backbone"].state_dict()["conv1.weight"].cpu(), weights_after(finished))


def weights_after(made) -> torch.Tensor:
    return backbone_of(made.method).state_dict()["conv1.weight"]


def test_commands_by_network(finished):
    config, file = finished.config.clone(), Path("a b") / "encoder.safetensors"
    config.backbone.layer = "layer4"
    whole = next_commands(config, file)
    assert "--data.folder MASKS --model.classes CLASSES" in whole["fine-tune"]
    assert "'a b/encoder.safetensors' --to torchvision" in whole["export"]
    assert "segmentation.py fit" in whole["fine-tune"]
    assert "--model.backbone resnet18 --model.pretrained 'a b/encoder.safetensors'" in whole["fine-tune"]
    config.backbone.name = "vit_small_patch14_dinov2"
    assert "--to timm --model vit_small_patch14_dinov2" in next_commands(config, file)["export"]
    config.backbone.layer = "blocks.4"
    assert "encoder.safetensors' --to timm --out" in next_commands(config, file)["export"]  # under its own names
    assert "inside its part blocks, so the exported file holds the network up to there" in of_a_cut(config)
    config.backbone.layer = "norm"
    assert of_a_cut(config) == ""
    config.backbone.name, config.backbone.layer = "resnet18", "layer2.0"
    assert list(next_commands(config, file)) == ["evaluate", "fine-tune"]
    assert "There is no command to export" in of_a_cut(config)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("tf_efficientnet_lite0", "blocks.2"), ("test_vit", "blocks.3"), ("test_convnext", "stages.1.blocks.0")],
)  # fmt: skip
def test_the_export_command_of_a_cut_backbone_works(name, layer, tmp_path):
    config = Namespace(backbone=Namespace(name=name, layer=layer), out=str(tmp_path), probe=Namespace(labels=None))
    config.data = Namespace(folder="photos", size=160)
    assert f"Load it into the whole {name}" in of_a_cut(config)
    backbone, _ = make_backbone(name, layer, size=160)
    file = tmp_path / "encoder.safetensors"
    save_file({key: value.contiguous() for key, value in backbone.state_dict().items()}, file)
    assert export(shlex.split(next_commands(config, file)["export"])[3:]) == 0
    whole = timm.create_model(name)
    written = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert whole.load_state_dict(written, strict=False).unexpected_keys == []
    image = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(FeatureMap(whole.eval(), layer)(image), backbone.eval()(image))


def test_a_report_without_the_export_command_says_why(folder, tmp_path):
    made_run(folder, tmp_path, "--backbone.layer=layer2.0").fit()
    for said in ((tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()):
        assert "densessl.export" not in said
        assert "There is no command to export: the backbone ends at layer2.0, inside its part layer2" in said


@pytest.mark.parametrize(("steps", "every", "logged"), [(1, 10, [0]), (7, 10, [*range(7)]), (3, 2, [0, 1, 2])])
def test_a_short_run_has_curves(steps, every, logged, folder, tmp_path):
    made_run(folder, tmp_path, f"--trainer.max_steps={steps}", f"--trainer.log_every_n_steps={every}").fit()
    assert [step for step, _ in read_curves(tmp_path)["loss"]] == logged
    assert "There is no curve" not in (tmp_path / "report.md").read_text()


def test_the_spacing_of_logged_steps_is_kept_where_it_gives_a_curve():
    assert [spacing(steps, 10) for steps in (20, 250, 100_000, 19, 9, 1)] == [10, 10, 10, 1, 1, 1]
    assert spacing(90, 50) == 9


def test_a_run_that_ended_before_its_first_logged_step_says_so(folder, tmp_path):
    made = made_run(folder, tmp_path, "--trainer.max_steps=40", "--trainer.log_every_n_steps=10")
    made.trainer.callbacks.insert(0, Stop(fails))
    with pytest.raises(RuntimeError):
        made.fit()
    for said in ((tmp_path / "report.md").read_text(), (tmp_path / "report.html").read_text()):
        assert "There is no curve of the loss: the run ended before its first logged step." in said


def fails() -> None:
    raise RuntimeError("loss is nan")


def presses_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Stop(Callback):
    def __init__(self, do: Callable[[], None]) -> None:
        self.do = do

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            self.do()


@pytest.mark.parametrize(("stop", "words"), [(presses_ctrl_c, "by the user"), (fails, "by RuntimeError: loss is nan")])
def test_a_run_that_is_stopped_has_a_report_too(stop, words, folder, tmp_path, monkeypatch):
    for name in ("stop_signals.SECONDS_TO_END", "last_checkpoint.SECONDS_TO_END", "last_checkpoint.SECONDS_TO_REPORT"):
        monkeypatch.setattr(f"examples.pretrain.common.{name}", 600)  # the alarm would end the tests
    made = made_run(folder, tmp_path)
    made.trainer.callbacks.insert(0, Stop(stop))
    try:
        with pytest.raises((SystemExit, RuntimeError)):
            made.fit()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it would end this process, as it ends a run
        signal.signal(signal.SIGINT, signal.default_int_handler)
    text = (tmp_path / "report.md").read_text()
    assert "# PixPro: stopped after 3 of 4 steps" in text
    assert words in text
    steps = [row["step"] for row in probe_of(made).readings]
    assert steps == ([0, 2, 3] if stop is presses_ctrl_c else [0, 2])
    goes_on = f"examples/pretrain/pixpro.py fit --config {tmp_path}/config.yaml --ckpt_path last" in text
    assert (tmp_path / "checkpoints" / "last.ckpt").exists() == goes_on == (stop is presses_ctrl_c)
    assert "images read: " in text
    if goes_on:
        again = made_run(folder, tmp_path, "--ckpt_path=last")
        again.fit()
        text = (tmp_path / "report.md").read_text()
        assert "# PixPro: finished" in text
        # Of the last of 4 steps alone: the counts do not outlive a stop.
        assert "images read since the run was continued: 4 (" in text


@pytest.mark.parametrize(
    ("exception", "who"),
    [(KeyboardInterrupt(), "the user"), (SystemExit(130), "the user"), (SystemExit(143), "SIGTERM"),
     (SystemExit("error: no"), None), (SystemExit(1), None), (RuntimeError(), None)],
)  # fmt: skip
def test_who_stopped_a_run(exception, who):
    assert stopped_by(exception) == who


def test_a_report_without_a_probe_shows_photos_that_were_trained_on(folder, tmp_path):
    made = made_run(folder, tmp_path, "--probe.images=0")
    made.fit()
    text = (tmp_path / "report.md").read_text()
    assert "These photos were trained on." in text
    assert "No probe was read." in text


def test_curves_of_all_parts_of_a_run(tmp_path):
    (tmp_path / "metrics-1.csv").write_text("loss,step\n3.0,0\n2.0,1\n")
    (tmp_path / "metrics.csv").write_text("step,loss,lr\n2,1.0,\n3,,0.5\n")
    assert read_curves(tmp_path) == {"loss": [(0, 3), (1, 2), (2, 1)], "lr": [(3, 0.5)]}
    assert read_curves(tmp_path / "none") == {}


def test_words_and_curves():
    noise = noise_of(64, 64)
    rows = [{"step": 0, "pck": 0.5}, {"step": 5, "pck": 0.7}, {"step": 9, "pck": 0.6}]
    assert "better than it started. It was best at step 5 with 0.700" in better_or_worse(rows, "pck", noise)
    assert "worse" in better_or_worse([rows[1], rows[0]], "pck", noise)
    assert "once or never" in better_or_worse(rows[:1], "pck", noise)
    assert "level with its start, because no score changed by more than its noise." in better_or_worse(
        [{"step": 0, "pck": 0.5}, {"step": 5, "pck": 0.505}], "pck", noise
    )
    assert [duration(s) for s in (20, 120, 7200)] == ["20 seconds", "2.0 minutes", "2.0 hours"]
    assert chart("loss", "no unit", {"loss": [(0, float("nan"))]}) == ""
    svg = chart("a < b", "images/s", {"a": [(0, 1.0), (1, 3.0)], "b": [(0, 2.0)]})
    assert "a &lt; b" in svg
    assert svg.count("<polyline") == 2
    assert ">images/s</text>" in svg
    assert ">step</text>" in svg
    assert svg.count('stroke-dasharray="6 3"') == 2  # the second curve and its name: told apart without colours
    assert thinned([(i, 2.0) for i in range(1000)])[0] == (1.5, 2.0)


def test_figures_that_are_compared_have_the_same_limits():
    good, bad = ({"pck": [(0, 0.64), (250, 0.684)], "linear": [(0, 0.533)]}, {"pck": [(0, 0.64), (100, 0.551)]})
    assert tenths(good) == tenths(bad) == (0.5, 0.7)
    assert tenths({"pck": [(0, 0.7), (1, 0.7)]}) == (0.5, 0.7)
    assert tenths({"pck": [(0, 1.0), (1, 0.0)]}) == (0.0, 1.0)
    assert tenths({"pck": [(0, float("nan"))]}) == (0.0, 1.0)
    svg = chart("probe", "share", bad, tenths(bad))
    assert all(f">{value}</text>" in svg for value in ("0.5", "0.6", "0.7"))
    photo = torch.zeros(3, 8, 8, dtype=torch.uint8)
    maps = {"before": torch.randn(1, 5, 4, 6), "after": torch.randn(1, 5, 4, 6)}
    (row,) = gallery([photo], maps)
    cosines = [similarity(of[0], 2 * 6 + 3) for of in maps.values()]
    low = min(float(cosine.min()) for cosine in cosines)
    for (caption, picture), cosine, name in zip(row[-2:], cosines, maps, strict=True):
        assert caption == f"similarity, {name} ({low:.2f} dark to 1 bright)"
        assert np.array_equal(np.asarray(picture), np.asarray(as_pillow(enlarged(heat(cosine, low), 192))))


START = {"step": 0, "pck": 0.640, "pck_colour": 0.633, "neighbors": 0.538, "linear": 0.654}


def verdict(score: str = "pck", **last: float) -> str:
    return better_or_worse([START, {**START, "step": 250, **last}], score, noise_of(64, 64))


def test_the_verdict_is_of_all_scores():
    # A fall by no more than the noise is none.
    better = "The score pck went from 0.640 to 0.684: the backbone is better than it started."
    assert verdict(pck=0.684, neighbors=0.533) == better
    mixed = verdict(pck=0.684, pck_colour=0.681, neighbors=0.526)
    assert mixed.startswith(
        "Mixed: correspondence rose by 0.044, correspondence in changed colours rose by 0.048, and nearest neighbours "
        "fell by 0.012."
    )
    assert "best.safetensors is the best by pck alone, of step 250" in mixed
    assert "better" not in mixed
    assert "worse" not in mixed
    assert verdict("neighbors", pck=0.684, neighbors=0.526).startswith("Mixed: correspondence rose by 0.044, and ")
    assert "of step 0" in verdict("neighbors", pck=0.684, neighbors=0.526)
    aside = verdict(linear=0.700)
    assert "level with its start by this score; the linear probe rose by 0.046." in aside
    assert "worse than it started" in verdict(pck=0.5, linear=0.6)


def test_noise_follows_the_number_of_images(finished):
    assert noise_of(64, 256) == noise_of(1000, 64) == dict.fromkeys(START.keys() - {"step"}, 0.005)
    few = noise_of(16, 4)
    assert few == {"pck": 0.01, "pck_colour": 0.01, "neighbors": 0.02, "linear": 0.02}
    assert noise_of(0, 0)["pck"] == 0.04
    risen = [START, {**START, "step": 9, "pck": 0.650}]
    assert "better than it started" in better_or_worse(risen, "pck", noise_of(64, 0))
    assert "no score changed by more than its noise" in better_or_worse(risen, "pck", few)
    out = Path(finished.config.out)
    for said in ((out / "report.md").read_text(), (out / "report.html").read_text()):
        assert "Changes of up to 0.020 in pck and pck_colour (of 4 photos) count as noise." in said
    both = told_noise(START, few, 16, 4)
    assert "up to 0.010 in pck and pck_colour (of 16 photos), up to 0.020 in neighbors and linear (of 4 label" in both


def test_a_warning_of_one_score_gives_no_advice_where_another_rose(finished):
    report = next(c for c in finished.trainer.callbacks if type(c).__name__ == "RunReport")
    probe = report.probe
    kept = probe.readings, probe.warned
    try:
        probe.warned = True
        probe.readings = [START, {**START, "pck": 0.6}]
        assert "see the learning rate" in " ".join(report._warnings({}))
        probe.readings = [START, {**START, "pck": 0.6, "linear": 0.7}]
        (said,) = report._warnings({})
        assert said == "Three readings of pck in a row were below the start. At the end the linear probe is above it."
    finally:
        probe.readings, probe.warned = kept


def test_evaluate_names_what_does_not_fit(finished, folder, tmp_path):
    file = str(Path(finished.config.out) / "encoder.safetensors")
    for args, message in (
        ([str(tmp_path / "none.pt"), "--photos", str(folder)], "CHECKPOINT: expected a file"),
        ([file, "--photos", str(tmp_path)], "--photos: expected images"),
        ([file, "--photos", str(folder), "--labels", str(tmp_path)], "--labels: expected the folders images and masks"),
        ([file, "--photos", str(folder), "--layer", "layer9"], "layer9"),
        ([file, "--photos", str(folder), "--backbone", "resnet50"], "CHECKPOINT: "),
        ([file, "--photos", str(folder), "--backbone", "resnet19"], "--backbone: expected the name of"),
        ([file, "--photos", str(folder), "--mean", "0.5,0.5"], "--mean: expected one number, or 3 with commas"),
        ([file, "--photos", str(folder), "--mean", "half"], "--mean: expected one number, or 3 with commas"),
        ([file, "--photos", str(folder), "--std", "0"], "--std: expected numbers above 0, got 0"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(args)


def test_evaluate_takes_another_normalisation(finished, folder):
    args = evaluate.arguments([str(Path(finished.config.out) / "encoder.safetensors"), "--photos", str(folder),
                               "--mean", "0.5,0.4,0.3", "--std", "0.25"])  # fmt: skip
    form = evaluate.setting_of(args).form
    assert (form.mean, form.std) == ([0.5, 0.4, 0.3], [0.25, 0.25, 0.25])


def test_evaluate_scores_random_weights_after_batch_norm_has_seen_the_photos(finished, folder, tmp_path, monkeypatch):
    seen, frozen = {}, evaluate.frozen

    def watched(backbone, form):
        seen[len(seen)] = {name: value.clone() for name, value in backbone.state_dict().items()}
        return frozen(backbone, form)

    monkeypatch.setattr(evaluate, "frozen", watched)
    found = evaluate.main([str(Path(finished.config.out) / "encoder.safetensors"), "--photos", str(folder),
                           "--out", str(tmp_path)])  # fmt: skip
    random = seen[list(found).index("random (its start)")]
    born = backbone_of(made_run(folder, tmp_path / "run").method).state_dict()
    for name, value in born.items():
        assert torch.equal(value, random[name]) == ("running" not in name and "num_batches" not in name), name


def test_evaluate_reads_no_settings_of_other_programs(finished, folder, tmp_path):
    place = tmp_path / "other"
    place.mkdir()
    file = place / "weights.safetensors"
    file.write_bytes((Path(finished.config.out) / "encoder.safetensors").read_bytes())
    args = [str(file), "--photos", str(folder), "--backbone", "resnet18", "--layer", "layer2", "--size", "32"]
    (place / "config.yaml").write_text("a: [")
    with pytest.raises(SystemExit, match=r"config.yaml: expected the settings of a run, got no YAML"):
        evaluate.main(args)
    for text in ("", "- a", "backbone: 7"):
        (place / "config.yaml").write_text(text)
        assert evaluate.settings_in(place / "config.yaml") == {}
    with pytest.raises(
        SystemExit, match=r"--out: expected a folder that can be written to, got .*config.yaml: File exists"
    ):
        evaluate.main([*args, "--out", str(place / "config.yaml")])


def test_evaluate_says_nothing_of_each_try_to_download(folder, tmp_path, monkeypatch):
    said = []

    def unreachable(*args, **kwargs):
        http.warning("'Connection refused' thrown while requesting HEAD")
        logging.getLogger("densessl.any").warning("what is ours")
        raise ValueError("backbone.init: no network")

    class Said(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    http, handler = logging.getLogger("huggingface_hub.utils._http"), Said()
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.WARNING)  # as it is born
    http.setLevel(logging.NOTSET)
    monkeypatch.setattr(evaluate, "make_backbone", unreachable)
    (tmp_path / "w.pth").touch()
    loggers = http, logging.getLogger("densessl.any")
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with pytest.raises(SystemExit, match="no network"):
            evaluate.main([str(tmp_path / "w.pth"), "--photos", str(folder), "--size", "32"])
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert said == ["what is ours"]


def test_evaluate_takes_a_file_without_a_run_and_labels(finished, folder, tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((Path(finished.config.out) / "encoder.safetensors").read_bytes())
    for index in range(4):
        draw(tmp_path / "set" / "images" / f"{index}.png", index)
        mask = np.zeros((40, 56), np.uint8)
        mask[:, 20:] = 1
        (tmp_path / "set" / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "set" / "masks" / f"{index}.png")
    found = evaluate.main([str(weights), "--photos", str(folder), "--labels", str(tmp_path / "set"), "--size", "32",
                           "--backbone", "resnet18", "--layer", "layer2", "--images", "6"])  # fmt: skip
    assert (
        "2 classes (no classes.txt names them, so every number except 255 counts as a class)" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit, match=r"resnet50 was assumed: .* with --backbone NAME --layer LAYER$"):
        evaluate.main([str(weights), "--photos", str(folder), "--size", "32"])
    with pytest.raises(SystemExit, match="does not fit") as error:  # where a network was named, no advice
        evaluate.main([str(weights), "--photos", str(folder), "--size", "32", "--backbone", "resnet34"])
    assert "assumed" not in str(error.value)
    assert set(found["this file"]) == {"pck", "pck_colour", "neighbors", "linear"}
    assert {"this file", "random"} <= set(found)
    assert (tmp_path / "evaluation" / "evaluation.html").is_file()
    assert torch.is_grad_enabled()
