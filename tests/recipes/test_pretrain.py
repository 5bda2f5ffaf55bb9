"""The pretraining recipes: configurations, training, resuming, several processes, bad input."""

import csv
import logging
import math
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from making import TINY, cli, drawing, without_images
from torchvision.io import write_jpeg, write_png

import densessl
from densessl import MaskedView, View, check_tracking
from examples.pretrain.common.backbones import make_backbone, make_model
from examples.pretrain.common.callbacks import StopOnCollapse
from examples.pretrain.common.data.decode import read_photo
from examples.pretrain.common.data.files import Photos
from examples.pretrain.common.data.loader import ResumableLoader
from examples.pretrain.common.data.options import QuarterTurn, photo_views
from examples.pretrain.common.data.seeds import seed_of
from examples.pretrain.common.data.segments import Felzenszwalb, Grid
from examples.pretrain.common.optimizers import backbone_of
from examples.pretrain.common.step import pair_metrics
from examples.pretrain.densecl import DenseCL
from examples.pretrain.detcon import DetCon
from examples.pretrain.ibot_cross_view import IBOTCrossView
from examples.pretrain.neco import NeCo
from examples.pretrain.own_method import OwnMethod
from examples.pretrain.paka import PaKA
from examples.pretrain.pixcontrast import PixContrast
from examples.pretrain.pixcontrast_instance import PixContrastInstance
from examples.pretrain.pixpro import PixPro
from examples.pretrain.pixpro_instance import PixProInstance
from examples.pretrain.pixpro_video import PixProVideo
from examples.pretrain.slotcon import SlotCon
from examples.pretrain.vicregl import VICRegL
from examples.pretrain.vit_posttrain import ViTPostTraining
from examples.quickstart.moving import write_frames

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "pretrain"
CONFIGS_FOLDER = RECIPES / "configs"
RUNNER = Path(__file__).parent / "pretrain_runner.py"
METHODS = {
    "pixpro": PixPro,
    "pixcontrast": PixContrast,
    "pixcontrast_instance": PixContrastInstance,
    "pixpro_instance": PixProInstance,
    "pixpro_video": PixProVideo,
    "own_images": PixPro,
    "densecl": DenseCL,
    "vicregl": VICRegL,
    "detcon": DetCon,
    "slotcon": SlotCon,
    "vit_posttrain": ViTPostTraining,
    "paka": PaKA,
    "neco": NeCo,
    "ibot_cross_view": IBOTCrossView,
    "own_method": OwnMethod,  # trained by its docs page, in test_docs.py
}
# Learning rates, as their papers or authors name them.
RATES = {
    DenseCL: ("lr_at_256", 0.03),
    VICRegL: ("lr_at_256", 0.2),
    DetCon: ("lr_at_256", 0.3),
    SlotCon: ("lr_at_256", 1.0),
    ViTPostTraining: ("lr_backbone", 1e-5),
    PaKA: ("lr_backbone", 1e-5),
    NeCo: ("lr_backbone", 1e-5),
    IBOTCrossView: ("lr_backbone", 2e-3),
}
# Of a view of 224 px; the others train a ResNet-50.
MAPS = dict.fromkeys((ViTPostTraining, PaKA, NeCo), (384, 16, 16))
MAPS |= {IBOTCrossView: (384, 14, 14), OwnMethod: (128, 28, 28)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Forty photos of differing sizes, nested."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(40):
        noise = torch.rand(1, 3, 5 + index % 3, 7, generator=torch.Generator().manual_seed(index)) * 255
        pixels = torch.nn.functional.interpolate(noise, (48 + index % 5, 64), mode="bilinear")[0].byte()
        path = root / f"class{index % 3}" / f"{index:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        write_jpeg(pixels, str(path))
    return root


# Those of test_pixpro_fpn.py, test_small_views.py and test_anchor.py are not here.
ELSEWHERE = ("pixpro_fpn_", "pixcontrast_multicrop_", "own_images.")
CONFIGS = sorted(path.name for path in CONFIGS_FOLDER.glob("*.yaml") if not path.name.startswith(ELSEWHERE))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_is_instantiated(config, tmp_path, monkeypatch):
    without_images(monkeypatch)
    method = next(METHODS[name] for name in sorted(METHODS, key=len, reverse=True) if config.startswith(name))
    made = cli(method, "--config", str(CONFIGS_FOLDER / config), "--data.folder", "x", "--out", str(tmp_path),
               "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32",
               "--backbone.init=random",  # no download in the tests
               *(["--data.flow=x"] if method is PixProVideo else []))  # fmt: skip
    assert backbone_of(made.method)(torch.zeros(1, 3, 224, 224)).shape == (1, *MAPS.get(method, (2048, 7, 7)))
    name, rate = RATES.get(method, ("lr_at_1024", 4.0))
    assert getattr(made.module.optimizer, name) == rate
    if hasattr(made.method, "target"):
        assert not any(p.requires_grad for p in made.method.target.parameters())


def fit(method: type, folder: Path, out: Path, *args: str):
    made = cli(method, *TINY, "--data.folder", str(folder), "--data.size=32", "--data.batch_size=8",
               "--data.workers=0", "--out", str(out), "--trainer.accelerator=cpu",
               "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", *args)  # fmt: skip
    made.fit()
    return made


@pytest.mark.parametrize("photometric", ["device", "cpu"])
@pytest.mark.parametrize(
    ("method", "extra"),
    [
        (PixPro, ["--method.pixel_distances=true", "--data.quarter_turns=true", "--data.vertical_flip=true"]),
        (PixContrast, ["--trainer.accumulate_grad_batches=2"]),
        (PixContrastInstance, ["--method.alpha=0.5"]),
        (PixProInstance, ["--method.instance=consistency"]),
        (PixProInstance, ["--method.instance=contrast"]),
        (DenseCL, ["--data.preset=mocov2", "--method.queue=20"]),
        (VICRegL, ["--method.keep=[16,4]"]),  # all cells
        (DetCon, ["--data.segments=grid", "--data.grid=3"]),
        (SlotCon, ["--method.prototypes=12", "--data.scale=[0.4,1.0]"]),
        (ViTPostTraining, ["--backbone.name=test_vit", "--backbone.layer=norm", "--backbone.init=random"]),
        (PaKA, ["--backbone.init=random", "--method.grid=3"]),
        (NeCo, ["--backbone.init=random", "--method.grid=3", "--method.queue=40"]),
        (IBOTCrossView, ["--backbone.name=test_vit", "--backbone.layer=norm", "--method.prototypes=12"]),
    ],
)
def test_every_method_trains(method, extra, photometric, folder, tmp_path):
    made = fit(method, folder, tmp_path, "--trainer.max_epochs=1", f"--data.photometric={photometric}",
               "--trainer.log_every_n_steps=1", *extra)  # fmt: skip
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    adamw = dict.fromkeys((ViTPostTraining, PaKA, NeCo, IBOTCrossView), "lr-AdamW/pg1")
    rate = (adamw | {DenseCL: "lr-SGD"}).get(method, "lr-LARS/pg1")
    momentum = [] if method is VICRegL else ["momentum"]
    for name in ("loss", rate, "health/effective_rank", "speed/images_per_s", "speed/data_wait", *momentum):
        assert name in rows[0].split(",")
    steps = made.trainer.global_step
    assert steps == (3 if "accumulate" in extra[0] else 5)
    if method is not VICRegL:
        assert made.method.target.step == steps + 1  # the first update changes nothing
    name, layer = made.config.backbone.name, made.config.backbone.layer
    backbone, _ = make_backbone(name, layer, str(tmp_path / "encoder.safetensors"), 32)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, backbone_of(made.method).state_dict()[key])


