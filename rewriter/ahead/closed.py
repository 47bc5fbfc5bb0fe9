"""Make a graph one of tensors only: sizes are read from tensors, constants are inputs.

Such a graph means the same to `torch.export`, to the portable form and to a caller in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import copy_graph, drop_dead, finish, placeholders, results, value_of
from passes.tracing import fake_mode_of
from rewriter.errors import CaptureError

aten = torch.ops.aten


@dataclass(frozen=True)
class Closed:
    """A graph ``(*tensors, *constants, *sizes) → tensors``.

    Attributes:
        module: The graph.
        constants: Values of the constants, which the graph had as attributes.
        sizes: Expressions of the sizes, each taken as an empty tensor of shape ``(size, 0)``.
        results: For each result of the original: True where it is one of the tensors, in order;
            ``["input", i]`` where it is an input; otherwise None or a size's expression.
    """

    module: GraphModule
    constants: tuple[Tensor, ...]
    sizes: tuple[Any, ...]
    results: tuple[Any, ...]


def close(module: GraphModule) -> Closed:
    """Return a copy of a functional ATen graph that takes and returns tensors only.

    Raises:
        CaptureError: The graph calls another graph.
    """
    module = copy_graph(module)
    graph = module.graph
    given = placeholders(graph)
    after = next(node for node in graph.nodes if node.op != "placeholder")
    constants = _take_out_constants(module, after)
    sizes = _read_sizes(module, given, after)
    found = _tensor_results(module)
    drop_dead(graph)
    return Closed(finish(module), tuple(constants), tuple(sizes), tuple(found))


def _take_out_constants(module: GraphModule, after: Node) -> list[Tensor]:
    taken: dict[str, Node] = {}
    values = []
    for node in list(module.graph.find_nodes(op="get_attr")):
        name = str(node.target)
        value = module.get_submodule(name.rpartition(".")[0])
        value = getattr(value, name.rpartition(".")[2])
        if not isinstance(value, Tensor):
            raise CaptureError(f"the graph calls another graph, {name}, which no artifact can hold")
        if name not in taken:
            with module.graph.inserting_before(after):
                taken[name] = module.graph.placeholder(f"constant_{len(taken)}")
            taken[name].meta["val"] = node.meta.get("val", value)
            values.append(value.detach())
        node.replace_all_uses_with(taken[name])
        module.graph.erase_node(node)
    return values


def _read_sizes(module: GraphModule, given: Sequence[Node], after: Node) -> list[Any]:
    """Replace sizes that are inputs by reads of a tensor that has them."""
    graph = module.graph
    source: dict[Any, tuple[Node, int]] = {}
    for node in given:
        if isinstance(value_of(node), Tensor):
            for dim, size in enumerate(value_of(node).shape):
                if isinstance(size, torch.SymInt):
                    source.setdefault(size.node.expr, (node, dim))
    sizes: dict[Any, torch.SymInt | int] = {}
    numbers = [node for node in given if not isinstance(value_of(node), Tensor)]
    for node in numbers:
        value = value_of(node)
        if not isinstance(value, (int, torch.SymInt)):
            raise CaptureError(f"the loss takes {node}, which is neither tensor nor size")
        expression = _expression(value)
        if node.users and expression not in source and expression not in sizes:
            sizes[expression] = value
    for expression, value in sizes.items():
        with graph.inserting_before(after):
            carrier = graph.placeholder(f"size_{len(source)}")
        with fake_mode_of([value_of(node) for node in given]):
            carrier.meta["val"] = torch.empty(value, 0)
        source[expression] = (carrier, 0)
    for node in numbers:
        if node.users:
            with graph.inserting_before(after):
                read = graph.call_function(aten.sym_size.int, source[_expression(value_of(node))])
            read.meta["val"] = value_of(node)
            node.replace_all_uses_with(read)
        graph.erase_node(node)
    return list(sizes)


def _expression(value: torch.SymInt | int) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _tensor_results(module: GraphModule) -> list[Any]:
    """Return tensors only, none of which shares memory with an input or another one."""
    graph = module.graph
    output = graph.output_node()
    given = placeholders(graph)
    found: list[Any] = []
    tensors: list[Node] = []
    for result in results(graph):
        value = value_of(result)
        if result in given:
            found.append(["input", given.index(result)])
        elif isinstance(value, Tensor):
            assert isinstance(result, Node)
            found.append(True)
            tensors.append(_owned(module, result, output, tensors))
        else:
            found.append(value.node.expr if isinstance(value, torch.SymInt) else value)
    output.args = (tuple(tensors),)
    return found


def _owned(module: GraphModule, result: Node, output: Node, others: Sequence[Node]) -> Node:
    schema = getattr(result.target, "_schema", None)
    is_new = schema is not None and all(r.alias_info is None for r in schema.returns)
    if is_new and result not in others and value_of(result).is_contiguous():
        return result
    with module.graph.inserting_before(output):
        # In the order of indices: an expanded tensor is one number under many of them.
        own = module.graph.call_function(
            aten.clone.default, (result,), {"memory_format": torch.contiguous_format}
        )
    own.meta["val"] = torch.empty_like(value_of(result), memory_format=torch.contiguous_format)
    return own
