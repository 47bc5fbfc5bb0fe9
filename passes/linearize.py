"""Forward mode on a graph: tangents beside the primal nodes, zeros never written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.traceback import set_current_meta
from torch.utils import _pytree as pytree

from passes.graph import drop_dead, finish, placeholders, reaches, results, value_of
from passes.origin import mark_of, note
from passes.simplify import simplify
from passes.tangent_rules import NoRule, tangent_of
from passes.tracing import example_inputs, fake_mode_of, trace
from passes.tracking import acting, follow


@dataclass(frozen=True)
class Linearization:
    """A function and its derivative as two graphs that share the primal's values.

    Attributes:
        primal: ``P : inputs → (*kept outputs, *residuals)``.
        tangent: ``T : (*residuals, *tangents) → output tangents``; None stands for a tangent that
            is zero.
    """

    primal: GraphModule
    tangent: GraphModule


def push_forward(
    module: GraphModule, primals: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[list[Any], list[Any]]:
    """Run a graph on values and tangents at once.

    ``(x, ẋ) → (f(x), f'(x) ẋ)``. A tangent of None is a zero that costs nothing: operators all of
    whose tangents are None have none either. Every primal value is computed once and shared with
    the tangent rules.

    Raises:
        NoRule: An operator has neither a row in the table nor a forward-mode rule in PyTorch; names
            it.
    """
    primal: dict[Node, Any] = {}
    tangent: dict[Node, Any] = {}
    given = iter(zip(primals, tangents, strict=True))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            primal[node], tangent[node] = next(given)
        elif node.op == "get_attr":
            primal[node], tangent[node] = getattr(module, str(node.target)), None
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), primal.__getitem__)
            with set_current_meta(node):
                primal[node] = out = node.target(*args, **kwargs)
                follow(pytree.tree_leaves(out))
            moving = any(_is_moving(tangent[read]) for read in node.all_input_nodes)
            if not moving:
                tangent[node] = None
                continue
            if any(_is_moving(tangent[read]) for read in _nodes_in(node.kwargs)):
                raise NoRule(node.target, "a tangent of a keyword argument")
            along = pytree.tree_map(
                lambda item: tangent[item] if isinstance(item, Node) else None, node.args
            )
            with acting(node, "tangent"):
                tangent[node] = tangent_of(node.target, out, args, kwargs, along)
                follow(pytree.tree_leaves(tangent[node]))
    output = module.graph.output_node()
    flat = output.args[0]
    assert isinstance(flat, (tuple, list)), "a graph returns a flat tuple"
    return (
        [primal[n] if isinstance(n, Node) else n for n in flat],
        [tangent[n] if isinstance(n, Node) else None for n in flat],
    )


def _nodes_in(arguments: Any) -> list[Node]:
    return [item for item in pytree.tree_leaves(arguments) if isinstance(item, Node)]


def _is_moving(tangent: Any) -> bool:
    if isinstance(tangent, (tuple, list)):
        return any(_is_moving(item) for item in tangent)
    return tangent is not None


def linearize(
    module: GraphModule,
    moving: Sequence[int],
    kept: Sequence[int],
    wanted: Sequence[int],
    zero: Sequence[int] = (),
) -> Linearization:
    """Split ``(f(x), f'(x) ẋ)`` into the part that knows no tangent and the part that is linear in
    the tangents.

    Args:
        module: The function, a functional ATen graph with backward operators taken apart.
        moving: Positions of the inputs that have a tangent, in the order ``T`` takes them.
        kept: Positions of the outputs whose values ``P`` returns.
        wanted: Positions of the outputs whose tangents ``T`` returns.
        zero: Positions, last of all inputs, of those that are zero at the point and only move;
            ``P`` does not take them.

    Raises:
        NoRule: see `push_forward`.
    """
    inputs = example_inputs(module)
    mode = fake_mode_of(inputs)
    with mode:
        directions = [torch.empty_like(inputs[i]) for i in moving]

    taken = [value for position, value in enumerate(inputs) if position not in zero]
    assert list(zero) == list(range(len(taken), len(inputs))), "zero inputs come last"

    def both(*values: Any) -> tuple[list[Any], list[Any]]:
        given = values[len(taken) :]
        at = dict(zip(moving, given, strict=True))
        primals = [*values[: len(taken)], *(torch.zeros_like(at[position]) for position in zero)]
        tangents: list[Tensor | None] = [None] * len(inputs)
        for position, direction in at.items():
            tangents[position] = direction
        with torch.no_grad():
            values_out, tangents_out = push_forward(module, primals, tangents)
        return [values_out[i] for i in kept], [tangents_out[i] for i in wanted]

    whole = trace(both, [*taken, *directions], mode)
    flatten_output(whole.graph)
    late = placeholders(whole.graph)[len(taken) :]
    _read_sizes_early(whole.graph, set(late))
    simplify(whole)
    return split(whole, late, len(kept))


def _read_sizes_early(graph: Graph, late: set[Node]) -> None:
    """Read each symbolic size that a late input shares with an early one from the latter: a zero
    that the primal makes in the shape of a tangent does not depend on the tangent."""
    early: dict[str, tuple[Node, int]] = {}
    for node in placeholders(graph):
        if node not in late:
            for dim, size in enumerate(getattr(value_of(node), "shape", ())):
                early.setdefault(str(size), (node, dim))
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        of, dim = node.args
        if of in late:
            node.args = early.get(str(value_of(of).shape[dim]), (of, dim))


def flatten_output(graph: Graph) -> None:
    """Make a graph return one flat tuple."""
    output = graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0], is_leaf=lambda x: x is None)),)


def split(module: GraphModule, late: Sequence[Node], n_early: int) -> Linearization:
    """Cut a graph in two at the inputs that come late.

    ``module : (*early, *late) → (*early results, *late results)``; the first graph computes the
    first ``n_early`` results and everything the second needs that does not depend on ``late`` (the
    residuals).
    """
    graph = module.graph
    behind = reaches(late)
    outputs = results(graph)
    early_outputs, late_outputs = outputs[:n_early], outputs[n_early:]
    assert not behind.intersection(n for n in early_outputs if isinstance(n, Node)), (
        "an early result depends on a late input"
    )
    late_nodes = [n for n in graph.nodes if n in behind and n.op not in ("placeholder", "output")]
    reads = [read for node in late_nodes for read in node.all_input_nodes]
    reads += [n for n in late_outputs if isinstance(n, Node)]
    residuals = [
        node for node in dict.fromkeys(reads) if node not in behind and node.op != "get_attr"
    ]
    early_nodes = [n for n in graph.nodes if n not in behind and n.op != "output"]
    for node in early_nodes:
        if mark_of(node).role == "tangent":
            note(node, role="cotangent")  # a factor of tangents, and of cotangents, that knows none
    primal = _extract(
        module,
        [n for n in early_nodes if n.op == "placeholder"],
        early_nodes,
        [*early_outputs, *residuals],
    )
    tangent = _extract(module, [*residuals, *late], late_nodes, late_outputs)
    return Linearization(primal, tangent)


def _extract(
    module: GraphModule, inputs: Sequence[Node], nodes: Sequence[Node], outputs: Sequence[Any]
) -> GraphModule:
    graph = Graph()
    new: dict[Node, Node] = {}
    for node in inputs:
        new[node] = graph.placeholder(node.name)
        new[node].meta = dict(node.meta)
    root = torch.nn.Module()

    def copied(node: Node) -> Node:
        if node not in new:
            assert node.op == "get_attr", f"{node} is neither an input nor computed"
            setattr(root, str(node.target), getattr(module, str(node.target)))
            new[node] = graph.get_attr(str(node.target))
            new[node].meta = dict(node.meta)
        return new[node]

    for node in nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            new[node] = graph.node_copy(node, copied)
    graph.output(tuple(copied(n) if isinstance(n, Node) else n for n in outputs))
    part = GraphModule(root, graph)
    drop_dead(graph)
    return finish(part)
