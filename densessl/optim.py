"""LARS as in PixPro's published code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from densessl._tensors import check_number


class LARS(Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the size of the weights.

    The update is ``d = g + weight_decay * p``, scaled by ``trust_coefficient * |p| / (|d| + eps)``; then momentum is
    applied. The scale is 1 where ``|p|`` or ``|d|`` is 0, so a weight that starts at zero moves. Tensors of one
    dimension or none (biases, norms) are never scaled; give them no weight decay with ``param_groups``. No value is
    read back to the host. Parameters that FSDP2's ``fully_shard`` has cut are scaled by the norms of the whole tensors:
    shard first, then make the optimiser.

    lightly's LARS is not used: its ratio is another, ``|p| / (|g| + weight_decay |p|)``, and it does not
    scale at weight_decay = 0.

    Args:
        params: Parameters, or groups of them as from ``param_groups``.
        lr: Learning rate, at least 0.
        momentum: Momentum of SGD, at least 0.
        weight_decay: Share of the weights that is added to the gradient before the ratio, at least 0.
        trust_coefficient: Factor of the ratio of norms; 1e-3 as published.
        eps: Number added to the ratio's divisor; 1e-8 as published.

    Raises:
        ValueError: If a number is negative.

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = LARS(param_groups(model, weight_decay=1e-5), lr=1.0)
        >>> model(torch.rand(3, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        for name, value in defaults.items():
            check_number(value, name, "a number of at least 0", lambda value: value >= 0)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates the parameters once.

        Args:
            closure: Optional function that evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            ValueError: If a gradient is sparse, as from ``nn.Embedding(sparse=True)``; nothing is updated then. With
                several processes, also if no parameter has a gradient, as after a ``fully_shard`` that came too late.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_sparse()
        self._refuse_replaced()
        for group in self.param_groups:
            # Tensors of each kind are taken together, so that one multi-tensor launch handles all of them.
            kinds: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    kinds.setdefault((p.ndim > 1, p.dtype), []).append(p)
            for (adapt, _), params in kinds.items():
                for part in _portions(params):
                    self._update(part, group, adapt=adapt)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any], *, adapt: bool) -> None:
        gradients = [cast(Tensor, p.grad) for p in params]
        steps = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        if adapt:
            size, length = _norms(params), _norms(steps)
            ratios = [
                torch.where((p > 0) & (d > 0), group["trust_coefficient"] * p / (d + group["eps"]), 1.0)
                for p, d in zip(size, length, strict=True)
            ]
            torch._foreach_mul_(steps, ratios)
        if group["momentum"] > 0:
            buffers = [self._buffer(p) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            steps = buffers
        torch._foreach_add_(params, steps, alpha=-group["lr"])

    def _refuse_sparse(self) -> None:
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise ValueError(
                        f"params: expected dense gradients, got {p.grad.layout} for parameter {index} of group {number}"
                    )

    def _refuse_replaced(self) -> None:
        """``fully_shard`` puts new parameters in the place of those that an optimiser made before it holds."""
        if dist.is_available() and dist.is_initialized():
            params = [p for group in self.param_groups for p in group["params"]]
            if all(p.grad is None for p in params):
                raise ValueError(
                    f"params: expected gradients of some of the {len(params)} parameters, got none; call fully_shard "
                    "before the optimiser is made, and backward before a step"
                )

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]


def _norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Norms in float32 at least: half-precision gradients overflow a sum of squares."""
    dtype = tensors[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    if wide == dtype:
        return torch._foreach_norm(tensors, 2)
    if any(isinstance(t, DTensor) for t in tensors):  # they cannot take a norm in another dtype
        return torch._foreach_norm([t.to(wide) for t in tensors], 2)
    return torch._foreach_norm(tensors, 2, wide)


def _portions(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """All at once; on a CPU some at a time.

    A CPU has no launches to save, and temporaries as large as the network cost more than the computation itself,
    because the system takes their pages back after each step.
    """
    if params[0].device.type != "cpu":
        yield params
        return
    part: list[Tensor] = []
    held = 0
    for p in params:
        if part and held + p.numel() > _HELD_ON_CPU:
            yield part
            part, held = [], 0
        part.append(p)
        held += p.numel()
    yield part


_HELD_ON_CPU = 1 << 19  # number of elements


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups, as published: tensors of one dimension or none get no weight decay.

    LARS does not adapt those tensors either. Parameters without gradient are left out. The groups work for any
    optimiser.

    Args:
        module: Module that owns the parameters.
        weight_decay: Weight decay of all other tensors, at least 0.

    Returns:
        Two groups; a group without parameters is left out.

    Raises:
        ValueError: If ``module`` is no module.

    Examples:
        >>> [len(group["params"]) for group in param_groups(nn.Linear(4, 2), weight_decay=1e-5)]
        [1, 1]
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"module: expected a module, such as nn.ModuleList([encoder, ppm]), got {type(module).__name__}"
        )
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
