"""Small views beside the two large ones: where they are from, what a method makes of them, and what is refused."""

import csv
from itertools import product
from pathlib import Path

import pytest
import torch
from making import cli
from reference import box_cells, matches, pixcontrast_loss
from torch import Tensor, nn
from torchvision.io import write_jpeg

from densessl import DistanceMatcher, MaskedView, View, check_tracking, coords_from_boxes
from examples.pretrain.common.anchor import Anchored
from examples.pretrain.common.backbones import make_backbone
from examples.pretrain.common.cli import main
from examples.pretrain.common.data.options import photo_views
from examples.pretrain.common.data.shard_loader import _each
from examples.pretrain.common.data.views import Batch, collate
from examples.pretrain.pixcontrast import recipe as pixcontrast
from examples.pretrain.pixcontrast_multicrop import PixContrastMulticrop

CONFIG = Path(__file__).parents[2] / "examples" / "pretrain" / "configs" / "pixcontrast_multicrop_r50.yaml"
MULTICROP = {"preset": "multicrop", "photometric": "none", "size": 32, "small": 3, "small_size": 16}
ARGS = ["--data.size=48", "--data.small=2", "--data.small_size=32", "--data.batch_size=4", "--data.workers=0",
        "--data.photometric=cpu", "--method.hidden_dim=32", "--method.dim=16", "--trainer.max_steps=2",
        "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
        "--probe.images=0"]  # fmt: skip
RESNET = ["--backbone.name=resnet18", "--backbone.layer=layer2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for index in range(8):
        noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(index)) * 255
        write_jpeg(nn.functional.interpolate(noise, (60, 80))[0].byte(), str(root / f"{index}.jpg"))
    return root


