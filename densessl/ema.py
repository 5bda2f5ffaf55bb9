"""The momentum encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


class EMA(nn.Module):
    """A moving average of a module: PixPro's momentum (target) encoder.

    Only parameters are averaged. Buffers are the target's own: in train mode its batch norms keep statistics of what
    they see, as in the published code. Gradients never flow into the target.

    In bfloat16 or float16, one step at a usual momentum is rounded away. For such parameters the averages themselves
    are kept in float32 from the first update on, and ``module`` holds them rounded to its own dtype. They are saved
    with the state; a state without them continues from the rounded values. Integer and boolean parameters are copied.

    With FSDP2, build the average first and shard afterwards, both in the same way: ``ema = EMA(model)``, then
    ``fully_shard(model)`` and ``fully_shard(ema.module)``. A model that is sharded already cannot be copied.

    torch's ``AveragedModel`` is not used because it copies the student at its first update, keeps its step on the
    device, and has no schedule.

    Args:
        online: The module to follow, which is copied. DistributedDataParallel or ``torch.compile`` may be wrapped
            around it.
        momentum: The m in ``target = m * target + (1 - m) * online``, in 0..1, or a function that gives it for each
            step, counted from 0. The published schedule over K steps is ``functools.partial(cosine_schedule,
            max_steps=K + 1, start_value=0.99, end_value=1.0)`` with lightly's
            ``lightly.utils.scheduler.cosine_schedule``.

    Attributes:
        module: The averaged module.
        step: Number of updates so far, a Python int that is saved with the state.

    Raises:
        ValueError: If ``online`` is no module or already sharded by ``fully_shard``, or a constant momentum is not in
            0..1.

    Examples:
        >>> online = nn.Linear(4, 2)
        >>> target = EMA(online, momentum=0.99)
        >>> target.update(online)
        >>> target.step
        1
    """

    def __init__(self, online: nn.Module, momentum: float | Callable[[int], float] = 0.99) -> None:
        super().__init__()
        if not callable(momentum):
            _check_momentum(momentum)
        _check_module(online)
        if any(isinstance(part, FSDPModule) for part in online.modules()):
            raise ValueError(
                "online: expected a module that is not sharded yet, got one after fully_shard; "
                "build EMA(model) first, then call fully_shard on model and on ema.module"
            )
        self.module = copy.deepcopy(_unwrapped(online)).requires_grad_(False)
        self.momentum = momentum
        self.step = 0
        # By the parameter's index; a plain dict because a buffer would be rounded by ``to(torch.bfloat16)``.
        self._averages: dict[int, Tensor] = {}
        # For each average, the tensor that it was last written to, and the version of that tensor then.
        self._written: dict[int, tuple[int, int]] = {}

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the averaged module, without gradients."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float | None = None) -> None:
        """Moves the average by one step.

        The published code calls this between the online and the target forward pass of a step. You may instead call it
        after each optimiser step, which gives the same averages. With a schedule, then call it once before the first
        step as well: that changes no weight, but starts the schedule at the same place.

        Args:
            online: The module given at construction, or another one with the same parameters.
            momentum: Momentum of this step, in 0..1, in place of the schedule's.

        Raises:
            ValueError: If ``online`` is no module, is this target itself, or has other parameters, or if the momentum
                is not in 0..1.
        """
        if momentum is None:
            momentum = self.momentum(self.step) if callable(self.momentum) else self.momentum
        momentum = _check_momentum(float(momentum))
        _check_module(online)
        if _unwrapped(online) in (self, self.module):  # the average of the target with itself would never move
            raise ValueError("online: expected the module that is trained, got this average itself")
        # After a forward pass FSDP2 leaves the whole parameters of a root module in place of its shards.
        _reshard(self)
        _reshard(online)
        targets: list[Tensor] = list(self.module.parameters())
        sources: list[Tensor] = list(_unwrapped(online).parameters())
        _check_fit(targets, sources)
        self._keep_wide(targets)
        averaged = [i for i, target in enumerate(targets) if target.is_floating_point() or target.is_complex()]
        averages = [self._averages.get(i, targets[i]) for i in averaged]
        # The target may be wider than a half-precision student.
        steps = [sources[i].to(average.dtype) for i, average in zip(averaged, averages, strict=True)]
        if averages:
            torch._foreach_lerp_(averages, steps, 1.0 - momentum)  # one launch for all of them
        for index, average in self._averages.items():
            targets[index].copy_(average)  # not in one launch, for which DTensors have no rule
        self._written = {i: (id(targets[i]), targets[i]._version) for i in self._averages}
        for target, source in zip(targets, sources, strict=True):
            if not (target.is_floating_point() or target.is_complex()):
                target.copy_(source)
        self.step += 1

    def _keep_wide(self, targets: list[Tensor]) -> None:
        """One float32 average for each half-precision parameter, and for no other."""
        kept = {}
        for index, target in enumerate(targets):
            if not target.is_floating_point() or target.dtype.itemsize >= 4:
                continue
            average, written = self._averages.get(index), self._written.get(index)
            if average is None or _was_overwritten(target, written):
                kept[index] = target.detach().float()
            else:
                kept[index] = _placed_as(target, average)
        self._averages = kept

    def get_extra_state(self) -> dict[str, Any]:
        """The step, so that a resumed run continues its schedule (the published code restarts it).

        With half-precision parameters, the state also holds their float32 ``averages``, by the parameter's index.
        """
        return {"step": self.step, **({"averages": dict(self._averages)} if self._averages else {})}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the step, and the averages where the state has them."""
        self.step = state["step"]
        self._averages = {index: average.clone() for index, average in state.get("averages", {}).items()}
        self._written = {}


def _was_overwritten(target: Tensor, written: tuple[int, int] | None) -> bool:
    """Whether the same tensor was written since, as by ``ema.module.load_state_dict``; a copied EMA has others."""
    return written is not None and written[0] == id(target) and written[1] != target._version


def _placed_as(target: Tensor, average: Tensor) -> Tensor:
    """The average on the target's device, and sharded as the target is."""
    average = average.to(target.device)
    if isinstance(target, DTensor) and not isinstance(average, DTensor):
        return distribute_tensor(average, target.device_mesh, target.placements)
    return average


def _reshard(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _check_module(online: nn.Module) -> None:
    if not isinstance(online, nn.Module):
        raise ValueError(f"online: expected a module, such as the encoder that is trained, got {type(online).__name__}")


def _check_momentum(momentum: float) -> float:
    if not isinstance(momentum, (Real, Tensor)) or not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum: expected a number in 0..1, got {momentum!r}")
    return momentum


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile, in any order."""
    while True:
        inner = module.module if isinstance(module, DistributedDataParallel) else getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _check_fit(targets: list[Tensor], sources: list[Tensor]) -> None:
    if len(targets) != len(sources):
        raise ValueError(
            f"online: expected {len(targets)} parameters as at construction, got {len(sources)}; pass the module that "
            "EMA was built from"
        )
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            raise ValueError(
                f"online: expected shape {tuple(target.shape)} for parameter {index}, got {tuple(source.shape)}"
            )
        if target.device != source.device:
            raise ValueError(
                f"online: expected parameter {index} on {target.device} as the target, got {source.device}"
            )
        if isinstance(target, DTensor) != isinstance(source, DTensor):
            sharded = ["a plain tensor", "a sharded one"]
            raise ValueError(
                f"online: expected {sharded[isinstance(target, DTensor)]} for parameter {index} as the target has, "
                f"got {sharded[isinstance(source, DTensor)]}; call fully_shard on both"
            )
