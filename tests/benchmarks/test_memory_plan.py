"""The plan of memory against what is held at small size, and against the tables of its docs page."""

from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.performance import memory_plan
from densessl import LARS, DistanceMatcher, FeatureMap, coords_from_boxes, param_groups
from examples.pretrain.common.sharding import blocks_of, shard_method
from examples.pretrain.pixpro import PixPro

ROOT = Path(__file__).parents[2]


@pytest.fixture
def four_processes():
    """The first of four, whose collectives do nothing: enough to cut tensors."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def held(tensors) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def test_the_plan_is_what_is_held(four_processes):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=18, num_heads=3, num_classes=0)
    method = PixPro(FeatureMap(model, "norm"), 18, hidden_dim=12, dim=6)
    parts = {part.name: part for part in memory_plan.plan(method, 4, 8, 4, dim=6)}
    largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    assert len(blocks_of(method.encoder)) == 2
    shard_method(method, four_processes)
    shard_method(method, four_processes)  # once is enough
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(isinstance(p, DTensor) for p in method.parameters())
    assert parts["parameters, float32"].held == held(trained)
    assert parts["target's averages, float32"].held == held(method.target.parameters())
    for p in trained:
        p.grad = torch.ones_like(p)
    assert parts["gradients, float32"].held == held(p.grad for p in trained)
    optimizer = LARS(param_groups(method, 1e-5), lr=0.1)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert parts["optimiser's states, float32"].held == held(states)
    assert parts["two blocks, one that runs and the next, float32"].held == 2 * 4 * largest


def test_masks_take_what_the_plan_says():
    coords = coords_from_boxes(torch.tensor([[0.0, 0.1, 0.8, 0.9], [0.9, 0.1, 0.2, 0.8]]))
    mask = DistanceMatcher(0.7)(coords, coords.flip(0), (14, 14))
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
        method = PixPro(FeatureMap(model, "norm"), 192, hidden_dim=8, dim=8)
    parts = {part.name: part for part in memory_plan.plan(method, 14 * 14, 4, 2, dim=8)}
    assert parts["mask, strided"].held == held([mask])
    sparse = DistanceMatcher(0.7, sparse=True)(coords, coords.flip(0), (14, 14))
    pairs = sparse.values().numel()
    expected = parts["mask, sparse"].held / (memory_plan.PAIRS_A_CELL * 2 * 14 * 14)
    assert held([sparse.indices(), sparse.values()]) == expected * pairs
    assert sum(part.held for part in parts.values() if part.where == "sharded") > 0


def test_the_page_shows_what_the_program_prints(capsys):
    memory_plan.main([])
    page = (ROOT / "docs" / "beyond_one_machine.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
    with pytest.raises(SystemExit):
        memory_plan.main(["--images", "10"])
    assert "expected a multiple of the 32 processes, got 10" in capsys.readouterr().err
