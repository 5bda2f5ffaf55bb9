"""Post-training of a ViT: what moves and at which rate, how far, and what is left behind."""

import csv
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from reference import box_cells, cosine, matches, pixcontrast_loss, tokens
from safetensors.torch import save_file
from torch import Tensor
from torchvision.io import write_jpeg

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "pretrain"))

from backbones import make_backbone
from data import PhotoViews
from engine import RecipeCLI
from reading import Batch
from vit_posttrain import ViTPostTraining, groups_at

from densessl import FeatureMap, MaskedView, View, coords_from_boxes
from densessl.checkpoints import load_backbone

# Six blocks of 64 channels, patches of 16 pixels, one class token.
TINY = {"backbone": "test_vit", "init": "random", "hidden_dim": 32, "dim": 16, "size": 48}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for index in range(16):
        noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(index)) * 255
        write_jpeg(torch.nn.functional.interpolate(noise, (60, 80))[0].byte(), str(root / f"{index}.jpg"))
    return root


def fit(folder: Path, out: Path, *args: str):
    """Four steps an epoch; the module's state before the first."""
    options = [f"--model.{name}={value}" for name, value in TINY.items() if name != "size"]
    made = RecipeCLI(
        ViTPostTraining, PhotoViews, run=False, save_config_callback=None,
        args=[*options, "--data.folder", str(folder), f"--data.size={TINY['size']}", "--data.batch_size=4",
              "--data.workers=0", "--data.photometric=cpu", "--data.scale=[0.4,1.0]", "--out", str(out),
              "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1",
              "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", *args],
    )  # fmt: skip
    before = {name: value.clone() for name, value in made.model.state_dict().items() if isinstance(value, Tensor)}
    made.trainer.fit(made.model, made.datamodule)
    return made, before


def column(out: Path, name: str) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_rates_rise_and_fall_together(folder, tmp_path):
    fit(folder, tmp_path, "--trainer.max_epochs=3", "--model.warmup=0.25", "--model.lr_backbone=2e-5",
        "--model.lr_head=3e-4")  # fmt: skip
    shape = [(s + 1) / 3 for s in range(3)] + [(1 + math.cos(math.pi * s / 9)) / 2 for s in range(9)]
    for group, rate in ((1, 2e-5), (2, 2e-5), (3, 3e-4), (4, 3e-4)):
        assert column(tmp_path, f"lr-AdamW/pg{group}") == pytest.approx([rate * x for x in shape])


