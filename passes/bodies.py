"""Recognise bodies that were linearised before: the same network differentiated at several places,
or the same site in another form of the step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import copy_graph
from passes.linearize import Linearization
from passes.origin import mark_of, note


@dataclass(frozen=True)
class Labels:
    """What nodes of a body are called that does not matter to what they compute, each word once, in
    the order in which they come.

    Two bodies that are equal but for these have as many of each; the n-th of one stands where the
    n-th of the other does.

    Attributes:
        sites: Names of derivatives.
        sources: What computations are called.
        lines: Where the user wrote them.
        modules: Whose ``forward`` they are in.
    """

    sites: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    _module_numbers: dict[str, int] = field(default_factory=dict)

    def of(self, node: Node) -> Hashable:
        """Return the labels of a node as numbers; those that are new are added."""
        mark = mark_of(node)
        stack = node.meta.get("nn_module_stack")
        self.modules.setdefault(str(stack), stack)
        return (
            mark.role,
            mark.stage,
            self.site(mark.site),
            self.sources.setdefault(mark.source, len(self.sources)),
            self.lines.setdefault(node.meta.get("stack_trace") or "", len(self.lines)),
            self._module_numbers.setdefault(str(stack), len(self._module_numbers)),
        )

    def site(self, name: str) -> int:
        """Return the number of a derivative's name."""
        return self.sites.setdefault(name, len(self.sites))

    def line(self, line: str) -> int:
        """Return the number of a line."""
        return self.lines.setdefault(line, len(self.lines))


class Linearizations:
    """Linearisations by what they depend on; one that is asked for again is a copy.

    Attributes:
        made: How many were made.
        found: How many were there already.
    """

    def __init__(self) -> None:
        self.made, self.found = 0, 0
        # The body keeps its constants alive, whose identity is part of the key.
        self._known: dict[Hashable, tuple[Linearization, Labels, GraphModule]] = {}

    def get(
        self,
        body: GraphModule,
        about: Hashable,
        node: Node,
        make: Callable[[], Linearization],
    ) -> Linearization:
        """Return the linearisation of a body; what was made for an equal one is called what it
        would be called here.

        Args:
            body: What is linearised.
            about: What else ``make`` depends on.
            node: The derivative node, whose name and line are passed on.
            make: Makes it, if it is not there. Sources that are new begin with the site's name and
                a dot.
        """
        labels = Labels()
        # The first of all: whatever else bears its name does so in both bodies.
        own = labels.site(node.meta["site"].name), labels.line(node.meta.get("stack_trace") or "")
        key = identity_of(body, labels), own, about
        if key in self._known:
            self.found += 1
            made, before, _ = self._known[key]
            rename = _Renaming(before, labels)
            return Linearization(rename.copy(made.primal), rename.copy(made.tangent))
        made = make()
        self.made += 1
        self._known[key] = made, labels, body
        return made


class _Renaming:
    """Calls what was made of one body what it would be called, had it been made of an equal one."""

    def __init__(self, old: Labels, new: Labels) -> None:
        self.sites = _pairs(old.sites, new.sites)
        self.sources = _pairs(old.sources, new.sources)
        self.lines = _pairs(old.lines, new.lines)
        self.modules = dict(zip(old.modules, new.modules.values(), strict=True))
        self.own, self.into = next(iter(self.sites.items()))

    def copy(self, module: GraphModule) -> GraphModule:
        copied = copy_graph(module)
        copied.meta = module.meta  # what is known of one is known of the other
        for node in copied.graph.nodes:
            mark = mark_of(node)
            if mark.site or mark.source:
                site = self.sites.get(mark.site, mark.site)
                note(node, site=site, source=self._source(mark.source))
            for key, names in (("stack_trace", self.lines), ("nn_module_stack", self.modules)):
                known = node.meta.get(key)
                if known:
                    node.meta[key] = names.get(str(known), known)
        return copied

    def _source(self, source: str) -> str:
        if source in self.sources or not source.startswith(f"{self.own}."):
            return self.sources.get(source, source)
        return self.into + source.removeprefix(self.own)


def _pairs(old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, str]:
    return dict(zip(old, new, strict=True))


def identity_of(module: GraphModule, labels: Labels) -> Hashable:
    """Return what a trace of a graph depends on: equal for graphs that are traced to equal ones, up
    to labels.

    Operators and how they are connected, constants, example values; and which nodes come from where
    others do, which a trace passes on.

    Args:
        module: The graph.
        labels: Gets its labels.
    """
    numbers = {node: number for number, node in enumerate(module.graph.nodes)}
    return tuple(_identity_of(module, node, numbers, labels) for node in module.graph.nodes)


def _identity_of(
    module: GraphModule, node: Node, numbers: Mapping[Node, int], labels: Labels
) -> Hashable:
    # Names differ from copy to copy.
    read: Any = torch.fx.map_arg((node.args, node.kwargs), lambda n: _Read(numbers[n]))  # pyright: ignore[reportArgumentType]
    site = node.meta.get("site")
    inner = None if site is None else (labels.site(site.name), site.operator, site.order)
    target = _target_of(module, node, labels)
    # A trace has inputs of its own, which know nothing of where others came from.
    called = labels.of(node) if node.op == "call_function" else None
    return node.op, target, repr(read), kind_of(node.meta.get("val")), inner, called


class _Read:
    """A node as an argument, by its place in the graph."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __repr__(self) -> str:
        return f"%{self.place}"


def _target_of(module: GraphModule, node: Node, labels: Labels) -> Hashable:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op != "get_attr":
        return node.target
    constant = getattr(module, str(node.target))
    return identity_of(constant, labels) if isinstance(constant, GraphModule) else id(constant)


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
