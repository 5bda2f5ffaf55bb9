"""Matchers, propagation and losses on features of an encoder under FSDP2: two gloo processes equal one."""

import functools
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from densessl import (
    LARS,
    PPM,
    DistanceMatcher,
    InfoNCELoss,
    NearestMatcher,
    cell_distance,
    coords_from_boxes,
    feature_distance,
    gather_tokens,
    gram_loss,
    instance_consistency_loss,
    kernel_alignment_loss,
    map_to_tokens,
    pixcontrast_loss,
    pixpro_loss,
)

B, SIZE = 4, (5, 7)


class Method(nn.Module):
    """An encoder and a propagation module; every dense loss on what they give."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 6, 1))
        self.ppm = PPM(nn.Conv2d(6, 6, 1))

    def forward(self, name: str, x1: Tensor, x2: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
        z1, z2 = self.encoder(x1), self.encoder(x2)
        return LOSSES[name](self.ppm(z1), z2, c1, c2) + 0 * self.ppm(z2).sum()


def by_place(loss, sparse: bool, q: Tensor, k: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    return loss(q, k, DistanceMatcher(0.7, sparse=sparse)(c1, c2, SIZE))


def by_nearest(q: Tensor, k: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """The best five pairs by place, and all by feature."""
    total = q.new_zeros(())
    for cost, keep in ((cell_distance(c1, c2, SIZE), 5), (feature_distance(q, k).detach(), None)):
        pairs = NearestMatcher(keep)(cost)
        one, other = gather_tokens(map_to_tokens(q), pairs.query), gather_tokens(map_to_tokens(k), pairs.key)
        total = total + (one - other).square().mean()
    return total


LOSSES = {
    "pixpro": functools.partial(by_place, pixpro_loss, False),
    "pixpro sparse": functools.partial(by_place, pixpro_loss, True),
    "pixcontrast": functools.partial(by_place, pixcontrast_loss, False),
    "pixcontrast sparse": functools.partial(by_place, pixcontrast_loss, True),
    "nearest": by_nearest,
    "gram": lambda q, k, c1, c2: gram_loss(q, k),
    "gram in tiles": lambda q, k, c1, c2: gram_loss(q, k, negatives="drop"),
    "kernel alignment": lambda q, k, c1, c2: kernel_alignment_loss(q, k),
    "info nce": lambda q, k, c1, c2: InfoNCELoss(0.2)(map_to_tokens(q), map_to_tokens(k), torch.ones(3, 6).tril()),
    "instance": lambda q, k, c1, c2: instance_consistency_loss(q.mean((2, 3)), k.mean((2, 3))),
}


def inputs() -> list[Tensor]:
    torch.manual_seed(6)
    boxes = torch.tensor([[0.0, 0.0, 0.8, 0.9], [0.9, 0.1, 0.2, 0.8], [0.1, 0.0, 0.6, 0.5], [0.0, 0.3, 1.0, 1.0]])
    return [*torch.randn(2, B, 3, *SIZE), coords_from_boxes(boxes), coords_from_boxes(boxes.roll(1, 0) * 0.95)]


def work(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (2,)))
    whole, half = inputs(), [part[rank * 2 : rank * 2 + 2] for part in inputs()]
    model = Method()
    late = LARS(model.parameters(), lr=1.0)
    shard(model.encoder)
    shard(model)
    early = LARS(model.parameters(), lr=1.0)
    for name in LOSSES:
        one = Method()
        expected = one(name, *whole)
        expected.backward()
        model.zero_grad()
        got = model(name, *half)
        got.backward()
        mean = got.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected.detach(), rtol=1e-6, atol=1e-6, msg=name)
        assert any(q.grad.abs().max() > 1e-3 for q in one.parameters()), name
        for p, q in zip(model.parameters(), one.parameters(), strict=True):
            assert isinstance(p, DTensor)
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match=r"params: expected gradients .* call fully_shard before the optimiser"):
        late.step()
    early.step()
    dist.barrier()  # neither ends while the other still asks the store
    os._exit(0)  # gloo's threads, which the mesh keeps, may abort a process while Python shuts down


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this version of torch shards on GPUs only")
def test_two_processes_equal_one(tmp_path: Path):
    mp.spawn(work, (str(tmp_path / "store"),), nprocs=2)