def test_only_weights_of_layers_decay():
    backbone, _ = make_backbone("vit_small_patch14_reg4_dinov2.lvd142m", "norm", "random", 28)
    (decayed, other) = groups_at(backbone, 1e-5, 0.04)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.04, 0)
    names = {id(p): name for name, p in backbone.named_parameters()}
    kept = {names.pop(id(p)) for p in other["params"]}
    assert {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias", "blocks.3.ls1.gamma", "norm.weight"} <= kept
    rest = {names.pop(id(p)) for p in decayed["params"]}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert rest == {"patch_embed.proj.weight"} | {f"blocks.{i}.{name}.weight" for i in range(12) for name in layers}
    assert not names


@pytest.mark.parametrize("blocks", [1, 4])
def test_all_but_the_last_blocks_stay(blocks, folder, tmp_path):
    made, before = fit(folder, tmp_path, f"--model.trained_blocks={blocks}", "--model.lr_backbone=1e-3",
                       "--model.momentum=0.9")  # fmt: skip  # at the published ones float32 rounds first steps away
    module = made.model
    expected = ("encoder.1.", "encoder.0.norm.", *(f"encoder.0.blocks.{i}." for i in range(6 - blocks, 6)))
    for name, p in module.encoder.named_parameters(prefix="encoder"):
        moves = name.startswith(expected)
        assert torch.equal(p, before[name]) != moves, name
        assert (p.grad is not None) == moves, name
        assert torch.equal(module.target.module.get_parameter(name[8:]), before[name]) != moves, name
    last = 6 - blocks
    assert not any(module.encoder[0].get_submodule(f"blocks.{i}").training for i in range(last))
    assert all(module.encoder[0].get_submodule(f"blocks.{i}").training for i in range(last, 6))


def test_the_meter_of_drift_starts_at_one(folder, tmp_path):
    made, before = fit(folder, tmp_path, "--trainer.max_epochs=2", "--model.lr_backbone=1e-3")
    similar = column(tmp_path, "health/similarity_to_start")
    assert len(similar) == 8
    assert similar[0] == pytest.approx(1, abs=1e-6)
    assert similar[-1] < 0.99
    assert not made.model.start.training
    for name, value in made.model.start.state_dict().items():  # where it began, also in a checkpoint
        assert torch.equal(value, before[f"start.{name}"])
        assert torch.equal(value, before[f"encoder.0.{name}"])
        assert torch.equal(value, before[f"target.module.0.{name}"])


BOXES = [[(0.0, 0.1, 0.7, 0.8), (0.2, 0.0, 0.9, 0.6)], [(0.9, 0.0, 0.3, 1.0), (0.1, 0.2, 0.6, 0.7)]]  # by view


def moved(monkeypatch) -> tuple[ViTPostTraining, dict]:
    """A recipe whose encoder and target have left the start, and what its step logs."""
    module, logged = ViTPostTraining(**TINY, pixel_distances=False).double(), {}
    for p in module.encoder.parameters():
        p.data += 0.02 * torch.randn_like(p)
    module.target.update(module.encoder, 0.5)
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    monkeypatch.setattr(module, "log_dict", logged.update)
    monkeypatch.setattr("vit_posttrain.is_logged", lambda trainer: True)
    module._trainer, module.target.momentum = SimpleNamespace(), lambda step: 0.9
    return module, logged


def test_loss_and_meter_equal_the_loops(monkeypatch):
    module, logged = moved(monkeypatch)
    images = torch.randn(2, 2, 3, 48, 48, dtype=torch.float64)
    views = [View(images[v], coords_from_boxes(torch.tensor(BOXES[v])), torch.tensor([[48, 48]] * 2)) for v in range(2)]
    loss = module.training_step(Batch(*views, torch.zeros(2), torch.zeros(2)), 0)

    cells = [[box_cells(box, (3, 3)) for box in BOXES[v]] for v in range(2)]
    mask = torch.tensor([matches(cells[0][b], cells[1][b], 0.7) for b in range(2)])
    with torch.no_grad():
        (z1, z2), (t1, t2) = ([encode(x) for x in images] for encode in (module.encoder, module.target.module))
        now, then = (tokens(encode(images[0])) for encode in (module.encoder[0], module.start))
    expected = 0.5 * (pixcontrast_loss(z1, t2, mask, 0.3) + pixcontrast_loss(z2, t1, mask.mT, 0.3))
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-6, atol=0)
    similar = [float(cosine(now[b, i], then[b, i])) for b in range(2) for i in range(9)]
    assert logged["health/similarity_to_start"] == pytest.approx(sum(similar) / 18, abs=1e-6)
    assert max(similar) < 0.999