class Cells(nn.Module):
    """A backbone whose map has a cell for every 3 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, (3, 2), (3, 2))

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image)


@pytest.mark.parametrize(("small", "masked"), [(0, False), (2, False), (3, True)])
def test_the_loss_is_the_mean_over_all_pairs_with_a_large_view(small, masked):
    method = PixContrastMulticrop(Cells(), 5, hidden_dim=7, dim=6).double()
    for parameter in method.target.parameters():  # another network than the online one
        parameter.data += 0.1 * torch.randn_like(parameter)
    corners = 0.2 * torch.rand(2 + small, 2, 2)
    boxes = torch.cat([corners, corners + 0.4 + 0.4 * torch.rand(2 + small, 2, 2)], -1).double()
    sizes, views = [(4, 5), (4, 5), *[(2, 3)] * small], []
    for box, (h, w) in zip(boxes, sizes, strict=True):
        image = torch.randn(2, 3, 3 * h, 2 * w, dtype=torch.float64)
        view = View(image, coords_from_boxes(box), torch.tensor([[90, 120]] * 2))
        views.append(MaskedView(*view, torch.rand(2, 3 * h, 2 * w) > 0.4) if masked else view)
    step = method(*views)
    with torch.no_grad():
        maps = [method.encoder(view.image) for view in views[:2]]
        if small:
            maps += method.encoder(torch.cat([view.image for view in views[2:]])).chunk(small)
        keys = [method.target(view.image) for view in views[:2]]
    valid = [nn.functional.avg_pool2d(v.mask.float(), (3, 2)).flatten(1) >= 0.5 if masked else None for v in views]
    expected = {}
    for q, k in product(range(2 + small), range(2)):
        if q != k:
            cells = [[box_cells(tuple(box), sizes[v], (120.0, 90.0)) for box in boxes[v].tolist()] for v in (q, k)]
            found = [matches(one, other, 0.7, source=(120.0, 90.0)) for one, other in zip(*cells, strict=True)]
            mask = torch.tensor(found)
            if masked:
                mask &= valid[q][:, :, None] & valid[k][:, None]
            expected[q, k] = pixcontrast_loss(maps[q], keys[k], mask, 0.3, valid_k=valid[k])
    assert float(step.loss) == pytest.approx(float(sum(expected.values()) / len(expected)), abs=1e-6)
    of_small = [float(value) for (q, _), value in expected.items() if q > 1]
    assert float(step.terms["large"]) == pytest.approx(float(expected[0, 1] + expected[1, 0]) / 2, abs=1e-6)
    assert ("small" in step.terms) == bool(small)
    if small:
        assert float(step.terms["small"]) == pytest.approx(sum(of_small) / len(of_small), abs=1e-6)
        assert any(of_small)
    step.loss.backward()
    assert all(p.grad is not None for p in method.encoder.parameters())
    assert all(p.grad is None for p in method.target.parameters())


def test_small_views_know_where_they_are_from():
    draw = photo_views("unused", **MULTICROP, scale=(0.4, 1.0), quarter_turns=True, vertical_flip=True).draw
    check_tracking(draw.views, draws=20)
    image = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    batch = draw(image, "a.jpg", 0, 4)
    assert [tuple(view.image.shape[1:]) for view in batch.views] == [(32, 32)] * 2 + [(16, 16)] * 3
    assert len({tuple(view.coords.flatten().tolist()) for view in batch.views}) == 5
    without = photo_views(
        "unused", **MULTICROP | {"small": 0}, scale=(0.4, 1.0), quarter_turns=True, vertical_flip=True
    ).draw
    for one, other in zip(batch.views, without(image, "a.jpg", 0, 4).views, strict=False):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.coords, other.coords)
    assert DistanceMatcher()(batch.small[0].coords[None], batch.view1.coords[None], (3, 3), (5, 5)).shape == (1, 9, 25)


def test_batches_of_eight_and_sixteen_bits_and_what_workers_have_over():
    draw = photo_views("unused", **MULTICROP).draw
    images = [torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8), torch.rand(3, 50, 70)]
    batch = collate([draw(image, "a.png", 0, index) for index, image in enumerate(images)])
    assert [view.image.dtype for view in batch.views] == [torch.float32] * 5
    assert [tuple(view.coords.shape) for view in batch.views] == [(2, 3, 3)] * 5
    assert all(float(view.image[0].max()) <= 1 for view in batch.views)
    twice = _each(torch.cat, batch, batch)
    assert isinstance(twice, Batch)
    assert [len(view.image) for view in twice.views] == [4] * 5
    assert collate([Batch(*draw(images[0], "a.png", 0, 0)[:4])] * 2).views[2:] == []


@pytest.mark.parametrize("anchor", [0, 2])
def test_two_steps_from_the_command_line(anchor, folder, tmp_path):
    made = cli(PixContrastMulticrop, *ARGS, *RESNET, "--data.folder", str(folder), "--out", str(tmp_path),
               f"--method.anchor={anchor}")  # fmt: skip
    before = made.module.method.encoder[0].state_dict()["conv1.weight"].clone()
    made.fit()
    assert not torch.equal(before, made.module.method.encoder[0].state_dict()["conv1.weight"])
    assert isinstance(made.method, Anchored) == bool(anchor)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert all(float(row["loss/small"]) > 0 and float(row["loss/large"]) > 0 for row in rows)
    if anchor:
        assert float(rows[0]["loss/anchor"]) >= 0
    else:  # 2 of 6 pairs are of large views alone
        for row in rows:
            assert float(row["loss"]) == pytest.approx((float(row["loss/large"]) + 2 * float(row["loss/small"])) / 3)


def test_the_configuration(folder, tmp_path):
    made = cli(PixContrastMulticrop, "--config", str(CONFIG), f"--data.folder={folder}", f"--out={tmp_path}",
               "--backbone.init=random", "--backbone.freeze_statistics=false", "--backbone.name=resnet18",
               "--trainer.accelerator=cpu", "--trainer.precision=32")  # fmt: skip
    assert made.data.draw.views.transforms[2].transforms[0].size == (128, 128)
    assert (len(made.data.on_device), made.method.anchor, made.trainer.max_steps) == (6, 20, 250)


def test_colours_of_the_device_reach_every_view(folder):
    data = photo_views(str(folder), **MULTICROP | {"photometric": "device"})
    assert len(data.on_device) == 5
    assert data.on_device[2] is data.on_device[4]
    assert len(photo_views(str(folder), **MULTICROP).on_device) == 5


def test_vits_take_both_sizes_or_are_refused_by_name(caplog):
    backbone, width = make_backbone("test_vit", "norm", size=64, small_size=32)
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, width, 2, 2)
    torch.manual_seed(0)
    plain, _ = make_backbone("test_vit", "norm", size=64)
    backbone.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone.eval()(image), plain.eval()(image))
    with pytest.raises(
        ValueError, match=r"data.small_size: test_vit does not take views of 40 px: image: .*patch of 16"
    ):
        make_backbone("test_vit", "norm", size=64, small_size=40)
    with pytest.raises(ValueError, match=r"data.small_size: convit_tiny does not take views of 32 px: "):
        make_backbone("convit_tiny", "norm", size=64, small_size=32)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.small=-1"], "data.small: expected at least 0, got -1"),
        (["--data.small_size=0"], "data.small_size: expected at least 1, got 0"),
        (["--data.small_scale=[0.5,0.1]"], r"data.small_scale: expected shares .* got \[0.5, 0.1\]"),
        (["--data.preset=byol"], "data.small: expected 0 with data.preset=byol, got 2"),
        (["--data.flow=flow"], "data.small: expected 0 with data.flow, got 2"),
    ],
)
def test_bad_options_are_refused_by_name(args, message, folder):
    with pytest.raises(ValueError, match=message):
        cli(PixContrastMulticrop, *ARGS, *RESNET, "--data.folder", str(folder), *args)


def test_other_recipes_have_no_such_options(folder):
    with pytest.raises(SystemExit, match=r"error: .*data.small"):
        main(pixcontrast(), ["fit", "--data.folder", str(folder), "--data.small=2", "--trainer.max_steps=1"])