def test_schedules_are_the_published_ones(folder, tmp_path):
    made = fit(PixContrast, folder, tmp_path, "--trainer.max_epochs=4", "--optimizer.warmup=0.25",
               "--trainer.log_every_n_steps=1")  # fmt: skip
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr-LARS/pg1"]) for row in rows if row["lr-LARS/pg1"]]
    moments = [float(row["momentum"]) for row in rows if row["momentum"]]
    base, warm, steps = 4.0 * (8 / 1024) ** 0.5, 5, 20
    expected = [base * (0.01 + 0.99 * s / warm) for s in range(warm)]
    expected += [1e-6 + (base - 1e-6) * (1 + math.cos(math.pi * s / (steps - warm))) / 2 for s in range(steps - warm)]
    assert rates == pytest.approx(expected, rel=1e-5)
    # the momentum of the update that follows each step
    assert moments == pytest.approx([1 - 0.01 * (math.cos(math.pi * s / 20) + 1) / 2 for s in range(1, 21)])
    assert made.trainer.global_step == 20


def test_densecls_schedule_is_the_published_one(folder, tmp_path):
    fit(DenseCL, folder, tmp_path, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--method.queue=20",
        "--data.batch_size=4", "--trainer.accumulate_grad_batches=2")  # fmt: skip
    with (tmp_path / "metrics.csv").open() as file:
        rates = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    base = 0.03 * 8 / 256
    assert rates == pytest.approx([base * (1 + math.cos(math.pi * s / 10)) / 2 for s in range(10)])


def test_vicregls_rate_is_the_linear_rules(folder, tmp_path):
    made = fit(VICRegL, folder, tmp_path, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1",
               "--method.keep=[4,4]")  # fmt: skip
    with (tmp_path / "metrics.csv").open() as file:
        rates = [float(row["lr-LARS/pg1"]) for row in csv.DictReader(file) if row["lr-LARS/pg1"]]
    assert rates[1] == pytest.approx(0.2 * 8 / 256)  # after one step of warm-up
    assert made.trainer.global_step == 5


