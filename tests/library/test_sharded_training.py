"""The momentum encoder and LARS under FSDP2, in two gloo processes, against one process."""

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from densessl import EMA, LARS, param_groups


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 6))


def train(model: nn.Module, ema: EMA, part: slice) -> None:
    """Both forward passes, with the update between them: the published place."""
    optimizer = LARS(param_groups(model, 0.1), lr=1.0, trust_coefficient=0.02)
    for step in range(3):
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))[part].to(next(model.parameters()).dtype)
        query = model(x)
        ema.update(model)
        loss = (query - ema(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ema.update(model)


def work(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    shard = functools.partial(fully_shard, mesh=mesh)

    whole = network()
    average = EMA(whole, 0.7)
    train(whole, average, slice(None))
    for whole_ema in (False, True):
        model = network()
        ema = EMA(model, 0.7)
        shard(model[0])
        shard(model)
        shard(ema if whole_ema else ema.module)
        train(model, ema, slice(rank * 4, rank * 4 + 4))
        pairs = [(model, whole), (ema.module, average.module)]
        for ours, theirs in pairs:
            for p, q, start in zip(ours.parameters(), theirs.parameters(), network().parameters(), strict=True):
                assert isinstance(p, DTensor)
                torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=1e-5)
                assert (q - start).abs().max() > 1e-3

    half = network().bfloat16()
    ema = EMA(half, 0.9)
    plain = EMA(half, 0.9)
    student = network().bfloat16()
    shard(ema.module)
    shard(half)
    for _ in range(20):
        with torch.no_grad():
            for p, q in zip(half.parameters(), student.parameters(), strict=True):
                p.add_(0.003)
                q.add_(0.003)
        ema.update(half)
        plain.update(student)
    for p, q in zip(ema.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q)
    half(torch.randn(4, 7).bfloat16()).square().mean().backward()
    LARS(half.parameters(), lr=1.0).step()

    with pytest.raises(ValueError, match="online: expected a module that is not sharded yet"):
        EMA(half)
    with pytest.raises(ValueError, match="online: expected a plain tensor for parameter 0"):
        plain.update(half)
    dist.barrier()  # neither ends while the other still asks the store
    os._exit(0)  # gloo's threads, which the mesh keeps, may abort a process while Python shuts down


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this version of torch shards on GPUs only")
def test_two_processes_equal_one(tmp_path: Path):
    mp.spawn(work, (str(tmp_path / "store"),), nprocs=2)
