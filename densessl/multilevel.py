"""Several feature levels, of a feature pyramid (FPN) or the decoder of a U-Net: runs the parts at each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class PerLevel(nn.Module):
    """Applies a part level by level: one part shared by all levels, or a part for each.

    It serves matchers, propagation, heads, losses and metrics alike. Arguments that are a list or dict hold one value
    per level; all others (a tensor of coords, None) go to every level as they are. Distances and thresholds are
    therefore in cells of each level.

    In training, a shared part with batch norm normalises each level by that level's own statistics; the running
    statistics are updated by all levels in turn.

    Args:
        part: A module that serves all levels, or a list or dict (ModuleList and ModuleDict too) with one module per
            level.

    Raises:
        ValueError: If there is no module.

    Examples:
        >>> heads = PerLevel([nn.Conv2d(64, 8, 1), nn.Conv2d(128, 8, 1)])
        >>> [out.shape[-1] for out in heads([torch.rand(2, 64, 14, 14), torch.rand(2, 128, 7, 7)])]
        [14, 7]
    """

    def __init__(self, part: nn.Module | list[nn.Module] | Mapping[str, nn.Module]) -> None:
        super().__init__()
        if isinstance(part, list):
            part = nn.ModuleList(part)
        elif isinstance(part, Mapping):
            part = nn.ModuleDict(part)
        several = isinstance(part, (nn.ModuleList, nn.ModuleDict))
        if not isinstance(part, nn.Module) or (several and not len(part)):  # type: ignore[arg-type]
            raise ValueError(f"part: expected a module, or a list or dict of modules, one per level, got {part!r}")
        self.part = part

    def forward(self, *inputs: Any) -> Any:
        """Calls the part once per level.

        Args:
            inputs: The part's arguments in its order. At least one of them is a list or dict with one value per level;
                dicts must have the same keys, in any order. A tuple counts as one value: the size of a map, for
                instance.

        Returns:
            What the part returns at each level, as a list or dict like the first input that is one.

        Raises:
            ValueError: If the levels of the inputs, or of the parts, differ. Errors of the part itself are raised with
                the level.
        """
        split = [index for index, value in enumerate(inputs) if isinstance(value, (list, Mapping))]
        if not split:
            got = ", ".join(type(value).__name__ for value in inputs) or "nothing"
            raise ValueError(f"inputs: expected a list or dict of one value per level among them, got {got}")
        first = inputs[split[0]]
        names = _names(first, f"inputs[{split[0]}]")
        for index in split[1:]:
            _check_levels(inputs[index], names, f"inputs[{index}]")
        part: Any = self.part
        own = isinstance(part, (nn.ModuleList, nn.ModuleDict))
        if own:
            _check_levels(part, names, "part")
        out = {}
        for name in names:
            chosen = part[name] if own else part
            arguments = [value[name] if index in split else value for index, value in enumerate(inputs)]
            try:
                out[name] = chosen(*arguments)
            except ValueError as error:
                raise ValueError(f"level {name!r}: {error}") from error
        return list(out.values()) if isinstance(first, list) else out


def level_sizes(maps: list[Tensor] | Mapping[Any, Tensor]) -> Any:
    """Height and width of every level, for matchers.

    Args:
        maps: List or dict of feature maps ``(B, C, h, w)``, one per level.

    Returns:
        Height and width ``(h, w)`` of each level in cells, as a list or dict like the maps.

    Raises:
        ValueError: If a shape is not as described, or a level has a single cell, which leaves nothing to tell apart.

    Examples:
        >>> level_sizes([torch.rand(2, 64, 14, 14), torch.rand(2, 128, 7, 7)])
        [(14, 14), (7, 7)]
    """
    levels: Any = maps
    sizes = {}
    for name in _names(levels, "maps"):
        value = levels[name]
        if not isinstance(value, Tensor) or value.ndim != 4:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"maps: expected a map (B, C, h, w) at level {name!r}, got {got}")
        sizes[name] = (value.shape[2], value.shape[3])
        if sizes[name] == (1, 1):
            raise ValueError(
                f"maps: level {name!r} is 1x1, which has no cells to tell apart: use larger views or leave it out"
            )
    return list(sizes.values()) if isinstance(maps, list) else sizes


def level_mean(
    values: list[Tensor] | Mapping[Any, Tensor], weights: list[float] | Mapping[Any, float] | None = None
) -> Tensor:
    """Mean over levels, of losses for instance.

    Args:
        values: List or dict with one tensor per level, all of one shape: scalars, or ``(B,)``.
        weights: List or dict with one number of at least 0 per level; they need not sum to 1. None weighs all levels
            alike.

    Returns:
        The weighted mean, in the shape of one value.

    Raises:
        ValueError: If the shapes differ, if weights and values have other levels, or if weights are negative or all 0.

    Examples:
        >>> level_mean([torch.tensor(1.0), torch.tensor(4.0)], weights=[2.0, 1.0])
        tensor(2.)
    """
    names = _names(values, "values")
    tensors = list(values) if isinstance(values, list) else list(values.values())
    for name, value in zip(names, tensors, strict=True):
        if value.shape != tensors[0].shape:
            raise ValueError(
                f"values: expected {tuple(tensors[0].shape)} at level {name!r} as at {names[0]!r}, "
                f"got {tuple(value.shape)}"
            )
    if weights is None:
        return torch.stack(tensors).mean(0)
    _check_levels(weights, names, "weights")
    given: Any = weights
    numbers = [float(given[name]) for name in names]
    if not all(0 <= number < float("inf") for number in numbers) or not sum(numbers):
        raise ValueError(f"weights: expected numbers from 0 on, not all 0, got {weights}")
    return torch.stack([value * number for value, number in zip(tensors, numbers, strict=True)]).sum(0) / sum(numbers)


def _names(levels: Any, what: str) -> list[Any]:
    """Of the levels: keys of a dict, places in a list."""
    if not isinstance(levels, (list, Mapping, nn.ModuleList, nn.ModuleDict)) or not len(levels):
        got = "none in it" if isinstance(levels, (list, Mapping)) else type(levels).__name__
        raise ValueError(f"{what}: expected a list or dict of one value per level, got {got}")
    return list(range(len(levels))) if isinstance(levels, (list, nn.ModuleList)) else list(levels)


def _check_levels(levels: Any, names: list[Any], what: str) -> None:
    got = _names(levels, what)
    if set(got) != set(names):
        raise ValueError(f"{what}: expected the levels {names}, got {got}")
