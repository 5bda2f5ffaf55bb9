"""The recipe that pretrains a feature pyramid: what it trains, what it writes, and that torchvision's FCOS takes it."""

import csv
import logging
from pathlib import Path

import pytest
import torch
from making import cli as cli_of
from making import without_images
from pytorch_lightning.callbacks import Callback
from safetensors.torch import load_file, save_file
from torchvision.io import write_jpeg
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import fcos_resnet50_fpn

from densessl import DistanceMatcher, View, coords_from_boxes, pixpro_loss
from densessl.checkpoints import read_backbone
from densessl.export import export
from examples.pretrain.common.callbacks import StopOnCollapse
from examples.pretrain.common.cli import Run
from examples.pretrain.common.fcos_trunk import FCOSTrunk, make_trunk
from examples.pretrain.pixpro_fpn import PixProFPN

CONFIG = Path(__file__).parents[2] / "examples" / "pretrain" / "configs" / "pixpro_fpn_r50.yaml"
PREDICTIONS = {
    f"head.{head}.{leaf}"
    for head in ("classification_head.cls_logits", "regression_head.bbox_reg", "regression_head.bbox_ctrness")
    for leaf in ("weight", "bias")
}
P7 = {f"backbone.fpn.extra_blocks.p7.{leaf}" for leaf in ("weight", "bias")}
P6 = {f"backbone.fpn.extra_blocks.p6.{leaf}" for leaf in ("weight", "bias")}
TINY = ["--backbone.name=resnet18", "--backbone.top=p5", "--method.hidden_dim=32", "--method.dim=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eight photos."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(8):
        noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(index)) * 255
        write_jpeg(torch.nn.functional.interpolate(noise, (80, 96), mode="bilinear")[0].byte(), f"{root}/{index}.jpg")
    return root


def cli(*args: str) -> Run:
    return cli_of(PixProFPN, *args)


def made(folder: Path, out: Path, *args: str) -> Run:
    return cli(*TINY, "--data.folder", str(folder), "--data.size=64", "--data.batch_size=4", "--data.workers=0",
               "--out", str(out), "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
               "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1", *args)  # fmt: skip


def fit(recipe: Run, *callbacks: Callback, ckpt: Path | None = None) -> Run:
    recipe.trainer.callbacks += callbacks
    recipe.trainer.fit(recipe.module, recipe.data, ckpt_path=ckpt)
    return recipe


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[Run, Path]:
    """Two steps, colours on the device."""
    out = tmp_path_factory.mktemp("trained")
    given = ["--trainer.max_epochs=1", "--data.photometric=device", "--save_every_n_steps=2"]
    return fit(made(folder, out, *given)), out


def test_the_configuration_is_instantiated(tmp_path, monkeypatch):
    without_images(monkeypatch)
    recipe = cli("--config", str(CONFIG), "--data.folder=x", "--out", str(tmp_path), "--trainer.accelerator=cpu",
                 "--trainer.devices=1", "--trainer.precision=32")  # fmt: skip
    sizes = {name: tuple(x.shape[1:]) for name, x in recipe.method.encoder[0](torch.zeros(1, 3, 224, 224)).items()}
    assert sizes == {"p3": (512, 28, 28), "p4": (512, 14, 14), "p5": (512, 7, 7), "p6": (512, 4, 4)}
    assert recipe.method.encoder[1].part.linear1.weight.shape == (4096, 512, 1, 1)
    assert recipe.module.optimizer.lr_at_1024 == 4.0
    assert not any(p.requires_grad for p in recipe.method.target.parameters())


def test_loss_and_metrics_are_logged_per_level(trained):
    recipe, out = trained
    assert recipe.trainer.global_step == 2
    assert recipe.method.target.step == 3  # the first update changes nothing
    assert len(rows(out)) == 2
    for row in rows(out):
        levels = [float(row[f"loss/{level}"]) for level in ("p3", "p4", "p5")]
        assert float(row["loss"]) == pytest.approx(sum(levels) / 3, abs=1e-5)
        assert all(-4 <= value <= 4 for value in levels)
        std = [float(row[f"health/std_times_sqrt_c/{level}"]) for level in ("p3", "p4", "p5")]
        assert float(row["health/std_times_sqrt_c"]) == pytest.approx(min(std))  # what StopOnCollapse reads
        assert float(row["health/positives_per_cell/p3"]) > 0


