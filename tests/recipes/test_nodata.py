"""Recipes on images with pixels without data: their cells neither match nor count."""

import csv
import math
from pathlib import Path

import pytest
import torch
from making import TINY, cli, drawing, small
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import write_png

from densessl import MaskedView, PixContrastLoss, PixProLoss, cell_validity
from examples.pretrain.common.data.files import Photos
from examples.pretrain.common.data.options import photo_views
from examples.pretrain.common.data.segments import Grid, NoData
from examples.pretrain.pixcontrast import PixContrast
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_fpn import PixProFPN
from examples.pretrain.pixpro_instance import PixProInstance


@pytest.fixture(scope="module")
def bordered(tmp_path_factory) -> Path:
    """Eight photos, the left half of each without data; the first two without any."""
    root = tmp_path_factory.mktemp("bordered")
    for index in range(8):
        pixels = torch.randint(1, 256, (3, 40, 64), dtype=torch.uint8)
        pixels[:, :, : 32 if index > 1 else 64] = 0
        pixels[0, ::7, 40:] = 0  # data: not all channels are 0
        write_png(pixels, str(root / f"{index}.png"))
    return root


class Seen(Callback):
    """The batches of a run, what its matcher gave, and what its dense loss was asked."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.batches, self.masks, self.asked = [], [], []
        model.match.register_forward_hook(lambda module, args, mask: self.masks.append(mask))
        loss = model.pixel_loss if isinstance(model, PixProInstance) else model.loss
        loss.register_forward_hook(lambda module, args, value: self.asked.append(args))

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.batches.append(batch)


@pytest.mark.parametrize("photometric", ["device", "cpu"])
@pytest.mark.parametrize(
    ("method", "extra"),
    [
        (PixPro, []),
        (PixPro, ["--data.segments=grid"]),
        (PixContrast, []),
        (PixProInstance, ["--method.instance=consistency"]),
        (PixProInstance, ["--method.instance=contrast"]),
    ],
)
def test_cells_without_data_neither_match_nor_count(method, extra, photometric, bordered, tmp_path):
    made = cli(method, *TINY, "--data.folder", str(bordered), "--data.size=32", "--data.batch_size=8",
               "--data.workers=0", "--out", str(tmp_path), "--trainer.accelerator=cpu", "--trainer.max_steps=1",
               "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.nodata=0",
               "--data.scale=[0.5,1.0]", f"--data.photometric={photometric}", "--trainer.log_every_n_steps=1",
               *extra)  # fmt: skip
    seen = Seen(made.method)
    made.trainer.callbacks.append(seen)
    made.fit()
    (batch,), (mask,) = seen.batches, seen.masks
    for view, cells in ((batch.view1, mask.any(2)), (batch.view2, mask.any(1))):
        data = F.avg_pool2d((view.mask != 0).float()[:, None], 8).flatten(1) >= 0.5
        assert 0 < data.sum() < data.numel()
        assert not (cells & ~data).any()
    unmatched = ~mask.flatten(1).any(1)
    assert unmatched.sum() >= 2
    assert mask.any()
    with (tmp_path / "metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["health/images_without_match"])
    assert float(row["health/images_without_match"]) == unmatched.float().mean()
    assert math.isfinite(float(row["loss"]))
    assert all(p.isfinite().all() for p in made.method.parameters())  # images without data leave no 0 / 0 behind
    assert len(seen.asked) == 2
    for query, key, of_mask, *valid in seen.asked:
        if method is PixContrast:
            assert not (of_mask.any(1) & ~valid[0]).any()
            assert not valid[0].all()
        loss = (PixContrastLoss if method is PixContrast else PixProLoss)(reduction="none")
        assert torch.equal(loss(query, key, of_mask, *valid) == 0, unmatched)


def test_at_every_level_of_a_pyramid(bordered, tmp_path):
    made = cli(PixProFPN, "--backbone.name=resnet18", "--backbone.top=p5", "--method.hidden_dim=32", "--method.dim=16",
               "--data.folder", str(bordered), "--data.size=64", "--data.batch_size=8", "--data.workers=0", "--out",
               str(tmp_path), "--trainer.accelerator=cpu", "--trainer.max_steps=1", "--data.scale=[0.5,1.0]",
               "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.nodata=0",
               "--trainer.log_every_n_steps=1")  # fmt: skip
    seen, asked = Seen(made.method), []
    made.method.ppm.register_forward_hook(lambda module, args, out: asked.append(args[1]))
    made.trainer.callbacks.append(seen)
    made.fit()
    (batch,), (masks,) = seen.batches, seen.masks
    assert list(masks) == ["p3", "p4", "p5"]
    for level, stride in (("p3", 8), ("p4", 16), ("p5", 32)):
        one, other = (
            F.avg_pool2d((view.mask != 0).float()[:, None], stride).flatten(1) >= 0.5
            for view in (batch.view1, batch.view2)
        )
        assert torch.equal(asked[0][level], one)
        assert torch.equal(asked[1][level], other)
        assert masks[level].any()
        assert not (masks[level] & ~(one[:, :, None] & other[:, None])).any()
    with (tmp_path / "metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["loss"])
    assert math.isfinite(float(row["loss"]))


class Maps(torch.nn.Module):
    """Stands for an encoder: what a view shows, cell by cell, and junk in the place of cells without data."""

    def __init__(self, views: list[MaskedView], junk: Tensor, heads: int) -> None:
        super().__init__()
        self.views, self.junk, self.heads = views, junk, heads

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        (view,) = (view for view in self.views if view.image is image)
        here = cell_validity(view.mask, (4, 4)).view(-1, 1, 4, 4)
        cells = F.adaptive_avg_pool2d(image.float(), (4, 4)).repeat(1, 6, 1, 1)[:, :16]
        cells = torch.where(here, cells, self.junk)
        return (cells,) * self.heads if self.heads > 1 else cells


@pytest.mark.parametrize("method", [PixPro, PixContrast, PixProInstance])
def test_what_cells_without_data_hold_changes_no_loss(method, bordered):
    """Beyond the backbone, which sees over their edges: in the maps, whatever stands in their place."""
    paths = sorted(bordered.glob("*.png"))
    photos = Photos(paths, drawing(mask_of=NoData(0), scale=(0.9, 1.0)), channels=3)
    batch = torch.utils.data.default_collate([photos[(0, index)] for index in range(8)])
    model = small(method, hidden_dim=32, dim=16)
    if method is PixProInstance:
        model.predictor = torch.nn.Identity()  # its batch norm sees all cells
    values = []
    for junk in (torch.zeros(8, 16, 4, 4), 1000 * torch.randn(8, 16, 4, 4)):
        model.encoder = model.target = Maps([batch.view1, batch.view2], junk, 2 if method is PixProInstance else 1)
        values.append(model(batch.view1, batch.view2).loss)
    assert values[0] != 0
    torch.testing.assert_close(values[0], values[1])


def test_views_of_the_border_alone_are_drawn_again(bordered):
    def with_data(redraws: int) -> float:
        draw = drawing(redraws=redraws, mask_of=NoData(0), scale=(0.1, 0.2))
        photos = Photos(sorted(bordered.glob("*.png"))[2:3], draw, channels=3)
        samples = [photos[(epoch, 0)] for epoch in range(40)]
        return sum(bool(s.view1.mask.any() and s.view2.mask.any()) for s in samples) / 40

    assert with_data(0) < 0.6 < 0.9 < with_data(20)


@pytest.mark.parametrize(
    ("image", "value", "message"),
    [
        (torch.zeros(3, 4, 5, dtype=torch.uint8), 256, "a whole number in 0..255, .* got 256"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), -1, "a whole number in 0..255, .* got -1"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), 0.5, "a whole number in 0..255, .* got 0.5"),
        (torch.zeros(3, 4, 5), 65535, "at most 1: 16 bits are divided by 65,535, got 65535"),
    ],
)
def test_values_that_no_pixel_can_have(image, value, message):
    with pytest.raises(ValueError, match=f"data.nodata: expected {message}"):
        NoData(value)(image)
    assert NoData(-9999.0)(torch.full((3, 4, 5), -9999.0)).sum() == 0  # of a float file


def test_segments_and_pixels_without_data_together():
    image = torch.ones(3, 10, 12)
    image[:, :, :5] = 0.25
    image[0, 0, 0] = 0.5  # one channel is enough
    for segments, dtype in ((None, torch.uint8), (Grid(2), torch.uint8), (lambda x: Grid(2)(x).long(), torch.int64)):
        mask = NoData(0.25, segments)(image)
        assert mask.dtype == dtype
        here = (torch.arange(12) >= 5).expand(10, 12).clone()
        here[0, 0] = True
        assert torch.equal(mask != 0, here)
        expected = torch.ones(10, 12).byte() if segments is None else Grid(2)(image)
        assert torch.equal(mask[here], expected[here].to(dtype))
    assert photo_views("unused").draw.mask_of is None
    assert isinstance(photo_views("unused", nodata=0, segments="grid").draw.mask_of.segments, Grid)
