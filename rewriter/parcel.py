"""Graphs on their way to another process, and back."""

from __future__ import annotations

import operator
import pickle
import types
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx._graph_pickler import GraphPickler
from torch.fx._graph_pickler import Options as PicklerOptions
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from passes.graph import copy_graph, placeholders
from passes.tracing import fake_mode_of
from rewriter.as_written import numbers_forgotten
from rewriter.capture import example_of, guards_unmoved
from rewriter.flags import set_requires_grad
from rewriter.stateful import levels_restored

# What the passes read of a node; the rest is PyTorch's, and does not all pickle.
MARKS = ("val", "site", "whole", "draws", "custom", "stack_trace")
# PyTorch's pickler knows the functions of a few libraries; in place of others stands one of those.
_STAND_IN = operator.truth


class CannotPack(Exception):
    """A graph cannot go to another process; says why."""


def pack(module: GraphModule, marks: Collection[str] = ("val",)) -> bytes:
    """Return a graph, with the graphs that it calls, as bytes.

    Args:
        module: The graph; its placeholders hold fake tensors.
        marks: What goes along of each node's ``meta``.

    Raises:
        CannotPack: The graph holds something that cannot go to another process.
    """
    module = _copied(module, marks, {})
    functions: dict[tuple[int, str], Any] = {}
    for number, part in enumerate(_parts(module)):
        for node in part.graph.nodes:
            if isinstance(node.target, types.FunctionType):
                functions[number, node.name], node.target = node.target, _STAND_IN
    try:
        with guards_unmoved():
            graph = GraphPickler.dumps(module, PicklerOptions(ops_filter=None))
        return pickle.dumps((graph, functions))
    except Exception as error:
        raise CannotPack(f"the graph cannot be pickled: {type(error).__name__}: {error}") from error


def unpack(data: bytes, mode: FakeTensorMode | None = None) -> GraphModule:
    """Return the graph that `pack` was given, on fake tensors of this mode or a new one."""
    mode = mode or FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph, functions = pickle.loads(data)
    with guards_unmoved():
        module: Any = GraphPickler.loads(graph, mode)
    for number, part in enumerate(_parts(module)):
        for node in part.graph.nodes:
            node.target = functions.get((number, node.name), node.target)
        part.recompile()
    return module


def pack_captured(captured: GraphModule) -> bytes:
    """Return what Dynamo captured, as bytes; of the values that it saw only the inputs go along.

    Raises:
        CannotPack: The graph holds something that cannot go to another process.
    """
    module = copy_graph(captured)
    inputs = {node: example_of(node) for node in placeholders(module.graph)}
    for node, example in inputs.items():
        node.meta["val"] = example.detach()
    # The graph may switch it, for the example too: what counts is what it was before.
    switches = module.graph.find_nodes(op="call_function", target=set_requires_grad)
    before = {node.args[0]: not node.args[1] for node in reversed(switches)}
    flags = [before.get(node, example.requires_grad) for node, example in inputs.items()]
    return pickle.dumps((pack(module, ("val", "stack_trace")), flags))


def unpack_captured(data: bytes) -> GraphModule:
    """Return the graph that `pack_captured` was given, on fake tensors of a new mode."""
    graph, flags = pickle.loads(data)
    module = unpack(graph)
    inputs = [node.meta.pop("val") for node in placeholders(module.graph)]
    for x, flag in zip(inputs, flags, strict=True):
        x.requires_grad_(flag)
    mode = fake_mode_of(inputs)
    with mode, numbers_forgotten(mode), levels_restored():
        _Remembering(module, garbage_collect_values=False).run(*inputs)
    return module


class _Remembering(Interpreter):
    """Give each node the value that Dynamo has given it."""

    def run_node(self, n: Node) -> Any:
        value = n.meta["example_value"] = super().run_node(n)
        return value


def _parts(module: GraphModule) -> list[GraphModule]:
    """Return a graph, those that it calls, and those in the marks of its nodes; each once."""
    found = {}

    def look(part: object) -> None:
        if isinstance(part, GraphModule) and part not in found:
            found[part] = None
            for inner in part._modules.values():
                look(inner)
            for node in part.graph.nodes:
                for mark in node.meta.values():
                    look(mark)

    look(module)
    return list(found)


def _copied(
    module: GraphModule, marks: Collection[str], known: dict[GraphModule, GraphModule]
) -> GraphModule:
    """Copy `_parts`, with these marks only; ``known`` are those copied already."""

    def copied(part: Any) -> Any:
        return _copied(part, marks, known) if isinstance(part, GraphModule) else part

    if module not in known:
        copy = known[module] = copy_graph(module)
        copy.meta.clear()
        for name, part in list(copy._modules.items()):
            setattr(copy, name, copied(part))
        for node in copy.graph.nodes:
            node.meta = {key: copied(node.meta[key]) for key in marks if key in node.meta}
            if "val" in node.meta:
                node.meta["val"] = tree_map(_on_its_own, node.meta["val"])
    return known[module]


def _on_its_own(value: Any) -> Any:
    """A fake tensor that is no view of another: PyTorch cannot pickle the mode of that one."""
    if not isinstance(value, Tensor) or value._base is None:
        return value
    with fake_mode_of([value]):
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
