"""Layers of any model that torch.fx can trace: the model's graph is cut after them."""

from __future__ import annotations

import importlib
from collections.abc import Set as AbstractSet
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Tracer

from densessl.backbone._tree import REGISTRIES, ancestors, pruned, shallow


class GraphRun:
    """Runs a cut graph.

    Args:
        layers: Names of the layers, in the order of the maps.
    """

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def __call__(self, program: nn.Module, image: Tensor) -> list[Any]:
        """The outputs of the layers, each as it is."""
        return list(program(image))


class _Outline(Tracer):
    """Follows the code of the modules that contain a layer, and calls all others as they are.

    Their hooks, their gradient checkpointing and what ``fully_shard`` does to them therefore stay in force.
    """

    # Unpickling a program makes a tracer without arguments, for a graph in which every module stays whole.
    def __init__(self, inside: AbstractSet[str] = frozenset(), functions: tuple[Any, ...] = ()) -> None:
        super().__init__(autowrap_functions=functions)
        self.inside = inside

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name not in self.inside


def cut(model: nn.Module, layers: list[str]) -> tuple[nn.Module, tuple[GraphModule, GraphModule]]:
    """Cuts the model's graph after the last of its layers.

    Returns:
        The part of the model that is used, and the programs of evaluation and of training, which run on it.

    Raises:
        ValueError: If the graph cannot be traced, or cannot be cut there.
    """
    inside = ancestors(layers)
    for name in layers:
        if name in inside:
            raise ValueError(f"layers: {name!r} contains another one of them: expected layers beside each other")
    root = shallow(model)
    modes = {name: root.get_submodule(name).training for name in inside}
    graphs = []
    try:
        for mode in (False, True):  # traced code differs between the two
            for name in inside:
                root.get_submodule(name).training = mode
            graphs.append(_cut_graph(_Outline(inside, _functions(model)).trace(root), layers))
    except Exception as error:  # torch.fx raises whatever the traced code does
        raise ValueError(
            f"model: the graph of {type(model).__name__} cannot be cut after {', '.join(map(repr, layers))}: {error}. "
            "Any module that maps images to (B, C, h, w) serves in FeatureMap's place"
        ) from error
    finally:
        for name, mode in modes.items():
            root.get_submodule(name).training = mode
    used = {str(n.target) for graph in graphs for n in graph.nodes if n.op in ("call_module", "get_attr")}
    for name in [name for name in used if name.startswith("_tensor_constant")]:
        constant = root.__dict__.pop(name, None)
        if isinstance(constant, Tensor):
            root.register_buffer(name, constant, persistent=False)
    part = pruned(root, used)
    programs = [GraphModule(part, graph) for graph in graphs]
    for program in programs:
        for registry in REGISTRIES:
            program.__dict__[registry] = part.__dict__[registry]
    return part, (programs[0], programs[1])


def _cut_graph(graph: Graph, layers: list[str]) -> Graph:
    calls: dict[str, Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), node)
    missing = [name for name in layers if name not in calls]
    if missing:
        raise ValueError(f"the forward pass never calls {missing[0]!r}")
    nodes = list(graph.nodes)
    last = max(nodes.index(calls[name]) for name in layers)
    for node in reversed(nodes[last + 1 :]):
        graph.erase_node(node)
    graph.output(tuple(calls[name] for name in layers))
    graph.eliminate_dead_code(lambda node: node.op != "call_module" and node.is_impure())
    graph.lint()
    return graph


def _functions(model: nn.Module) -> tuple[Any, ...]:
    """Functions that must stay whole in the traced graph."""
    if not type(model).__module__.startswith("timm."):
        return ()
    return tuple(importlib.import_module("timm.models").get_notrace_functions())
