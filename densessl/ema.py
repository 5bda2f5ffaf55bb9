"""The target encoder: a moving average of the online encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class EMA(nn.Module):
    """A moving average of a module: PixPro's target encoder, which the paper calls the momentum encoder.

    Only parameters are averaged; buffers are the target's own: in train mode its batch norms keep statistics of what
    they see, as in the published code. Gradients never flow into it.

    In bfloat16 or float16 a small step of the average would round to nothing: at 0.99 the target of a bfloat16 model
    goes a quarter of its way in 500 updates. Averages of such parameters are kept in float32 beside the module, which
    runs in the precision that it has. Parameters that are no floating point numbers are copied.

    With FSDP2, make the average of the plain module, then call ``fully_shard`` on the online module and on
    ``target.module``, in the same way. A module that is sharded already cannot be copied.

    torch's ``AveragedModel`` is not used because it copies the student at its first update, keeps its step on the
    device, and has no schedule.

    Args:
        online: the module to follow; may be wrapped by DistributedDataParallel or ``torch.compile``. It is copied.
        momentum: m in ``target = m * target + (1 - m) * online``, or a function of the step, counted from 0. The
            published schedule over K steps is ``functools.partial(cosine_schedule, max_steps=K + 1, start_value=0.99,
            end_value=1.0)`` with lightly's ``lightly.utils.scheduler.cosine_schedule``.

    Attributes:
        module: the averaged module.
        step: number of updates so far, a Python int, saved with the state.

    Raises:
        ValueError: if a constant momentum is not in 0..1, or the module is sharded already.
    """

    def __init__(self, online: nn.Module, momentum: float | Callable[[int], float] = 0.99) -> None:
        super().__init__()
        if not callable(momentum):
            _check_momentum(momentum)
        if any(base.__name__ == "FSDPModule" for part in online.modules() for base in type(part).__mro__):
            raise ValueError(
                "online: expected a module that is not sharded yet, got one after fully_shard; make the EMA first, "
                "then call fully_shard on the online module and on target.module"
            )
        self.module = copy.deepcopy(_unwrapped(online)).requires_grad_(False)
        self.momentum = momentum
        self.step = 0
        self._averages: dict[str, Tensor] = {}  # float32, of parameters in half precision, by name

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the averaged module, without gradients."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float | None = None) -> None:
        """One step of the average.

        The published code calls it between the online and the target forward pass of a step. This equals calling it
        once before the first step, where it changes nothing but the schedule's position, and after each optimiser step.

        Args:
            online: the module given at construction, or another with the same parameters.
            momentum: overrides the schedule for this step.

        Raises:
            ValueError: if the parameters do not fit, or the momentum is not in 0..1.
        """
        if momentum is None:
            momentum = self.momentum(self.step) if callable(self.momentum) else self.momentum
        momentum = _check_momentum(float(momentum))
        parameters: dict[str, Tensor] = dict(self.module.named_parameters())
        every: list[Tensor] = list(_unwrapped(online).parameters())
        _check_fit(list(parameters.values()), every)
        averages: list[Tensor] = []
        sources: list[Tensor] = []
        narrow: list[tuple[Tensor, Tensor]] = []  # parameters in half precision with their averages
        for (name, target), source in zip(parameters.items(), every, strict=True):
            if not target.is_floating_point():
                target.copy_(source)
                continue
            average: Tensor = target
            if target.dtype in (torch.bfloat16, torch.float16):
                average = self._averages.get(name, target).to(target.device, torch.float32)
                self._averages[name] = average
                narrow.append((target, average))
            averages.append(average)
            sources.append(source.to(average.dtype))
        if averages:
            torch._foreach_lerp_(averages, sources, 1.0 - momentum)  # one launch for all of them
        for target, average in narrow:
            target.copy_(average)
        self.step += 1

    def get_extra_state(self) -> dict[str, Any]:
        """The step, so that a resumed run continues its schedule (the published code restarts it), and the averages."""
        return {"step": self.step} | ({"averages": self._averages} if self._averages else {})

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the step and the averages."""
        self.step = state["step"]
        self._averages = {name: average.clone() for name, average in state.get("averages", {}).items()}


def _check_momentum(momentum: float) -> float:
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum: expected a number in 0..1, got {momentum}")
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
        raise ValueError(f"online: expected {len(targets)} parameters as at construction, got {len(sources)}")
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape:
            raise ValueError(
                f"online: expected shape {tuple(target.shape)} for parameter {index}, got {tuple(source.shape)}"
            )
        if target.device != source.device:
            raise ValueError(
                f"online: expected parameter {index} on {target.device} as the target, got {source.device}"
            )