def test_a_short_loss_curve_is_pinned(folder, tmp_path):
    """Changes of the recipe show here; loose, because the photos pass through a JPEG decoder."""
    run(tmp_path, "pixpro", folder, "0", "1", "0", "SIGTERM")
    losses = torch.load(tmp_path / "end.pt")["losses"]
    assert losses == pytest.approx([-0.003, 0.024, -1.758, -2.340, -2.451], abs=0.05)


def test_the_metrics_take_maps_and_tokens():
    query, key = torch.randn(2, 6, 3, 5), torch.randn(2, 6, 4, 2)
    mask = torch.rand(2, 15, 8) < 0.3
    of_tokens = pair_metrics(densessl.map_to_tokens(query), densessl.map_to_tokens(key), mask)
    assert of_tokens == pair_metrics(query, key, mask)
    assert of_tokens["health/std_times_sqrt_c"] == pytest.approx(0.96, abs=0.06)  # spread evenly


# --- killed, continued, several processes -----------------------------------------------------------------------------


def run(out: Path, method: str, folder: Path, *args: str, processes: int = 1) -> int:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(RUNNER), method, str(folder), str(out), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, -signal.SIGKILL, -signal.SIGTERM, 143), done.stderr[-3000:]
    return done.returncode


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("whole")
    run(out, "pixpro", folder, "0", "3", "0", "SIGTERM")
    return torch.load(out / "end.pt")


def test_a_run_stopped_in_mid_epoch_ends_as_if_it_had_not_been(folder, uninterrupted, tmp_path):
    """SIGKILL after a checkpoint at step 6, continued with other workers; SIGTERM: test_survival.py."""
    assert run(tmp_path, "pixpro", folder, "0", "3", "7", "SIGKILL") == -signal.SIGKILL
    run(tmp_path, "pixpro", folder, "2", "3", "0", "SIGTERM", "last")
    continued = torch.load(tmp_path / "end.pt")
    assert len(continued["losses"]) == 15 - 6
    assert continued["losses"] == uninterrupted["losses"][-len(continued["losses"]) :]
    for key, value in uninterrupted["state"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, continued["state"][key]), key


@pytest.mark.parametrize(
    "methods",
    [
        ["pixpro", "pixpro_instance", "densecl", "vicregl", "pixpro_video"],
        ["anchored", "pixcontrast_instance", "paka", "neco", "ibot_cross_view", "pixcontrast_multicrop"],
    ],
)
def test_one_process_equals_two(methods, folder, tmp_path):
    """Group norm, no_match="zero", negatives gathered; DetCon and SlotCon, without processes: test_family.py."""
    write_frames(tmp_path / "moving", 16, size=48)
    folders = {"pixpro_video": f"={tmp_path / 'moving'}"}
    words = ",".join(method + folders.get(method, "") for method in methods)
    for name, processes, extra in (("one", 1, ["groups"]), ("two", 2, [])):
        (tmp_path / name).mkdir()
        run(tmp_path / name, words, folder, "0", "1", "0", "SIGTERM", *extra, processes=processes)
    for method in methods:
        one, two = (torch.load(tmp_path / name / method / "end.pt") for name in ("one", "two"))
        assert len(one["losses"]) == (2 if method == "pixpro_video" else 5), method
        assert one["losses"] == pytest.approx(two["losses"], abs=1e-4), method
        for key, value in one["state"].items():
            if isinstance(value, torch.Tensor):
                # A bias of attention's keys changes no softmax: its gradient is rounding noise, which Adam blows up.
                ours, theirs = (
                    state.unflatten(0, (3, -1))[::2] if key.endswith("attn.qkv.bias") else state
                    for state in (value, two["state"][key])
                )
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0, msg=f"{method}: {key}")


