"""Recipes under FSDP2, in two gloo processes, against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from making import TINY
from pytorch_lightning.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from test_pretrain import RECIPES, ROOT, run
from torch import nn

from densessl import EMA, ConvMLP, FeatureMap
from examples.pretrain.common.sharding import FSDP2, blocks_of
from examples.quickstart.moving import write_frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Sixteen drawn scenes."""
    root = tmp_path_factory.mktemp("scenes")
    write_frames(root, 8, size=48)
    return root / "frames"


def test_two_processes_equal_one(folder, tmp_path):
    for name, processes, extra in (("one", 1, ["groups"]), ("two", 2, ["fsdp2"])):
        (tmp_path / name).mkdir()
        run(tmp_path / name, "pixpro", folder, "0", "1", "0", "SIGTERM", *extra, processes=processes)
    one, two = (torch.load(tmp_path / name / "end.pt") for name in ("one", "two"))
    assert len(one["losses"]) == 2
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
    for key, value in one["state"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, two["state"][key], atol=1e-4, rtol=0, msg=key)


def test_through_the_command_line(folder, tmp_path):
    """All callbacks: checkpoints and the encoder's file are whole."""
    args = ["fit", "--data.folder", str(folder), "--data.size=32", "--data.batch_size=8", "--data.workers=0", *TINY,
            "--trainer.strategy=fsdp2", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.max_epochs=1",
            "--trainer.log_every_n_steps=1", "--save_every_n_steps=1", "--out", str(tmp_path)]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(RECIPES / "pixpro.py"), *args], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = FeatureMap(torchvision.models.resnet18(), "layer2").state_dict()
    written = load_file(tmp_path / "encoder.safetensors")
    assert {key: value.shape for key, value in written.items()} == {k: v.shape for k, v in expected.items()}
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["global_step"] == 2
    prefix = "method.encoder.0."
    for key, value in written.items():
        assert torch.equal(saved["state_dict"][prefix + key], value), key


def test_blocks_are_those_of_the_backbone():
    vit = timm.create_model("test_vit", num_classes=0)
    encoder = nn.Sequential(FeatureMap(vit, "norm"), ConvMLP(64, 8, 4))
    blocks = blocks_of(encoder)
    assert all(any(block is other for other in blocks) for block in encoder[0].blocks)
    resnet = nn.Sequential(FeatureMap(torchvision.models.resnet18(), "layer2"), ConvMLP(128, 8, 4))
    blocks = blocks_of(resnet)
    assert all(
        any(block is other for other in blocks) for layer in ("layer1", "layer2") for block in getattr(resnet[0], layer)
    )
    held = [id(p) for block in blocks for p in block.parameters()]
    assert len(held) == len(set(held))


def test_a_continued_run_restores_the_step_of_its_target(tmp_path, monkeypatch):
    """Lightning's strategy restores parameters and buffers only."""

    def module() -> nn.Module:
        return nn.ModuleDict({"target": EMA(nn.Linear(2, 3), momentum=0.5)})

    before, after = module(), module()
    before["target"].update(nn.Linear(2, 3))
    torch.save({"state_dict": before.state_dict()}, tmp_path / "last.ckpt")
    monkeypatch.setattr(ModelParallelStrategy, "load_checkpoint", lambda *args: {"epoch": 1})
    strategy = FSDP2()
    strategy._lightning_module = after
    assert strategy.load_checkpoint(tmp_path / "last.ckpt") == {"epoch": 1}
    assert after["target"].step == before["target"].step == 1
