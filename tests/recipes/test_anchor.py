"""The Gram anchor and KoLeo beside a method, and batch norm whose statistics are frozen."""

import copy
import csv
import math
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace
from making import TINY, cli, without_images
from reference import cosine, tokens
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.io import write_jpeg

from densessl import EMA, MaskedView, View
from examples.pretrain import adapt
from examples.pretrain.common.anchor import Anchored
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.cli import make_run
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.start import check_start
from examples.pretrain.common.step import Step
from examples.pretrain.densecl import DenseCL
from examples.pretrain.pixcontrast import PixContrast
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_fpn import PixProFPN
from examples.pretrain.vit_posttrain import ViTPostTraining


class Toy(nn.Module):
    """A method of one layer, whose loss is simple."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.Conv2d(5, 2, 1))
        self.target = EMA(self.encoder)

    def forward(self, view1: View, view2: View) -> Step:
        z1, z2 = self.encoder(view1.image), self.encoder(view2.image)
        self.target(view1.image)
        return Step(z1.mean() - z2.mean(), {}, dict)


def views(masked: bool) -> list[View]:
    """Of two sizes; with a mask, the first rows of each image's first view hold nothing."""
    coords, size = torch.eye(3).expand(3, 3, 3), torch.tensor([[20, 20]] * 3)
    made = [View(torch.randn(3, 3, *s, dtype=torch.float64), coords, size) for s in ((12, 20), (16, 8))]
    if masked:
        data = [torch.ones(3, *view.image.shape[2:], dtype=torch.uint8) for view in made]
        data[0][1, :4] = 0
        made = [MaskedView(*view, mask) for view, mask in zip(made, data, strict=True)]
    return made


def gram_loop(now: Tensor, then: Tensor, valid: list[list[int]]) -> Tensor:
    """Mean over images, and over pairs of the cells that count."""
    total = 0
    for a, b, cells in zip(tokens(now), tokens(then), valid, strict=True):
        terms = [(cosine(a[i], a[j]) - cosine(b[i], b[j])) ** 2 for i in cells for j in cells]
        total = total + sum(terms) / len(terms)
    return total / len(valid)


def koleo_loop(now: Tensor, valid: list[list[int]]) -> Tensor:
    """Mean over images of minus the logarithm of the distance to the nearest other image."""
    pooled = [sum(x[i] for i in cells) / len(cells) for x, cells in zip(tokens(now), valid, strict=True)]
    unit = [x / x.square().sum().sqrt() for x in pooled]
    total = 0
    for i, x in enumerate(unit):
        distances = [(x - y).square().sum().sqrt() for j, y in enumerate(unit) if j != i]
        total = total - min(distances).log() / len(unit)
    return total