def test_two_processes_through_the_command_line(folder, tmp_path):
    """All callbacks and loggers: one that asks the other processes on rank 0 alone would hang here."""
    labelled = tmp_path / "labelled"
    for kind in ("images", "masks"):
        (labelled / kind).mkdir(parents=True)
    for index in range(4):
        write_png(torch.randint(0, 256, (3, 36, 48), dtype=torch.uint8), str(labelled / "images" / f"{index}.png"))
        write_png(torch.arange(48).expand(1, 36, 48).div(24).to(torch.uint8), str(labelled / "masks" / f"{index}.png"))
    args = ["fit", "--data.folder", str(folder), "--data.size=32", "--data.batch_size=8", "--data.workers=1", *TINY]
    args += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_epochs=2", "--out", str(tmp_path)]
    args += [f"--probe.labels={labelled}", "--probe.images=4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(RECIPES / "pixcontrast.py"), *args],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "encoder.safetensors").exists()


def test_a_preemption_of_the_whole_process_group_leaves_a_checkpoint(folder, tmp_path):
    """Slurm signals the readers too."""
    command = [sys.executable, str(RUNNER), "pixpro", str(folder), str(tmp_path), "2", "500", "0", "SIGTERM"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, "ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = checkpoint.stat().st_mtime_ns
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)
    assert not (tmp_path / "end.pt").exists()
    assert checkpoint.stat().st_mtime_ns > before
    assert torch.load(checkpoint, weights_only=False)["global_step"] > 0


def test_a_run_continued_at_an_epochs_end_goes_on_with_the_next_epoch(folder, tmp_path):
    """From epoch=N.ckpt, and from a checkpoint of an epoch's last step: the same crops and parameters as without."""
    options = ["--trainer.max_epochs=3", "--save_every_n_epochs=1", "--data.photometric=none"]
    whole = fit(PixPro, folder, tmp_path / "whole", *options, "--save_every_n_steps=5")
    for number, name in enumerate(("epoch=0.ckpt", "epoch=1.ckpt")):
        path = tmp_path / "whole" / "checkpoints" / name
        again = fit(PixPro, folder, tmp_path / str(number), *options, f"--ckpt_path={path}")
        assert again.trainer.global_step == 15
        for key, value in whole.method.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, again.method.state_dict()[key]), (name, key)
    stopped = tmp_path / "stopped"
    fit(PixPro, folder, stopped, "--trainer.max_epochs=2", *options[1:], "--save_every_n_steps=5")
    last = stopped / "checkpoints" / "last.ckpt"  # of step 10, the last of its epoch
    longer = ["--trainer.max_epochs=2", "--extend_to=3", f"--ckpt_path={last}"]
    again = fit(PixPro, folder, tmp_path / "after", *options[1:], *longer)
    assert again.trainer.global_step == 15


# --- data -------------------------------------------------------------------------------------------------------------


def dataset(paths: list[Path], channels: int = 3, **options) -> Photos:
    return Photos(paths, drawing(**options), channels=channels)


def test_draws_are_functions_of_seed_epoch_index_and_view(folder):
    photos = dataset(sorted(folder.rglob("*.jpg")))
    torch.manual_seed(1)
    first = photos[(2, 5)]
    torch.manual_seed(2)
    again = photos[(2, 5)]
    assert torch.equal(first.view1.image, again.view1.image)
    assert torch.equal(first.view2.coords, again.view2.coords)
    assert not torch.equal(first.view1.coords, first.view2.coords)
    assert not torch.equal(first.view1.coords, photos[(3, 5)].view1.coords)
    assert not torch.equal(first.view1.coords, photos[(2, 6)].view1.coords)
    assert len({seed_of(*numbers) for numbers in [(0, 1), (1, 0), (0, 0, 1), (0, 1, 0)]}) == 4


@pytest.mark.parametrize("preset", ["byol", "mocov2", "simclr"])
def test_presets_are_the_librarys(preset):
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    data, drawn = photo_views("unused", size=32, photometric="cpu", preset=preset), []
    for views in (data.draw.views, getattr(densessl, f"{preset}_views")(32, scale=(0.08, 1.0))):
        torch.manual_seed(3)  # two views that are blurred, greyed and solarized differently by each preset
        drawn.append([views(image) for _ in range(8)])
    for ours, published in zip(*drawn, strict=True):
        assert all(torch.equal(a.image, b.image) for a, b in zip(ours, published, strict=True))
    on_device = photo_views("unused", preset=preset).on_device
    assert repr(on_device) == repr(getattr(densessl, f"{preset}_photometric")())


def test_every_photo_once_an_epoch_over_all_processes(folder):
    photos = dataset(sorted(folder.rglob("*.jpg")))
    loaders = [ResumableLoader(photos, batch_size=5, rank=r, world_size=2, seed=0, workers=0) for r in range(2)]
    epochs = []
    for _ in range(2):
        keys = [key for loader in loaders for batch in loader._loader.batch_sampler for key in batch]
        assert sorted(index for _, index in keys) == list(range(40))
        epochs.append([index for _, index in keys])
        for loader in loaders:
            assert len(list(loader)) == 4 == len(loader)
            loader.epoch, loader.batch = loader.epoch + 1, 0
    assert epochs[0] != epochs[1]


def test_unreadable_photos_are_named_counted_and_replaced(folder, tmp_path, caplog):
    good = sorted(folder.rglob("*.jpg"))[:3]
    cut, text = tmp_path / "cut.jpg", tmp_path / "text.jpg"
    cut.write_bytes(good[0].read_bytes()[:200])
    text.write_text("no photo")
    photos = dataset([cut, text, *good])
    with caplog.at_level(logging.WARNING):
        sample = photos[(0, 0)]
    assert sample.unreadable == 2
    assert "cut.jpg" in caplog.text
    assert f"{text}: unreadable, another takes its place: it is no image, or its beginning is damaged" in caplog.text
    assert dataset([*good])[(0, 0)].unreadable == 0
    with pytest.raises(ValueError, match="none can be read"):
        dataset([cut, text])[(0, 0)]


