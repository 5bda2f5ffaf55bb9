"""FSDP2 for the recipes: ``--trainer.strategy=fsdp2`` shards parameters, gradients, momenta and averages.

Every process holds a share of each tensor, and gathers a block's tensors while the block runs. Features, coords and
losses stay each process's own, as with DDP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy with all processes in one data-parallel group; checkpoints are single, whole files."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's loads parameters and buffers only; the target encoder's step, and so its momentum, belong too."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        state = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)["state_dict"]
        for name, part in self.lightning_module.named_modules():
            if f"{name}._extra_state" in state:
                part.set_extra_state(state[f"{name}._extra_state"])
        return checkpoint


def shard_method(method: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a method in place: the blocks of its encoder and of its target alike, then both, then all the rest.

    The target is a copy of the encoder that was made before; a sharded encoder cannot be copied.

    Args:
        method: Holds ``encoder`` and, where it has one, ``target`` (EMA).
        mesh: Mesh of the processes that share the tensors.
    """
    if isinstance(method, FSDPModule):
        return
    target = getattr(method, "target", None)
    for encoder in (method.encoder, *([] if target is None else [target.module])):
        for block in blocks_of(encoder):
            fully_shard(block, mesh=mesh)
        fully_shard(encoder, mesh=mesh)
    fully_shard(method, mesh=mesh)


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder: members with parameters of the outermost lists and sequences below it."""
    found: list[nn.Module] = []
    for child in encoder.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += [block for block in child if any(True for _ in block.parameters())]
        else:
            found += blocks_of(child)
    return found


def is_sharded(module: nn.Module) -> bool:
    """Whether a process holds only a share of the parameters, so that no process can run the module alone."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(value: Tensor) -> Tensor:
    """A tensor of a state, gathered where it is sharded; every process has to ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2, description="FSDP2, all processes in one data-parallel group")