def test_photometric_work_in_the_readers_with_the_other_options(folder, tmp_path):
    recipe = made(folder, tmp_path, "--trainer.max_steps=1", "--data.photometric=cpu", "--backbone.towers=false",
                  "--method.propagation=per_level", "--method.pixel_distances=true")  # fmt: skip
    assert torch.isfinite(fit(recipe).trainer.callback_metrics["loss"])
    assert list(recipe.method.ppm.part) == ["p3", "p4", "p5"]


@pytest.mark.parametrize(
    ("top", "towers", "propagation", "size"),
    [("p5", True, "shared", 48), ("p6", False, "per_level", 96), ("p7", True, "per_level", 160)],
)
def test_every_parameter_is_trained(top, towers, propagation, size):
    """One without gradient would stop a run of several processes."""
    model = PixProFPN(*make_trunk("resnet18", top, towers, size=size), propagation, hidden_dim=8, dim=4)
    whole = coords_from_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4))
    views = [View(torch.randn(2, 3, size, size), whole, torch.full((2, 2), size)) for _ in range(2)]
    model(*views).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "ppm" in name and "weight" in name)


def test_the_loss_is_the_mean_over_levels_of_pixpros():
    torch.manual_seed(0)
    trunk = make_trunk("resnet18", "p5", True, size=64)
    model = PixProFPN(*trunk, "per_level", hidden_dim=8, dim=4, pixel_distances=True)
    boxes = torch.tensor([[[0.0, 0.0, 0.8, 0.7], [0.9, 0.1, 0.2, 0.6]], [[0.1, 0.2, 1.0, 0.9], [0.0, 0.0, 1.0, 1.0]]])
    source = torch.tensor([[60, 90], [80, 40]])
    views = [View(torch.randn(2, 3, 64, 96), coords_from_boxes(box), source) for box in boxes]
    loss = model(*views).loss
    (z1, z2), (t1, t2) = ([encode(view.image) for view in views] for encode in (model.encoder, model.target))
    expected = 0.0
    for level, size in {"p3": (8, 12), "p4": (4, 6), "p5": (2, 3)}.items():
        mask = DistanceMatcher(0.7)(views[0].coords, views[1].coords, size, source_size=source)
        ppm = model.ppm.part[level]
        there, back = pixpro_loss(ppm(z1[level]), t2[level], mask), pixpro_loss(ppm(z2[level]), t1[level], mask.mT)
        expected += 2 * (there + back) / 3
    torch.testing.assert_close(loss, expected)


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_continued_run_ends_as_if_it_had_not_been_stopped(folder, tmp_path):
    given = ["--trainer.max_epochs=2", "--data.photometric=none", "--backbone.towers=false"]
    middle = tmp_path / "middle.ckpt"
    torch.manual_seed(0)
    whole = fit(made(folder, tmp_path / "whole", *given), SaveAt(3, middle))
    torch.manual_seed(1)
    again = fit(made(folder, tmp_path / "again", *given), ckpt=middle)
    assert len(rows(tmp_path / "again")) == 1
    for key, value in whole.method.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, again.method.state_dict()[key]), key


class Impatient(Callback):
    """P5 comes out the same everywhere, and the run has patience for one step."""

    def on_fit_start(self, trainer, module) -> None:
        module.method.encoder[0].register_forward_hook(lambda m, i, maps: maps | {"p5": torch.zeros_like(maps["p5"])})
        next(other for other in trainer.callbacks if isinstance(other, StopOnCollapse)).patience = 1


def test_one_level_that_collapses_stops_the_run(folder, tmp_path):
    recipe = made(folder, tmp_path, "--trainer.max_epochs=1", "--data.photometric=none")
    with pytest.raises(RuntimeError, match=r"std_times_sqrt_c is 0.000, below 0.1, for the last 1 .*collapsed"):
        fit(recipe, Impatient())


