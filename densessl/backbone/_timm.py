"""Layers of timm's models, by timm's own ``forward_intermediates``."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor, nn

from densessl.backbone._tree import shallow


class TimmRun:
    """Runs ``forward_intermediates`` up to the last of the layers.

    Args:
        layers: Names of the layers, in the order of the maps.
        indices: Index of each layer among the model's feature levels.
        options: Further arguments of ``forward_intermediates``.
    """

    def __init__(self, layers: list[str], indices: list[int], options: dict[str, Any]) -> None:
        self.layers = layers
        self.indices = indices
        self.options = options

    def __call__(self, model: nn.Module, image: Tensor) -> list[Tensor]:
        """The maps, each ``(B, C, h, w)``."""
        taken = sorted(set(self.indices))
        forward: Any = model.forward_intermediates
        maps = forward(image, indices=taken, output_fmt="NCHW", intermediates_only=True, **self.options)
        return [maps[taken.index(index)] for index in self.indices]


def prepare(model: nn.Module, layers: list[str]) -> tuple[nn.Module, TimmRun] | None:
    """The part of the model that the layers need, and what runs it; None where timm has no such way.

    Args:
        model: Any model.
        layers: Names from the model's ``feature_info`` (``"blocks.11"``, ``"stages.3"``, ``"layer4"``), or ``"norm"``
            for the last level behind the final norm.

    Raises:
        ValueError: If ``"norm"`` is asked for together with other layers.
    """
    forward = getattr(model, "forward_intermediates", None)
    if forward is None or not type(model).__module__.startswith("timm."):
        return None
    accepted = inspect.signature(forward).parameters
    levels = [entry["module"] for entry in getattr(model, "feature_info", [])]
    norm = "norm" in layers and "norm" in accepted and _is_final_norm(model)
    if norm and set(layers) != {"norm"}:
        raise ValueError(f"layers: expected blocks, or 'norm' alone, got {layers}; take the last block in its place")
    if not norm and not set(layers) <= set(levels):
        return None
    indices = [len(levels) - 1 if norm else levels.index(name) for name in layers]
    options = {name: value for name, value in (("norm", norm), ("stop_early", True)) if name in accepted}
    return _part(model, max(indices), norm), TimmRun(layers, indices, options)


def _is_final_norm(model: nn.Module) -> bool:
    """Whether ``norm`` is one module with as many channels as the last level."""
    norm: Any = getattr(model, "norm", None)
    weight = getattr(norm, "weight", None)
    if not isinstance(norm, nn.Module) or isinstance(norm, nn.ModuleList):
        return False
    last: Any = getattr(model, "feature_info", [{}])[-1]
    return weight is None or weight.numel() == last["num_chs"]


def _part(model: nn.Module, index: int, norm: bool) -> nn.Module:
    """The model as ``prune_intermediate_layers`` leaves it, but made of the model's own modules."""
    # timm prunes in place, even inside heads, so it is given a copy without weights.
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(value): value.detach().to("meta") for value in tensors}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    outline: Any = copy.deepcopy(model, memo)
    if hasattr(outline, "prune_intermediate_layers"):
        outline.prune_intermediate_layers([index], prune_norm=not norm, prune_head=True)
    return _alike(model, outline)


def _alike(module: nn.Module, outline: nn.Module) -> nn.Module:
    """The module itself if nothing is missing in its outline, otherwise a copy of it without the missing parts."""
    if type(module) is not type(outline):
        return outline  # an identity, or a head without weights
    children: dict[str, nn.Module | None] = {}
    same = set(module._modules) == set(outline._modules)
    for name, child in module._modules.items():
        other = outline._modules.get(name)
        if other is None or child is None:
            if name in outline._modules:
                children[name] = None
                same = same and child is None
            continue
        children[name] = _alike(child, other)
        same = same and children[name] is child
    for registry in ("_parameters", "_buffers"):
        own, others = module.__dict__[registry], outline.__dict__[registry]
        same = same and all((own[name] is None) == (others.get(name) is None) for name in own)
    if same:
        return module
    part = shallow(module)
    part.__dict__["_modules"] = children
    for registry in ("_parameters", "_buffers"):
        others = outline.__dict__[registry]
        part.__dict__[registry] = {
            name: value if others[name] is not None else None
            for name, value in module.__dict__[registry].items()
            if name in others
        }
    return part
