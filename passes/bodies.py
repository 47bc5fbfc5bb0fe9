"""Recognise bodies that were linearised before: the same network differentiated again, or the same
site in another form of the step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import copy_graph
from passes.linearize import Linearization
from passes.origin import mark_of


class Linearizations:
    """Linearisations by what they depend on; one that is asked for again is a copy.

    Attributes:
        made: How many were made.
        found: How many were there already.
    """

    def __init__(self) -> None:
        self.made, self.found = 0, 0
        # The body keeps its constants alive, whose identity is part of the key.
        self._known: dict[Hashable, tuple[Linearization, GraphModule]] = {}

    def get(
        self, body: GraphModule, about: Hashable, make: Callable[[], Linearization]
    ) -> Linearization:
        """Return the linearisation of a body.

        Args:
            body: What is linearised.
            about: What else ``make`` depends on.
            make: Makes it, if it is not there.
        """
        key = (identity_of(body), about)
        if key in self._known:
            self.found += 1
            known, _ = self._known[key]
            return Linearization(copy_graph(known.primal), copy_graph(known.tangent))
        made = make()
        self.made += 1
        self._known[key] = made, body
        return made


def identity_of(module: GraphModule) -> Hashable:
    """Return what a trace of a graph depends on: equal for graphs that are traced to equal ones.

    Operators and how they are connected, constants, example values; and where each node comes from,
    which a trace passes on.
    """
    parts = module.named_modules(remove_duplicate=False)
    graphs = [(name, part) for name, part in parts if isinstance(part, GraphModule)]
    return tuple((name, *_nodes_of(part)) for name, part in graphs)


def _nodes_of(module: GraphModule) -> Iterable[Hashable]:
    number = {node: f"%{i}" for i, node in enumerate(module.graph.nodes)}
    for node in module.graph.nodes:
        # Names differ from copy to copy.
        read: Any = torch.fx.map_arg((node.args, node.kwargs), lambda n: _Read(number[n]))  # pyright: ignore[reportArgumentType]
        yield node.op, _target_of(module, node), repr(read), kind_of(node.meta.get("val"))
        yield mark_of(node), str(node.meta.get("site")), str(node.meta.get("nn_module_stack"))
        yield node.meta.get("stack_trace")


class _Read:
    """A node as an argument, by its place in the graph."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __repr__(self) -> str:
        return self.place


def _target_of(module: GraphModule, node: Node) -> Hashable:
    if node.op == "placeholder":
        return ""
    if node.op != "get_attr":
        return node.target
    constant = getattr(module, str(node.target))
    # A graph is itself part of the identity, under its name.
    return str(node.target) if isinstance(constant, GraphModule) else id(constant)


def kind_of(value: Any) -> Hashable:
    """Return what a trace sees of an example value."""
    if isinstance(value, Tensor):
        flags = value.dtype, value.device, value.layout, value.is_conj(), value.is_neg()
        if value.layout is not torch.strided:
            return str(tuple(value.shape)), *flags
        return str((tuple(value.shape), value.stride(), value.storage_offset())), *flags
    if isinstance(value, (tuple, list)):
        return tuple(map(kind_of, value))
    return str(value)