def test_compiled_encoders_keep_their_names(folder, tmp_path, monkeypatch):
    """With the eager backend: what is tested is the wiring."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="eager"))
    given = ["--trainer.max_steps=1", "--data.photometric=none", "--backbone.towers=false"]
    recipe = fit(made(folder, tmp_path, *given, "--compile=true"))
    assert all("_orig_mod" not in key for key in recipe.method.state_dict())
    assert recipe.trainer.global_step == 1


# --- the weights in torchvision's FCOS --------------------------------------------------------------------------------


def assert_same_features(detector: torch.nn.Module, trunk: FCOSTrunk) -> None:
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        ours, maps = trunk.eval()(image), list(detector.eval().backbone(image).values())
        for x, fused in zip(ours.values(), maps, strict=False):
            towers = [head.conv(fused) for head in (detector.head.classification_head, detector.head.regression_head)]
            torch.testing.assert_close(x, torch.cat(towers, 1))


@pytest.mark.parametrize(("top", "new"), [("p5", P6 | P7), ("p6", P7), ("p7", set())])
def test_torchvisions_fcos_takes_the_weights_and_lacks_the_prediction_layers_alone(top, new, tmp_path):
    trunk = FCOSTrunk(resnet50(), top)
    save_file(trunk.state_dict(), tmp_path / "encoder.safetensors")
    export(tmp_path / "encoder.safetensors", "torchvision", tmp_path / "fcos.safetensors")
    detector = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)
    missing, unexpected = detector.load_state_dict(load_file(tmp_path / "fcos.safetensors"), strict=False)
    assert set(missing) == PREDICTIONS | new
    assert unexpected == []
    assert_same_features(detector, trunk)


@pytest.mark.parametrize("file", ["encoder.safetensors", "checkpoints/last.ckpt"])
def test_what_a_run_leaves_behind_holds_backbone_and_parts(file, trained, tmp_path):
    recipe, out = trained
    read, trunk = read_backbone(out / file), recipe.method.encoder[0]
    state = trunk.state_dict()
    assert {f"backbone.body.{name}" for name in read.weights} | read.parts.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in read.parts.items())
    assert all(torch.equal(value, state[f"backbone.body.{name}"]) for name, value in read.weights.items())
    why = set(read.dropped.values())
    assert len(why) == (0 if file.endswith("safetensors") else 2)  # projection and propagation; momentum encoder
    done = export(out / file, "mmdetection", tmp_path / "mm.pth")
    assert done.dropped.keys() == read.dropped.keys() | read.parts.keys()
    assert done.weights.keys() == {f"backbone.{name}" for name in read.weights}


def test_going_on_from_a_run(trained, tmp_path, caplog):
    recipe, out = trained
    before = recipe.method.encoder[0].state_dict()
    with caplog.at_level(logging.INFO):
        trunk = make_trunk("resnet18", "p6", True, str(out / "checkpoints" / "last.ckpt"), 128)[0]
    state = trunk.state_dict()
    assert state.keys() - before.keys() == P6
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert "as initialised: backbone.fpn.extra_blocks.p6.weight, backbone.fpn.extra_blocks.p6.bias" in caplog.text
    save_file(resnet18().state_dict(), tmp_path / "plain.safetensors")
    with caplog.at_level(logging.INFO):
        trunk = make_trunk("resnet18", "p5", False, str(tmp_path / "plain.safetensors"), 64)[0]
    plain = load_file(tmp_path / "plain.safetensors")
    assert torch.equal(trunk.backbone.body.conv1.weight, plain["conv1.weight"])
    assert "plain.safetensors: left out fc.weight: classifier" in caplog.text


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.size=32"], r"backbone.top, data.size: p5 of 32 px views: maps: level 'p5' is 1x1"),
        (["--backbone.top=p7"], r"backbone.top, data.size: p7 of 64 px views: maps: level 'p6' is 1x1"),
        (["--backbone.name=convnext_tiny"], "backbone.name: expected .*torchvision ResNet, got 'convnext_tiny'"),
        (["--backbone.name=resnet19"], r"backbone.name: .*resnet18.*got 'resnet19'"),
        (["--backbone.init=/no/such/file"], "backbone.init: path: there is no file"),
    ],
)
def test_bad_input_stops_before_training(args, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        made(folder, tmp_path, "--trainer.max_epochs=1", *args)


def test_propagations_for_other_levels(folder, tmp_path):
    recipe = made(
        folder, tmp_path, "--trainer.max_epochs=1", "--method.propagation=per_level", "--data.photometric=none"
    )
    del recipe.method.ppm.part["p4"]
    with pytest.raises(ValueError, match=r"part: expected the levels \['p3', 'p4', 'p5'\], got \['p3', 'p5'\]"):
        fit(recipe)


def test_files_that_do_not_fit(trained, tmp_path):
    _, out = trained
    with pytest.raises(ValueError, match=r"backbone.init: path: .*encoder.safetensors does not fit "):
        make_trunk("resnet34", "p5", True, str(out / "encoder.safetensors"), 64)
    state = FCOSTrunk(resnet18(), "p5").state_dict()
    name = "backbone.fpn.inner_blocks.0.0.weight"
    save_file(state | {name: torch.zeros(64, 128, 1, 1)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"narrow.safetensors does not fit .*inner_blocks.0.0.weight' is \(64, 128, "):
        make_trunk("resnet18", "p5", True, str(tmp_path / "narrow.safetensors"), 64)