def test_too_many_unreadable_photos_stop_the_run(folder, tmp_path):
    rubbish = tmp_path / "photos"
    rubbish.mkdir()
    for index, path in enumerate(sorted(folder.rglob("*.jpg"))[:16]):
        (rubbish / f"{index}.jpg").write_bytes(path.read_bytes() if index % 2 else b"rubbish")
    with pytest.raises(RuntimeError, match=r"unreadable files met in .* images: more than data.max_unreadable = 0.01"):
        fit(PixPro, rubbish, tmp_path / "out", "--trainer.max_epochs=1")
    fit(PixPro, rubbish, tmp_path / "out", "--trainer.max_epochs=1", "--data.max_unreadable=0.9", "--overwrite")


def test_few_unreadable_photos_among_the_first_do_not_stop_a_run(folder, tmp_path):
    """Two among the first eight: far more than the limit, though not of the 40 images of the epoch."""
    some = tmp_path / "photos"
    some.mkdir()
    for index, path in enumerate(sorted(folder.rglob("*.jpg"))):
        (some / f"{index:02}.jpg").write_bytes(path.read_bytes() if index > 1 else b"rubbish")
    options = ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--data.max_unreadable=0.08"]
    assert fit(PixPro, some, tmp_path / "out", *options).trainer.global_step == 5
    with pytest.raises(RuntimeError, match=r"more than data.max_unreadable = 0.05"):
        fit(PixPro, some, tmp_path / "again", *options[:2], "--data.max_unreadable=0.05")
    assert (tmp_path / "out" / "encoder.safetensors").stat().st_mode & 0o777 == 0o644


def test_small_photos_are_enlarged_counted_and_named_once(folder, caplog):
    photos = dataset(sorted(folder.rglob("*.jpg")), size=64)
    with caplog.at_level(logging.WARNING):
        assert photos[(0, 0)].enlarged
        assert photos[(1, 0)].enlarged
    assert caplog.text.count("smaller than the views") == 1


def test_elongated_images_are_drawn_again_until_their_views_meet(tmp_path):
    path = tmp_path / "long.png"
    write_png(torch.randint(0, 256, (3, 64, 256), dtype=torch.uint8), str(path))

    def share_of_meetings(redraws: int) -> float:
        photos = dataset([path], redraws=redraws)
        samples = [photos[(epoch, 0)] for epoch in range(60)]
        return sum(photos.draw.share_cells(s.view1, s.view2) for s in samples) / 60

    assert share_of_meetings(0) < 0.7 < 0.9 < share_of_meetings(20)


