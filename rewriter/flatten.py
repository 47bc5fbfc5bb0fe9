"""From what Dynamo captured to the flat graph: functional ATen operators, nested derivatives as
marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes import derivative
from passes.graph import (
    arguments,
    drop_dead,
    finish,
    is_impure,
    placeholders,
    results,
    where,
)
from passes.linearize import flatten_output
from passes.markers import FUNCTION, STOP, NeedsBatchedPoint
from passes.nest import nest
from passes.origin import note_new
from passes.tracing import fake_mode_of, trace_before_autograd
from rewriter.capture import example_of
from rewriter.errors import CaptureError, NeedsNumber
from rewriter.marking import Marking, UserFunction
from rewriter.padding import write_out_padding
from rewriter.widths import with_known_sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class Flat:
    """The flat graph of a loss.

    Attributes:
        module: ``inputs → (*outputs, *new values)``.
        n_outputs: How many results are the loss's own.
        updated: Positions of the inputs that the remaining results are to be written to.
        promoted: Positions of the inputs that the loss makes require grad, and leaves so.
    """

    module: GraphModule
    n_outputs: int
    updated: tuple[int, ...]
    promoted: tuple[int, ...]


def flatten(captured: GraphModule) -> Flat:
    """Run a captured graph once on fake tensors and record functional ATen operators.

    In-place writes are made functional, `torch.vmap` is dissolved into batched operators, `no_grad`
    and `detach` become ``stop`` marks, and each derivative becomes a ``gradient`` mark.

    Raises:
        CaptureError: The graph holds something whose meaning would be lost.
    """
    module, marking = _recorded(captured)
    n_outputs = len(results(module.graph))
    note_new(module, "flatten")
    inputs = placeholders(captured.graph)
    constant = {i for i, node in enumerate(inputs) if node in marking.renormalised}
    return Flat(module, n_outputs, _take_out_updates(module, constant), marking.promoted)


def _recorded(captured: GraphModule) -> tuple[GraphModule, Marking]:
    """Return the flat graph, writes to inputs still in it, and what has made it."""
    try:
        module, marking = _run(captured, expand_points=False)
    except NeedsBatchedPoint:
        try:
            module, marking = _run(captured, expand_points=True)
        except NeedsBatchedPoint as error:
            raise CaptureError(str(error)) from error
    for node in module.graph.find_nodes(
        op="call_function", target=aten._local_scalar_dense.default
    ):
        raise NeedsNumber("a Python number is needed", where(node))
    for node in module.graph.find_nodes(
        op="call_function", target=aten._embedding_bag_forward_only.default
    ):
        node.target = aten._embedding_bag.default  # the form that autograd differentiates
    write_out_padding(module)
    flatten_output(module.graph)
    for node in module.graph.find_nodes(op="call_function", target=aten.detach.default):
        node.target = STOP
    _give_bodies(module, marking.functions)
    return module, marking


def _give_bodies(module: GraphModule, functions: Sequence[UserFunction]) -> None:
    """Replace each function mark by `passes.derivative.user_function` with its two halves."""
    for node in list(module.graph.find_nodes(op="call_function", target=FUNCTION)):
        tensors, sizes, like, key = arguments(node)
        function = functions[key]
        for name, half in (("forward", function.forward), ("backward", function.backward)):
            body = _body(half, where(node))
            if name == "forward":
                _stop_intermediates(body, len(like))
            module.register_module(f"{name}_{node.name}", body)
        given = {True: iter(sizes), False: iter(tensors)}
        inputs = [next(given[is_symbol]) for is_symbol in function.is_symbol]
        with module.graph.inserting_before(node):
            halves = [module.graph.get_attr(f"{n}_{node.name}") for n in ("forward", "backward")]
        node.target = derivative.user_function
        node.args = (*halves, len(like), function.constant, *inputs)
    drop_dead(module.graph)
    finish(module)


def _stop_intermediates(forward: GraphModule, n_outputs: int) -> None:
    """Make constants of the saved values that are neither inputs nor outputs, as they are to a
    second derivative of the function as written."""
    found = results(forward.graph)
    output = forward.graph.output_node()
    saved = []
    for value in found[n_outputs:]:
        if (
            isinstance(value, Node)
            and value.op == "call_function"
            and value not in found[:n_outputs]
        ):
            with forward.graph.inserting_before(output):
                stopped = forward.graph.call_function(derivative.stop, (value,))
            stopped.meta = dict(value.meta)
            value = stopped
        saved.append(value)
    output.args = ((*found[:n_outputs], *saved),)
    finish(forward)


def _body(half: GraphModule, here: str) -> GraphModule:
    """Flatten and nest one half of a user's `autograd.Function`."""
    module, marking = _recorded(half)
    computed = [node for node in module.graph.nodes if node.op == "call_function"]
    if marking.promoted or any(is_impure(node) for node in computed):
        raise CaptureError(
            "a user-defined autograd.Function that draws random numbers or changes its inputs", here
        )
    nest(module)
    return module


def _run(captured: GraphModule, *, expand_points: bool) -> tuple[GraphModule, Marking]:
    examples = [example_of(node) for node in placeholders(captured.graph)]
    mode = fake_mode_of(examples)
    constants = [
        with_known_sizes(x.detach(), mode) if isinstance(x, Tensor) else x for x in examples
    ]
    marking = Marking(captured, expand_points=expand_points)

    def run(*values: Any) -> Any:
        try:
            with torch.no_grad():
                return marking.run(*values, enable_io_processing=False)
        finally:
            marking.unwind()

    return trace_before_autograd(run, constants, mode), marking


def _take_out_updates(module: GraphModule, constant: set[int]) -> tuple[int, ...]:
    """Turn writes to inputs at the graph's end into results of the graph.

    Args:
        module: The graph.
        constant: Positions of inputs whose new values are constants, though the graph goes on with
            them as what the old ones are to derivatives.
    """
    graph = module.graph
    position = {node: index for index, node in enumerate(placeholders(graph))}
    new: dict[int, Any] = {}
    for node in list(graph.find_nodes(op="call_function", target=aten.copy_.default)):
        written, value = node.args[:2]
        if written not in position:
            raise CaptureError(f"the loss writes to {written}, which is neither input nor its own")
        new[position[written]] = value
        if position[written] in constant:
            with graph.inserting_before(node):
                new[position[written]] = graph.call_function(STOP, (value,))
            new[position[written]].meta = dict(node.meta)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    output = graph.output_node()
    output.args = ((*results(graph), *new.values()),)
    module.recompile()
    return tuple(new)