@pytest.mark.parametrize("masked", [False, True])
def test_terms_equal_the_loops(masked):
    anchored = Anchored(Toy().double(), anchor=3.0, koleo=0.7)
    backbone, both = anchored.encoder[0], views(masked)
    with torch.no_grad():
        for p in backbone.parameters():
            p += 0.1 * torch.randn_like(p)
    loss, terms, metrics = anchored(*both)
    own, maps = anchored.method(*both).loss, [backbone(view.image) for view in both]
    valid = [[list(range(x.shape[2] * x.shape[3])) for _ in range(3)] for x in maps]
    if masked:
        valid[0][1] = valid[0][1][5:]
    before = [anchored.start(view.image) for view in both]
    gram = sum(gram_loop(x, y, v) for x, y, v in zip(maps, before, valid, strict=True)) / 2
    koleo = sum(koleo_loop(x, v) for x, v in zip(maps, valid, strict=True)) / 2
    expected = own + 3.0 * gram + 0.7 * koleo
    for name, value in (("method", own), ("anchor", gram), ("koleo", koleo)):
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    got, wanted = (torch.autograd.grad(x, tuple(backbone.parameters())) for x in (loss, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    a, b = tokens(maps[0]), tokens(before[0])
    similar = [float(cosine(a[b_, i], b[b_, i]).detach()) for b_ in range(3) for i in valid[0][b_]]
    assert float(metrics()["health/similarity_to_start"]) == pytest.approx(sum(similar) / len(similar), abs=1e-6)


def test_without_weights_there_is_nothing():
    plain, both = Toy().double(), views(False)
    step = Anchored(plain)(*both)
    assert step.terms == {"method": step.loss}
    assert torch.equal(step.loss, plain(*both).loss)
    assert not any(name.startswith("start") for name in Anchored(plain, koleo=0.1).state_dict())


def test_a_copy_keeps_maps_of_its_own_and_the_start_stays_in_evaluation():
    first = Anchored(Toy().double(), anchor=1.0).train()
    second = copy.deepcopy(first)
    assert first.training
    assert not first.start.training
    both = views(False)
    expected = first(*both).loss
    torch.testing.assert_close(second(*both).loss, expected)
    assert not any(p.requires_grad for p in second.start.parameters())


def test_koleo_is_float32_under_autocast():
    anchored = Anchored(Toy(), koleo=1.0)
    both = [view._replace(image=view.image.float()) for view in views(False)]
    with torch.autocast("cpu", torch.bfloat16):
        terms = anchored(*both).terms
    with torch.autocast("cpu", torch.bfloat16):
        maps = [anchored.encoder[0](view.image) for view in both]
    expected = sum(koleo_loop(x.float(), [list(range(x.shape[2] * x.shape[3]))] * 3) for x in maps) / 2
    torch.testing.assert_close(terms["koleo"], expected, rtol=1e-4, atol=1e-5)


def test_compiled_encoders_give_the_same():
    anchored, both = Anchored(Toy(), anchor=1.0, koleo=0.5), views(False)
    both = [view._replace(image=view.image.float()) for view in both]
    expected = anchored(*both).loss
    anchored.encoder.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(anchored(*both).loss, expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for index in range(16):
        noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(index)) * 255
        write_jpeg(torch.nn.functional.interpolate(noise, (60, 80))[0].byte(), str(root / f"{index}.jpg"))
    return root


def fit(method: type, folder: Path, out: Path, *args: str):
    """Two epochs of four steps; the module's state before the first."""
    made = cli(
        method, *TINY, "--data.folder", str(folder), "--data.size=32", "--data.batch_size=4", "--data.workers=0",
        "--data.photometric=cpu", "--data.scale=[0.4,1.0]", "--out", str(out), "--trainer.max_epochs=2",
        "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", *args,
    )  # fmt: skip
    before = {name: value.clone() for name, value in made.method.state_dict().items() if isinstance(value, Tensor)}
    made.fit()
    return made, before


def column(out: Path, name: str) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("method", [PixPro, PixContrast])
def test_frozen_statistics_and_an_anchor_train_from_the_command_line(method, folder, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"backbone.freeze_statistics: expected weights in backbone.init, got random"):
        fit(method, folder, tmp_path, "--backbone.freeze_statistics=true")
    weights = tmp_path.parent / f"{method.__name__}.safetensors"
    save_file(make_backbone("resnet18", "layer2", "random", 32)[0].state_dict(), weights)
    made, before = fit(method, folder, tmp_path, "--method.anchor=20", "--method.koleo=0.1",
                       f"--backbone.init={weights}", "--backbone.layer=layer2",
                       "--backbone.freeze_statistics=true", "--save_every_n_steps=8")  # fmt: skip
    assert f"batch norms of {weights} have seen no image" in caplog.text
    after = made.method.state_dict()
    for name, value in before.items():
        inside = name.startswith(("method.encoder.0.", "method.target.module.0.", "start."))
        statistics = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        if inside and (statistics or name.startswith("start.")):
            assert torch.equal(value, after[name]), name
        elif statistics or name.startswith("method.encoder."):
            assert not torch.equal(value, after[name]), name
    similar = column(tmp_path, "health/similarity_to_start")
    assert similar[0] == pytest.approx(1, abs=1e-5)
    assert column(tmp_path, "loss/anchor")[0] == pytest.approx(0, abs=1e-6)
    assert all(math.isfinite(x) for x in column(tmp_path, "loss/koleo"))
    total = [a + 20 * b + 0.1 * c for a, b, c in zip(*(column(tmp_path, f"loss/{x}") for x in
             ("method", "anchor", "koleo")), strict=True)]  # fmt: skip
    assert column(tmp_path, "loss") == pytest.approx(total, rel=1e-4)
    for file in ("encoder.safetensors", "checkpoints/last.ckpt"):
        backbone, _ = make_backbone("resnet18", "layer2", str(tmp_path / file), 32)
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, after[f"method.encoder.0.{name}"])


def test_the_anchor_holds_the_relations_of_the_start():
    ends = []
    for weight in (0.01, 100.0):
        torch.manual_seed(1)
        anchored, both = Anchored(Toy().double(), anchor=weight), views(False)
        optimizer = torch.optim.SGD(anchored.encoder.parameters(), 0.003)
        for _ in range(50):
            loss, terms, _ = anchored(*both)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(float(terms["anchor"].detach()))
    assert ends[0] > 5 * ends[1]


def test_frozen_statistics_survive_synchronised_batch_norm():
    backbone, _ = make_backbone("resnet18", "layer2", "random", 32, freeze_statistics=True)
    method = nn.SyncBatchNorm.convert_sync_batchnorm(PixPro(backbone, 128, 8, 4)).train()
    norms = [m for m in method.encoder[0].modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert not any(m.training for m in method.target.module[0].modules() if isinstance(m, nn.SyncBatchNorm))
    assert any(m.training for m in method.encoder[1].modules() if isinstance(m, nn.SyncBatchNorm))


def test_a_vit_is_anchored_too(folder, tmp_path):
    fit(ViTPostTraining, folder, tmp_path, "--backbone.name=test_vit", "--backbone.layer=norm",
        "--backbone.init=random", "--method.anchor=1", "--optimizer.lr_backbone=1e-3")  # fmt: skip
    anchor = column(tmp_path, "loss/anchor")
    assert anchor[0] == pytest.approx(0, abs=1e-6)
    assert anchor[-1] > 1e-6


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"anchor": -1.0}, "method.anchor: expected a weight of at least 0, got -1.0"),
        ({"koleo": math.nan}, "method.koleo: expected a weight of at least 0, got nan"),
        ({"koleo": math.inf}, "method.koleo: expected a weight of at least 0, got inf"),
    ],
)
def test_bad_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        Anchored(Toy(), **weights)


