"""Post-training of a ViT: what moves and at which rate, how far, and what is left behind."""

import csv
import math
from pathlib import Path

import pytest
import timm
import torch
from making import cli
from reference import box_cells, cosine, matches, pixcontrast_loss, tokens
from safetensors.torch import save_file
from torch import Tensor
from torchvision.io import write_jpeg

from densessl import FeatureMap, MaskedView, View, coords_from_boxes
from densessl.checkpoints import load_backbone
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.optimizers import BackboneAdamW
from examples.pretrain.vit_posttrain import ViTPostTraining

# Six blocks of 64 channels, patches of 16 pixels, one class token.
SIZE = 48
TINY = ["--backbone.name=test_vit", "--backbone.init=random", "--method.hidden_dim=32", "--method.dim=16"]


def made_of(init: str = "random", name: str = "test_vit", layer: str = "norm", size: int = SIZE, **options):
    return ViTPostTraining(*make_backbone(name, layer, init, size), **{"hidden_dim": 32, "dim": 16, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for index in range(16):
        noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(index)) * 255
        write_jpeg(torch.nn.functional.interpolate(noise, (60, 80))[0].byte(), str(root / f"{index}.jpg"))
    return root


def fit(folder: Path, out: Path, *args: str):
    """Four steps an epoch; the module's state before the first."""
    made = cli(
        ViTPostTraining, *TINY, "--data.folder", str(folder), f"--data.size={SIZE}", "--data.batch_size=4",
        "--data.workers=0", "--data.photometric=cpu", "--data.scale=[0.4,1.0]", "--out", str(out),
        "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", *args,
    )  # fmt: skip
    before = {name: value.clone() for name, value in made.method.state_dict().items() if isinstance(value, Tensor)}
    made.fit()
    return made, before


def column(out: Path, name: str) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_rates_rise_and_fall_together(folder, tmp_path):
    fit(folder, tmp_path, "--trainer.max_epochs=3", "--optimizer.warmup=0.25", "--optimizer.lr_backbone=2e-5",
        "--optimizer.lr_head=3e-4")  # fmt: skip
    shape = [(s + 1) / 3 for s in range(3)] + [(1 + math.cos(math.pi * s / 9)) / 2 for s in range(9)]
    for group, rate in ((1, 2e-5), (2, 2e-5), (3, 3e-4), (4, 3e-4)):
        assert column(tmp_path, f"lr-AdamW/pg{group}") == pytest.approx([rate * x for x in shape])


def test_only_weights_of_layers_decay():
    method = made_of(name="vit_small_patch14_reg4_dinov2.lvd142m", size=28)
    backbone = method.encoder.backbone
    decayed, other = BackboneAdamW(1e-5, 1e-4, 0.04)(method, 64, 10).optimizer.param_groups[:2]
    assert [group["initial_lr"] for group in (decayed, other)] == [1e-5, 1e-5]
    names = {id(p): name for name, p in backbone.named_parameters()}
    kept = {names.pop(id(p)) for p in other["params"]}
    assert {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias", "blocks.3.ls1.gamma", "norm.weight"} <= kept
    rest = {names.pop(id(p)) for p in decayed["params"]}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert rest == {"patch_embed.proj.weight"} | {f"blocks.{i}.{name}.weight" for i in range(12) for name in layers}
    assert not names


@pytest.mark.parametrize("blocks", [1, 4])
def test_all_but_the_last_blocks_stay(blocks, folder, tmp_path):
    made, before = fit(folder, tmp_path, f"--method.trained_blocks={blocks}", "--optimizer.lr_backbone=1e-3",
                       "--momentum=[0.9,1.0]")  # fmt: skip  # at the published ones float32 rounds first steps away
    module = made.method
    expected = (
        "encoder.projector.",
        "encoder.backbone.norm.",
        *(f"encoder.backbone.blocks.{i}." for i in range(6 - blocks, 6)),
    )
    for name, p in module.encoder.named_parameters(prefix="encoder"):
        moves = name.startswith(expected)
        assert torch.equal(p, before[name]) != moves, name
        assert (p.grad is not None) == moves, name
        assert torch.equal(module.target.module.get_parameter(name[8:]), before[name]) != moves, name
    last = 6 - blocks
    assert not any(module.encoder.backbone.get_submodule(f"blocks.{i}").training for i in range(last))
    assert all(module.encoder.backbone.get_submodule(f"blocks.{i}").training for i in range(last, 6))


def test_the_metric_of_drift_starts_at_one(folder, tmp_path):
    made, before = fit(folder, tmp_path, "--trainer.max_epochs=2", "--optimizer.lr_backbone=1e-3")
    similar = column(tmp_path, "health/similarity_to_start")
    assert len(similar) == 8
    assert similar[0] == pytest.approx(1, abs=1e-6)
    assert similar[-1] < 0.99
    assert not made.method.start.training
    for name, value in made.method.start.state_dict().items():  # where it began, also in a checkpoint
        assert torch.equal(value, before[f"start.{name}"])
        assert torch.equal(value, before[f"encoder.backbone.{name}"])
        assert torch.equal(value, before[f"target.module.backbone.{name}"])


BOXES = [[(0.0, 0.1, 0.7, 0.8), (0.2, 0.0, 0.9, 0.6)], [(0.9, 0.0, 0.3, 1.0), (0.1, 0.2, 0.6, 0.7)]]  # by view


def moved() -> ViTPostTraining:
    """A method whose encoder and target have left the start."""
    module = made_of(pixel_distances=False).double()
    for p in module.encoder.parameters():
        p.data += 0.02 * torch.randn_like(p)
    module.target.update(module.encoder, 0.5)
    return module


def test_loss_and_metric_equal_the_loops():
    module = moved()
    images = torch.randn(2, 2, 3, 48, 48, dtype=torch.float64)
    views = [View(images[v], coords_from_boxes(torch.tensor(BOXES[v])), torch.tensor([[48, 48]] * 2)) for v in range(2)]
    loss, _, metrics = module(*views)
    logged = {name: float(value) for name, value in metrics().items()}

    cells = [[box_cells(box, (3, 3)) for box in BOXES[v]] for v in range(2)]
    mask = torch.tensor([matches(cells[0][b], cells[1][b], 0.7) for b in range(2)])
    with torch.no_grad():
        (z1, z2), (t1, t2) = ([encode(x)[1] for x in images] for encode in (module.encoder, module.target.module))
        now, then = (tokens(encode(images[0])) for encode in (module.encoder.backbone, module.start))
    expected = 0.5 * (pixcontrast_loss(z1, t2, mask, 0.3) + pixcontrast_loss(z2, t1, mask.mT, 0.3))
    torch.testing.assert_close(loss, expected, check_dtype=False, rtol=1e-6, atol=0)
    similar = [float(cosine(now[b, i], then[b, i])) for b in range(2) for i in range(9)]
    assert logged["health/similarity_to_start"] == pytest.approx(sum(similar) / 18, abs=1e-6)
    assert max(similar) < 0.999


def test_cells_without_data_do_not_count():
    module = moved()
    images, data = torch.randn(2, 2, 3, 48, 48, dtype=torch.float64), torch.ones(2, 2, 48, 48, dtype=torch.uint8)
    data[0, :, :16], data[1, :, :, 32:] = 0, 0  # the first row of view 1's cells, the last column of view 2's
    views = [
        MaskedView(images[v], coords_from_boxes(torch.tensor(BOXES[v])), torch.tensor([[48, 48]] * 2), data[v])
        for v in range(2)
    ]
    asked = []
    module.loss.register_forward_hook(lambda _, args, value: asked.append(args[2:]))
    logged = {name: float(value) for name, value in module(*views).metrics().items()}
    valid1, valid2 = [i >= 3 for i in range(9)], [i % 3 < 2 for i in range(9)]
    (mask, keys), (back, back_keys) = asked
    assert mask.any()
    assert torch.equal(back, mask.mT)
    assert not mask[:, [not v for v in valid1]].any()
    assert keys.tolist() == [valid2] * 2
    assert back_keys.tolist() == [valid1] * 2
    with torch.no_grad():
        now, then = (tokens(encode(images[0])) for encode in (module.encoder.backbone, module.start))
    similar = [float(cosine(now[b, i], then[b, i])) for b in range(2) for i in range(3, 9)]
    assert logged["health/similarity_to_start"] == pytest.approx(sum(similar) / 12, abs=1e-6)


def test_sparse_masks_train_as_dense_ones(folder, tmp_path):
    runs = []
    for sparse in ("false", "true"):
        torch.manual_seed(0)
        made, _ = fit(folder, tmp_path / sparse, f"--method.sparse={sparse}", "--optimizer.lr_backbone=1e-3")
        assert made.method.match.sparse == (sparse == "true")
        names = ("loss", "health/positives_per_cell", "health/similarity_negative")
        runs.append([column(tmp_path / sparse, name) for name in names])
    for dense, sparse in zip(*runs, strict=True):
        assert dense == pytest.approx(sparse, rel=1e-4)


def test_what_is_left_behind_loads_into_timm_and_goes_on(folder, tmp_path):
    made, _ = fit(folder, tmp_path, "--optimizer.lr_backbone=1e-3", "--save_every_n_steps=4")
    own, image = made.method.encoder.backbone.eval(), torch.randn(2, 3, 48, 48)
    for file in (tmp_path / "encoder.safetensors", tmp_path / "checkpoints" / "last.ckpt"):
        plain = timm.create_model("test_vit", img_size=48, num_classes=5).eval()
        read = load_backbone(plain, file)
        assert not any(name.startswith(("start", "target")) for name in read.weights)
        torch.testing.assert_close(FeatureMap(plain, "norm")(image), own(image))
        again = made_of(str(file))
        for part in (again.encoder.backbone, again.target.module.backbone, again.start):
            for name, value in own.state_dict().items():
                assert torch.equal(part.state_dict()[name], value)
    plain.set_input_size(img_size=(64, 96))  # timm's own interpolation of the position embedding
    assert FeatureMap(plain, "norm")(torch.randn(1, 3, 64, 96)).shape == (1, 64, 4, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 50}, "data.size: expected a multiple of test_vit's patch of 16 px, got 50"),
        ({"trained_blocks": 7}, "method.trained_blocks: expected 1 to 6, the backbone's blocks, got 7"),
        ({"trained_blocks": 0}, "method.trained_blocks: expected 1 to 6, .* got 0"),
        ({"trained_blocks": 1, "name": "resnet18", "layer": "layer2"}, "method.trained_blocks: .* without blocks"),
        ({"name": "vit_small_patch41_dinov2"}, "backbone.name: .*vit_small_patch14_dinov2.* got"),
    ],
)
def test_bad_settings_stop_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        made_of(**options)


@pytest.mark.parametrize(("name", "rate"), [("lr_backbone", 0.0), ("lr_head", math.nan)])
def test_bad_rates_stop_before_training(name, rate):
    with pytest.raises(ValueError, match=rf"optimizer.{name}: expected a positive learning rate, got {rate}"):
        BackboneAdamW(**{name: rate})(made_of(), 64, 10)


def test_weights_of_another_view_size_are_refused_by_name(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file(make_backbone("test_vit", "norm", "random", 64)[0].state_dict(), file)
    with pytest.raises(
        ValueError, match=r"backbone.init: .*other.safetensors does not fit .*'pos_embed' is \(1, 17, 64\)"
    ):
        made_of(str(file))
