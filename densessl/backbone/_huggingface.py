"""Layers of Hugging Face's vision models, and of its backbones, by what they return."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from densessl.backbone._tree import cut_after, without
from densessl.features import tokens_to_map

_NORMS = ("layernorm", "norm", "post_layernorm")
_HEADS = ("pooler", "pool", "head")


class ModelRun:
    """Runs a model such as ``Dinov2Model`` that ends at the last of the layers.

    Args:
        layers: Names of the layers, in the order of the maps.
        prefix: Number of class and register tokens, which come before the patches' tokens.
        patch: Height and width of the patches in pixels; None for models without patches.
        merges: Whether stages pad the grid and halve it, as Swin's do.
    """

    def __init__(self, layers: list[str], prefix: int, patch: tuple[int, int] | None, merges: bool) -> None:
        self.layers = layers
        self.prefix = prefix
        self.patch = patch
        self.merges = merges

    def __call__(self, model: nn.Module, image: Tensor) -> list[Tensor]:
        """The maps, each ``(B, C, h, w)``."""
        if len(self.layers) == 1:
            return [self._as_map(model.forward(pixel_values=image, return_dict=True).last_hidden_state, image)]
        states: dict[str, Any] = {}
        # The library's own hidden states come from hooks that stay on the blocks, once for each model that has them.
        handles = [
            model.get_submodule(name).register_forward_hook(functools.partial(_keep, states, name))
            for name in self.layers
        ]
        try:
            model.forward(pixel_values=image, return_dict=True)
        finally:
            for handle in handles:
                handle.remove()
        return [self._as_map(states[name], image) for name in self.layers]

    def _as_map(self, state: Tensor, image: Tensor) -> Tensor:
        if state.ndim == 4:
            return state
        height, width = image.shape[2], image.shape[3]
        if self.patch is not None:
            grid = (-(-height // self.patch[0]), -(-width // self.patch[1]))
            whole = self.merges or (height % self.patch[0] == 0 and width % self.patch[1] == 0)
            while self.merges and grid[0] * grid[1] > max(1, state.shape[1] - self.prefix):
                grid = (-(-grid[0] // 2), -(-grid[1] // 2))
            if whole and state.shape[1] == self.prefix + grid[0] * grid[1]:
                return tokens_to_map(state[:, self.prefix :], grid)
        raise ValueError(
            f"image: expected sides that are multiples of the patch of {self.patch} pixels, so that layer "
            f"{self.layers[0]!r} gives {self.prefix} tokens more than patches; got {height}x{width} pixels and "
            f"{tuple(state.shape)}"
        )


def _keep(states: dict[str, Any], name: str, module: nn.Module, args: Any, out: Any) -> None:
    states[name] = out[0] if isinstance(out, tuple) else out


class BackboneRun:
    """Runs a backbone such as ``Dinov2Backbone``, whose layers are stages.

    Args:
        layers: Names of the stages, in the order of the maps.
    """

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def __call__(self, model: nn.Module, image: Tensor) -> list[Tensor]:
        """The maps, each ``(B, C, h, w)``."""
        names: Any = model.out_features
        maps = model.forward(pixel_values=image, return_dict=True).feature_maps
        return [maps[list(names).index(name)] for name in self.layers]


def prepare(model: nn.Module, layers: list[str]) -> tuple[nn.Module, ModelRun | BackboneRun] | None:
    """The part of the model that the layers need, and what runs it; None for models that are not Hugging Face's.

    Args:
        model: Any model.
        layers: Blocks or stages (``"encoder.layer.11"``, ``"encoder.stages.3"``), or the final norm (``"layernorm"``);
            of a backbone, stages among its ``out_features``.

    Raises:
        ValueError: If a layer is none of these, or the model has a head for a task.
    """
    if not any(base.__module__.startswith("transformers.") for base in type(model).__mro__):
        return None
    stages = getattr(model, "out_features", None)
    if stages is not None:
        wrong = [name for name in layers if name not in stages]
        if wrong:
            raise ValueError(
                f"layer: expected a stage among the backbone's out_features {list(stages)}, got {wrong[0]!r}; make the "
                "backbone with out_features=[...]"
            )
        return model, BackboneRun(layers)
    base: Any = getattr(model, "base_model", model)
    if base is not model and not hasattr(model, "embeddings"):  # DINOv3 has its blocks in a part named as a base
        raise ValueError(
            f"model: expected the model without its task's head, got {type(model).__name__}: pass its "
            f"{model.base_model_prefix!r}, a {type(base).__name__}"
        )
    return _whole_or_cut(model, layers)


def _whole_or_cut(model: nn.Module, layers: list[str]) -> tuple[nn.Module, ModelRun]:
    norms = [name for name in layers if name in _NORMS and name in dict(model.named_children())]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    parents = {name.rpartition(".")[0] for name in layers if name not in norms}
    known = dict(model.named_modules())
    if any(name not in known for name in layers) or not parents <= set(lists):
        outer = [name for name in lists if name.count(".") <= 1]
        raise ValueError(
            f"layer: expected a block of {type(model).__name__} ({', '.join(f'{name}.0' for name in outer)} and so on) "
            f"or its final norm, got {', '.join(layers)}"
        )
    if len(parents) + bool(norms) != 1:
        raise ValueError(f"layers: expected blocks of one list, or the final norm alone, got {layers}")
    if norms:
        part = without(model, _HEADS)
    else:
        last = max(layers, key=lambda name: int(name.rpartition(".")[2]))
        part = cut_after(model, last, (*_NORMS, *_HEADS))
    return part, ModelRun(layers, _prefix(model), _patch(model), hasattr(model.config, "depths"))


def _prefix(model: nn.Module) -> int:
    """Class, distillation and register tokens, as the embeddings and the configuration have them."""
    embeddings: Any = getattr(model, "embeddings", None)
    single = sum(getattr(embeddings, name, None) is not None for name in ("cls_token", "distillation_token"))
    return single + int(getattr(model.config, "num_register_tokens", 0))


def _patch(model: nn.Module) -> tuple[int, int] | None:
    patch: Any = getattr(model.config, "patch_size", None)
    if patch is None:
        return None
    return (patch, patch) if isinstance(patch, int) else (int(patch[0]), int(patch[1]))