def test_koleo_of_one_image_is_refused():
    anchored = Anchored(Toy().double(), koleo=1.0)
    one = [View(*(part[:1] for part in view)) for view in views(False)]
    with pytest.raises(ValueError, match=r"method.koleo: expected at least 2 images a step, got 1"):
        anchored(*one)


class OneSided(Toy):
    def forward(self, view1: View, view2: View) -> Step:
        return Step(self.encoder(view1.image).mean(), {}, dict)


def test_a_method_that_encodes_one_view_is_refused():
    with pytest.raises(ValueError, match="method: expected an encoder that gives one map of each of two views, got 1"):
        Anchored(OneSided().double(), anchor=1.0)(*views(False))


@pytest.mark.parametrize("method", [DenseCL, PixProFPN])
def test_methods_without_two_maps_have_no_such_option(method):
    with pytest.raises(ValueError, match=r"--method.anchor: there is no such option"):
        cli(method, "--data.folder=unread", "--method.anchor=1")


def test_adapt_goes_on_from_weights_and_lars_warns(tmp_path, caplog, monkeypatch):
    without_images(monkeypatch)
    start = tmp_path / "start.safetensors"
    save_file(make_backbone("resnet18", "layer3", "random", 128)[0].state_dict(), start)
    options = ["--data.folder=x", "--backbone.name=resnet18", "--backbone.layer=layer3", f"--backbone.init={start}"]
    options += ["--trainer.accelerator=cpu", "--out"]
    made = make_run(adapt.recipe(), [*options, str(tmp_path / "adapt")])
    assert isinstance(made.method, Anchored)
    assert made.method.anchor == 20
    assert not any(isinstance(m, nn.BatchNorm2d) and m.training for m in backbone_of(made.method.train()).modules())
    assert (made.module.optimizer.lr_backbone, made.module.optimizer.lr_head) == (2e-4, 2e-3)
    assert made.trainer.max_steps == 250
    assert not any("LARS" in message for message in caplog.messages)
    cli(PixContrast, *options, str(tmp_path / "lars"), "--trainer.max_steps=1")
    assert sum("LARS at rates for random weights made pretrained ones worse" in m for m in caplog.messages) == 1


def test_the_configuration_of_adapt_fits_its_recipe(tmp_path, monkeypatch):
    without_images(monkeypatch)
    path = Path(adapt.__file__).parent / "configs" / "own_images.yaml"
    options = ["--config", str(path), "--data.folder=x", "--backbone.init=random", "--out", str(tmp_path / "run")]
    options += ["--backbone.freeze_statistics=false"]
    made = make_run(adapt.recipe(), [*options, "--trainer.accelerator=cpu", "--trainer.precision=32"])
    assert made.method.anchor == 20
    assert made.module.optimizer.lr_backbone == 2e-4


def test_good_statistics_are_kept_without_a_word(caplog):
    backbone, _ = make_backbone("resnet18", "layer2", "random", 32, freeze_statistics=True)
    options = Namespace(init="weights.pth", freeze_statistics=True)
    check_start(options, backbone, None)
    assert "have seen no image" in caplog.text
    caplog.clear()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(0.1)
    check_start(options, backbone, None)
    assert not caplog.text
    check_start(Namespace(init="random", freeze_statistics=True), nn.Conv2d(3, 8, 3), None)  # none to keep
