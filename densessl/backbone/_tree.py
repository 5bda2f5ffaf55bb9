"""Parts of models that share their modules and tensors with the whole."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

REGISTRIES = ("_parameters", "_buffers", "_modules")


def shallow(module: nn.Module) -> nn.Module:
    """A copy of the module with its own registries, which shares the children and tensors in them."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    for registry in REGISTRIES:
        copy.__dict__[registry] = dict(module.__dict__[registry])
    copy.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return copy


def ancestors(layers: Iterable[str]) -> set[str]:
    """Names of the modules that contain one of the layers, the root's ``""`` among them."""
    return {".".join(name.split(".")[:depth]) for name in layers for depth in range(name.count(".") + 1)}


def pruned(module: nn.Module, keep: set[str], prefix: str = "") -> nn.Module:
    """The module with only those children, parameters and buffers that ``keep`` names.

    Args:
        module: Any module; it stays as it is.
        keep: Full names of the modules to keep. What lies below one of them is kept whole, as the same objects.
        prefix: The module's own full name, with a dot at its end.
    """
    copy = shallow(module)
    for registry in ("_parameters", "_buffers"):
        tensors = copy.__dict__[registry]
        copy.__dict__[registry] = {name: value for name, value in tensors.items() if prefix + name in keep}
    above = ancestors(keep)
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        if prefix + name in keep:
            children[name] = child
        elif prefix + name in above and child is not None:
            children[name] = pruned(child, keep, f"{prefix}{name}.")
    copy.__dict__["_modules"] = children
    return copy


def cut_after(model: nn.Module, last: str, unused: Iterable[str]) -> nn.Module:
    """The model without what comes after one item of a list of blocks.

    Args:
        model: Any model; it stays as it is.
        last: Full name of the last block to keep, such as ``"encoder.layer.5"``. Later items of its list are left out.
        unused: Top-level modules that only later steps use. Each becomes an identity, since the model's own code may
            still call it.
    """
    parent, _, item = last.rpartition(".")
    items = model.get_submodule(parent)
    later = list(items._modules)[list(items._modules).index(item) + 1 :]
    copy = shallow(model)
    inner = copy
    for name in parent.split("."):
        inner._modules[name] = shallow(inner.get_submodule(name))
        inner = inner.get_submodule(name)
    for name in later:
        del inner._modules[name]
    return without(copy, unused)


def without(model: nn.Module, unused: Iterable[str]) -> nn.Module:
    """A copy of the model with identities in place of those of its children that are named."""
    copy = shallow(model)
    for name in unused:
        if copy._modules.get(name) is not None:
            copy._modules[name] = nn.Identity()
    return copy