def png(pixels: np.ndarray, bits: int) -> bytes:
    """A PNG file of (H, W, C) integers; Pillow writes 16 bits in one channel only."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = pixels.astype(">u1" if bits == 8 else ">u2")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 16])
def test_depths_and_channels(channels, bits, tmp_path):
    pixels = np.random.default_rng(channels).integers(0, 2**bits, (48, 64, channels))
    path = tmp_path / "image.png"
    path.write_bytes(png(pixels, bits))
    image = read_photo(path, channels)
    assert image.dtype == (torch.uint8 if bits == 8 else torch.float32)
    scale = 255 if bits == 8 else 1
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / (2**bits - 1)
    torch.testing.assert_close(image.float() / scale, expected)
    sample = dataset([path], channels=channels)[(0, 0)]
    assert sample.view1.image.shape == (channels, 32, 32)


def test_8_and_16_bits_in_one_batch_are_both_in_0_to_1(tmp_path):
    for bits in (8, 16):
        pixels = np.full((48, 64, 3), 2**bits // 2)
        (tmp_path / f"{bits}.png").write_bytes(png(pixels, bits))
    photos = dataset(sorted(tmp_path.glob("*.png")))
    batch = next(iter(ResumableLoader(photos, batch_size=2, rank=0, world_size=1, seed=0, workers=0)))
    for view in batch[:2]:
        torch.testing.assert_close(view.image, torch.full_like(view.image, 0.5), atol=0.01, rtol=0)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("photometric", "preset"), [("none", "byol"), ("cpu", "multichannel"), ("device", "multichannel")]
)
def test_other_channel_counts_train(photometric, preset, bits, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 2**bits, (40, 44, 4))
        (photos / f"{index}.png").write_bytes(png(pixels, bits))
    made = fit(PixPro, photos, tmp_path / "out", "--trainer.max_epochs=1", "--data.channels=4",
               f"--data.photometric={photometric}", f"--data.preset={preset}", "--data.mean=[0.5,0.5,0.5,0.5]",
               "--data.std=[0.2,0.2,0.2,0.2]")  # fmt: skip
    assert backbone_of(made.method).conv1.in_channels == 4
    assert made.trainer.global_step == 1


def test_quarter_turns_are_tracked():
    assert check_tracking(QuarterTurn(), draws=8).max_error < 0.01


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ramps(tmp_path) -> Path:
    """A photo whose first two channels are its columns, three apart, and its rows, five apart."""
    row, column = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    path = tmp_path / "ramps.png"
    write_png(torch.stack([1 + 3 * column, 1 + 5 * row, 0 * row]).byte(), str(path))
    return path


def column_and_row(image: torch.Tensor) -> torch.Tensor:
    return 256 * image[0].long() + image[1]


def test_a_mask_moves_with_its_view(ramps):
    turned = {"redraws": 1, "vertical_flip": True, "quarter_turns": True}
    photos, without = dataset([ramps], mask_of=column_and_row, **turned), dataset([ramps], **turned)
    for epoch in range(12):
        sample, same = photos[(epoch, 0)], without[(epoch, 0)]
        for view, bare, again in zip(sample[:2], same[:2], photos[(epoch, 0)][:2], strict=True):
            assert view.mask.dtype == torch.int64
            column, row = view.mask // 256, view.mask % 256
            assert (column - view.image[0].long()).abs().max() <= 6  # two columns of the photo
            assert (row - view.image[1].long()).abs().max() <= 10
            assert isinstance(view, MaskedView)
            assert isinstance(bare, View)
            assert torch.equal(view.image, bare.image)  # a mask changes no draw
            assert torch.equal(view.coords, bare.coords)
            assert torch.equal(view.mask, again.mask)


class Watched(PixPro):
    """Keeps its batches."""

    def forward(self, *views):
        self.batches = [*getattr(self, "batches", []), views]
        return super().forward(*views)


@pytest.mark.parametrize("photometric", ["device", "cpu", "none"])
def test_masks_reach_the_method(photometric, folder, tmp_path):
    made = fit(Watched, folder, tmp_path, "--trainer.max_steps=2", "--data.segments=grid", "--data.grid=3",
               f"--data.photometric={photometric}")  # fmt: skip
    for view in (view for views in made.method.batches for view in views):
        assert view.mask.dtype == torch.uint8
        assert view.mask.shape == (8, 32, 32)
        assert view.image.is_contiguous(memory_format=torch.channels_last)
        height, width = view.source_size.mT
        x, y = densessl.cell_centers(view.coords, (32, 32)).unbind(2)
        expected = 1 + 3 * (y * height[:, None] // (height[:, None] / 3)) + x * width[:, None] // (width[:, None] / 3)
        # Up to the pixels on an edge, which are rounded to either side.
        assert (view.mask.flatten(1) == expected).float().mean() > 0.9


def test_a_grid_has_equal_rectangles():
    ids = Grid(3)(torch.zeros(4, 9, 15))
    assert ids.dtype == torch.uint8
    assert torch.equal(ids, torch.arange(1, 10).view(3, 3).repeat_interleave(3, 0).repeat_interleave(5, 1))
    assert Grid(15)(torch.zeros(3, 40, 50)).unique().tolist() == list(range(1, 226))
    with pytest.raises(ValueError, match=r"data.grid: expected 1 to 15 rectangles .*got 16"):
        Grid(16)


@pytest.mark.parametrize("depth", [torch.uint8, torch.float32])
def test_felzenszwalbs_segments_are_flat_areas(depth):
    pytest.importorskip("skimage")
    image = torch.full((3, 40, 60), 20)
    image[:, 5:25, 7:40] = torch.tensor([200, 30, 90])[:, None, None]
    image = image.byte() if depth == torch.uint8 else image.float() / 255
    ids = Felzenszwalb(300)(image)
    assert ids.dtype == torch.int64
    assert ids.unique().tolist() == [1, 2]
    inner = ids == ids[15, 20]
    assert inner[7:23, 9:38].all()  # up to its edge, since the image is smoothed first
    assert not inner[27:].any()
    assert Felzenszwalb(1000)(image).unique().tolist() == [1]  # 660 pixels are too few for one
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        Felzenszwalb(0)


def test_segments_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(ImportError, match=r"pip install 'densessl\[segments\]'"):
        photo_views("unused", segments="felzenszwalb")


def test_a_tiff_names_the_extra_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0")
    with pytest.raises(ImportError, match=r"does not read TIFF; .*densessl\[tiff\]"):
        read_photo(path, 3)


# --- backbones and bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "size", "shape"),
    [
        ("resnet18", "layer3", 64, (256, 4, 4)),
        ("convnext_tiny", "features", 64, (768, 2, 2)),
        ("vit_tiny_patch16_224", "norm", 64, (192, 4, 4)),
        ("vit_small_patch14_reg4_dinov2.lvd142m", "norm", 70, (384, 5, 5)),
        ("pvt_v2_b0", "stages.1", 64, (64, 8, 8)),  # patches of 7 px overlap
        ("xcit_nano_12_p16_224", "norm", 64, (128, 4, 4)),  # says the patch's side as one number
    ],
)
def test_backbones_by_name(name, layer, size, shape):
    backbone, width = make_backbone(name, layer, "random", size)
    assert width == shape[0]
    assert backbone(torch.zeros(2, 3, size, size)).shape == (2, *shape)


def test_a_file_of_the_whole_network_and_one_of_its_beginning_are_read(tmp_path):
    whole = make_model("efficientnet_lite0", False, 64, 3)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    cut, width = make_backbone("efficientnet_lite0", "blocks.2", str(tmp_path / "whole.pth"), 64)
    assert width == 40
    torch.save(cut.state_dict(), tmp_path / "cut.pth")
    again, _ = make_backbone("efficientnet_lite0", "blocks.2", str(tmp_path / "cut.pth"), 64)
    for backbone in (cut, again):
        assert not any(key.startswith("blocks.3") for key in backbone.state_dict())
        assert all(torch.equal(value, whole.state_dict()[key]) for key, value in backbone.state_dict().items())


def test_continuing_from_a_checkpoint(folder, tmp_path):
    made = fit(PixPro, folder, tmp_path, "--trainer.max_epochs=1", "--save_every_n_steps=5")
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    backbone, _ = make_backbone("resnet18", "layer2", str(checkpoint), 32)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, backbone_of(made.method).state_dict()[key])
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(checkpoint.read_bytes()[:5000])
    wrong = ((damaged, "damaged.ckpt"), (checkpoint, "last.ckpt does not fit"), (tmp_path / "no", "no file"))
    for path, message in wrong:
        with pytest.raises(ValueError, match=rf"backbone.init: .*{message}"):
            make_backbone("resnet50", "layer2", str(path), 64)


@pytest.mark.parametrize("freeze", [False, True])
def test_weights_under_other_names_are_refused_in_words_of_the_command_line(freeze, tmp_path):
    state = timm.create_model("test_efficientnet", num_classes=0).state_dict()
    torch.save({f"_{name}": value for name, value in state.items()}, tmp_path / "other.pth")
    told = r"^backbone.init: .*other.pth does not fit backbone.name=test_efficientnet: .* such as 'conv_stem.weight',"
    with pytest.raises(ValueError, match=rf"{told} .*it has are '_conv_stem.weight', '_bn1.weight'"):
        make_backbone("test_efficientnet", "blocks.2", str(tmp_path / "other.pth"), 64, freeze_statistics=freeze)


@pytest.mark.parametrize(
    ("method", "extra"),
    [(PixProInstance, []), (DenseCL, ["--method.queue=20"]), (VICRegL, ["--method.keep=[4,2]"])],
)
def test_checkpoints_of_encoders_with_two_heads_are_read(method, extra, folder, tmp_path):
    made = fit(method, folder, tmp_path, "--trainer.max_steps=1", "--save_every_n_steps=1", *extra)
    backbone, _ = make_backbone("resnet18", "layer2", str(tmp_path / "checkpoints" / "last.ckpt"), 32)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, backbone_of(made.method).state_dict()[key])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.folder=/no/such/folder"], "data.folder: expected a folder"),
        (["--data.batch_size=64"], r"data.batch_size: expected 1 to 40, the images of .*got 64"),
        (["--data.batch_size=0"], "data.batch_size: .*got 0"),
        (["--optimizer.lr_at_1024=0"], "optimizer.lr_at_1024: expected a positive learning rate, got 0"),
        (["--backbone.name=resnet19"], r"backbone.name: .*resnet18.*got 'resnet19'"),
        (["--backbone.layer=layer4", "--data.size=16"], "16x16 pixels to a 1x1 map"),
        (["--backbone.init=/no/such/file.safetensors"], "backbone.init: .*file.safetensors"),
        (["--data.channels=4"], "data.mean, data.std: expected 4 numbers"),
        (
            ["--data.channels=4", "--data.mean=[0,0,0,0]", "--data.std=[1,1,1,1]"],
            r"data.channels: expected 3 for the colour jitter of data.preset=byol, got 4; set .* to multichannel",
        ),
        (["--data.nodata=.nan"], "data.nodata: expected a finite number, got nan"),
        (["--trainer.max_epochs=-1"], "trainer: expected a budget"),
    ],
)
def test_bad_input_stops_before_training(args, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(PixPro, folder, tmp_path, *(["--trainer.max_epochs=1"] if "max_epochs" not in args[0] else []), *args)


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        (DenseCL, ["--optimizer.lr_at_256=0"], "optimizer.lr_at_256: expected a positive learning rate, got 0"),
        (VICRegL, [], "method.keep: expected at most the number of query cells, 16, got 20"),
        (VICRegL, ["--method.keep=[4,0]"], "method.keep: expected a whole number of at least 1, or None, got 0"),
        (
            VICRegL,
            ["--method.keep=[4,4]", "--optimizer.lr_at_256=-1"],
            "optimizer.lr_at_256: expected a positive learning rate, got -1",
        ),
        (DenseCL, ["--method.queue=0"], "method.queue: expected at least 1, got 0"),
        (DenseCL, ["--method.temperature=0"], "temperature: expected a positive number, got 0"),
    ],
)
def test_bad_input_of_other_methods(method, args, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(method, folder, tmp_path, "--trainer.max_epochs=1", *args)


@pytest.mark.parametrize("method", [VICRegL, DenseCL, SlotCon, OwnMethod])
def test_methods_that_hand_no_validity_on_have_no_option_for_it(method, folder, tmp_path):
    with pytest.raises(ValueError, match=r"--data.nodata: there is no such option"):
        fit(method, folder, tmp_path, "--trainer.max_epochs=1", "--data.nodata=0")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"data.folder: expected images .* found none"):
        fit(PixPro, tmp_path, tmp_path / "out", "--trainer.max_epochs=1")


class Reading:
    """A trainer as StopOnCollapse sees it."""

    log_every_n_steps = 1

    def __init__(self, step: int, std: float, rank: float | None = None) -> None:
        self.global_step = step
        self.callback_metrics = {"health/std_times_sqrt_c": torch.tensor(std)}
        if rank is not None:
            self.callback_metrics["health/effective_rank"] = torch.tensor(rank)


class Processes:
    """A trainer of several processes, all with the counts of this one, as StopOnCollapse sees it."""

    log_every_n_steps = 1
    global_step = 7

    def __init__(self, processes: int, unreadable: int, seen: int) -> None:
        self.datamodule = SimpleNamespace(unreadable=unreadable, seen=seen, enlarged=0, max_unreadable=0.01)
        self.strategy = SimpleNamespace(reduce=lambda counts, reduce_op: {"sum": processes}[reduce_op] * counts)


@pytest.mark.parametrize(
    ("processes", "unreadable", "seen", "stops"),
    [(1, 2, 199, False), (1, 200, 999, False), (1, 11, 1000, True), (1, 10, 1000, False), (8, 1, 128, False),
     (8, 2, 128, True), (8, 100, 124, False), (8, 5, 1000, False)],
)  # fmt: skip
def test_unreadable_files_are_judged_over_all_processes_after_a_thousand_images(processes, unreadable, seen, stops):
    trainer = Processes(processes, unreadable, seen)
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=lambda values: None)
    with (
        pytest.raises(RuntimeError, match=f"{processes * unreadable} unreadable files met in {processes * seen} images")
        if stops
        else nullcontext()
    ):
        StopOnCollapse().on_train_batch_start(trainer, module, None, 0)


def test_a_collapsed_run_and_one_without_a_loss_stop():
    def read(stop: StopOnCollapse, step: int, std: float, loss: float = -3.9) -> None:
        stop.on_train_batch_end(Reading(step, std), None, {"loss": torch.tensor(loss)}, None, 0)

    stop = StopOnCollapse(patience=3)
    for step, std in enumerate((0.9, 0.1, 0.1, 0.9, 0.1, 0.1)):
        read(stop, step, std)  # a dip that passes
    with pytest.raises(RuntimeError, match=r"health/std_times_sqrt_c is 0.100, below 0.3, for the last 3 .*collapsed"):
        read(stop, 6, 0.1)
    with pytest.raises(RuntimeError, match="loss is nan at step 7"):
        read(stop, 7, 0.9, torch.nan)


def test_a_low_std_is_no_collapse_while_the_features_use_many_directions():
    """NeCo's projections lie close to one direction, and differ in some twenty others."""

    def read(stop: StopOnCollapse, step: int, std: float, rank: float) -> None:
        stop.on_train_batch_end(Reading(step, std, rank), None, {"loss": torch.tensor(3.2)}, None, 0)

    stop = StopOnCollapse(patience=3)
    for step in range(9):
        read(stop, step, 0.14, 22.0)
    for step in range(9, 11):
        read(stop, step, 0.12, 4.0)
    read(stop, 11, 0.5, 3.4)  # PixPro on ImageNet's photos: few directions, well spread
    for step in range(12, 14):
        read(stop, step, 0.12, 4.0)
    match = r"std_times_sqrt_c is 0.120, below 0.3, and health/effective_rank 4.0, below 10, for the last 3 .*collapsed"
    with pytest.raises(RuntimeError, match=match):
        read(stop, 14, 0.12, 4.0)


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        (PixPro, []),
        (DenseCL, ["--method.queue=20"]),
        (VICRegL, ["--method.keep=[4,2]"]),
        (ViTPostTraining, ["--backbone.name=test_vit", "--backbone.layer=norm", "--backbone.init=random"]),
    ],
)
def test_compiled_encoders_train_and_keep_their_names(method, extra, folder, tmp_path, monkeypatch):
    """With the eager backend: what is tested is the wiring; the compiler's work is its own."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="eager"))
    made = fit(method, folder, tmp_path, "--trainer.max_epochs=1", "--compile=true", *extra)
    assert all("_orig_mod" not in key for key in made.method.state_dict())
    assert made.trainer.global_step == 5
    if method is not VICRegL:
        assert made.method.target.step >= 5