def test_cells_without_data_do_not_count(monkeypatch):
    module, logged = moved(monkeypatch)
    images, data = torch.randn(2, 2, 3, 48, 48, dtype=torch.float64), torch.ones(2, 2, 48, 48, dtype=torch.uint8)
    data[0, :, :16], data[1, :, :, 32:] = 0, 0  # the first row of view 1's cells, the last column of view 2's
    views = [
        MaskedView(images[v], coords_from_boxes(torch.tensor(BOXES[v])), torch.tensor([[48, 48]] * 2), data[v])
        for v in range(2)
    ]
    asked = []
    module.loss.register_forward_hook(lambda _, args, value: asked.append(args[2:]))
    module.training_step(Batch(*views, torch.zeros(2), torch.zeros(2)), 0)
    valid1, valid2 = [i >= 3 for i in range(9)], [i % 3 < 2 for i in range(9)]
    (mask, keys), (back, back_keys) = asked
    assert mask.any()
    assert torch.equal(back, mask.mT)
    assert not mask[:, [not v for v in valid1]].any()
    assert keys.tolist() == [valid2] * 2
    assert back_keys.tolist() == [valid1] * 2
    with torch.no_grad():
        now, then = (tokens(encode(images[0])) for encode in (module.encoder[0], module.start))
    similar = [float(cosine(now[b, i], then[b, i])) for b in range(2) for i in range(3, 9)]
    assert logged["health/similarity_to_start"] == pytest.approx(sum(similar) / 12, abs=1e-6)


def test_sparse_masks_train_as_dense_ones(folder, tmp_path):
    runs = []
    for sparse in ("false", "true"):
        torch.manual_seed(0)
        made, _ = fit(folder, tmp_path / sparse, f"--model.sparse={sparse}", "--model.lr_backbone=1e-3")
        assert made.model.match.sparse == (sparse == "true")
        names = ("loss", "health/positives_per_cell", "health/similarity_negative")
        runs.append([column(tmp_path / sparse, name) for name in names])
    for dense, sparse in zip(*runs, strict=True):
        assert dense == pytest.approx(sparse, rel=1e-4)


def test_what_is_left_behind_loads_into_timm_and_goes_on(folder, tmp_path):
    made, _ = fit(folder, tmp_path, "--model.lr_backbone=1e-3", "--save_every_n_steps=4")
    own, image = made.model.encoder[0].eval(), torch.randn(2, 3, 48, 48)
    for file in (tmp_path / "encoder.safetensors", tmp_path / "checkpoints" / "last.ckpt"):
        plain = timm.create_model("test_vit", img_size=48, num_classes=5).eval()
        read = load_backbone(plain, file)
        assert not any(name.startswith(("start", "target")) for name in read.weights)
        torch.testing.assert_close(FeatureMap(plain, "norm")(image), own(image))
        again = ViTPostTraining(**{**TINY, "init": str(file)})
        for part in (again.encoder[0], again.target.module[0], again.start):
            for name, value in own.state_dict().items():
                assert torch.equal(part.state_dict()[name], value)
    plain.set_input_size(img_size=(64, 96))  # timm's own interpolation of the position embedding
    assert FeatureMap(plain, "norm")(torch.randn(1, 3, 64, 96)).shape == (1, 64, 4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 50}, "data.size: expected a multiple of test_vit's patch of 16 px, got 50"),
        ({"trained_blocks": 7}, "model.trained_blocks: expected 1 to 6, the backbone's blocks, got 7"),
        ({"trained_blocks": 0}, "model.trained_blocks: expected 1 to 6, .* got 0"),
        ({"trained_blocks": 1, "backbone": "resnet18", "layer": "layer2"}, "model.trained_blocks: .* without blocks"),
        ({"lr_backbone": 0.0}, "model.lr_backbone: expected a positive learning rate, got 0.0"),
        ({"lr_head": math.nan}, "model.lr_head: expected a positive learning rate, got nan"),
        ({"backbone": "vit_small_patch41_dinov2"}, "model.backbone: .*vit_small_patch14_dinov2.* got"),
    ],
)
def test_bad_settings_stop_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        ViTPostTraining(**{**TINY, **options})


def test_weights_of_another_view_size_are_refused_by_name(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file(make_backbone("test_vit", "norm", "random", 64)[0].state_dict(), file)
    with pytest.raises(
        ValueError, match=r"model.init: .*other.safetensors does not fit .*'pos_embed' is \(1, 17, 64\)"
    ):
        ViTPostTraining(**{**TINY, "init": str(file)})
