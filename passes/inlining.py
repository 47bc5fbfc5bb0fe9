"""Record a call of a graph as one node of a trace, and put the graph's nodes in its place.

A graph that stands at many places of a step (the same network differentiated again and again) is
then not run operator by operator at each: an operator that is copied costs a fraction of one that
is traced.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.utils import _pytree as pytree

from passes.graph import arguments, attribute_of, is_impure, placeholders, value_of

_VALUES = "values"
_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def call_graph(module: GraphModule, *inputs: Any) -> tuple[Any, ...]:
    """Return what a graph computes; in a trace, a node to be replaced by `inline_calls`."""
    return tuple(module(*inputs))


def can_record(module: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether a trace is being made in which a call of a graph may be one node.

    Args:
        module: Functional ATen operators of tensors that draw nothing at random.
        inputs: What it takes.
    """
    if get_proxy_mode() is None or _functorch.peek_interpreter_stack() is not None:
        return False
    if not all(isinstance(x, Tensor) for x in inputs):
        return False
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    return all(_is_plain(node) for node in nodes)


def _is_plain(node: Node) -> bool:
    if node.op != "call_function" or is_impure(node):
        return False
    return isinstance(node.target, OpOverload) or node.target is operator.getitem


def record_call(module: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Record ``module(*inputs)`` as one node of the trace that is being made.

    Args:
        module: A graph that `can_record` allows.
        inputs: Tensors of the trace.
    """
    mode: Any = get_proxy_mode()
    with disable_proxy_modes_tracing(), torch.no_grad():
        values = _values(module, inputs)
        by_node = dict(zip(module.graph.nodes, values, strict=True))
        found = torch.fx.map_arg(module.graph.output_node().args[0], by_node.__getitem__)
        # Each has an identity of its own: one that is an input must not be taken for it.
        results: Any = pytree.tree_map_only(Tensor, _like, found)
    read = pytree.tree_map(mode.tracer.unwrap_proxy, tuple(inputs))
    root = mode.tracer.root
    name = f"graph_{sum(1 for _ in root.children())}"
    root.register_module(name, module)
    proxy = mode.tracer.create_proxy("call_function", call_graph, (module, *read), {})
    proxy.node.meta[_VALUES] = values
    track_tensor_tree(tuple(results), proxy, constant=None, tracer=mode.tracer)
    return list(results)


def _like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _values(module: GraphModule, inputs: Sequence[Tensor]) -> list[Any]:
    """Return the example value of each node of a graph for given inputs: those it was traced with,
    where the inputs are laid out as it was traced for."""
    own = [value_of(node) for node in placeholders(module.graph)]
    if all(_same_layout(x, value) for x, value in zip(inputs, own, strict=True)):
        return [value_of(node) for node in module.graph.nodes]
    layouts = tuple(_layout(x) for x in inputs)
    # Copies of a graph share what is known of it.
    known = module.meta.setdefault("known_values", {})
    if layouts not in known:
        seen = _Seeing(module)
        seen.run(*(x.detach() for x in inputs))
        known[layouts] = [seen.seen.get(node) for node in module.graph.nodes]
    return known[layouts]


class _Seeing(Interpreter):
    """Run a graph and keep every value."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def _layout(x: Tensor) -> tuple[Any, ...]:
    return str((tuple(x.shape), x.stride(), x.storage_offset())), x.dtype, x.device


def _same_layout(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and _layout(one) == _layout(other)


def inline_calls(module: GraphModule) -> int:
    """Replace each recorded call by the nodes of the graph that it calls, in place.

    Args:
        module: What was traced; not recompiled.

    Returns:
        How many there were.
    """
    calls = list(module.graph.find_nodes(op="call_function", target=call_graph))
    for call in calls:
        _inline(module, call)
    return len(calls)


def _inline(module: GraphModule, call: Node) -> None:
    attribute, *inputs = arguments(call)
    called: GraphModule = attribute_of(module, str(attribute.target))
    new = dict(zip(placeholders(called.graph), inputs, strict=True))
    with module.graph.inserting_before(call):
        for node, value in zip(called.graph.nodes, call.meta[_VALUES], strict=True):
            if node.op == "call_function":
                new[node] = module.graph.node_copy(node, new.__getitem__)
                new[node].meta["val"] = value
    returned: Any = torch.fx.map_arg(called.graph.output_node().args[0], new.__getitem__)
    for item in list(call.users):
        item.replace_all_uses_with(returned[arguments(item)[1]])
        module.graph.erase_node(item)
    module.graph.erase_node(call)
    module.graph.erase_node(attribute)
    delattr(module, str(attribute.target))
