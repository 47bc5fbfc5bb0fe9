"""From what Dynamo captured to the flat graph: functional ATen operators, nested derivatives as
marks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import placeholders, results, where
from passes.linearize import flatten_output
from passes.markers import (
    STOP,
    NeedsBatchedPoint,
)
from passes.tracing import fake_mode_of, trace_before_autograd
from rewriter.capture import example_of
from rewriter.errors import CaptureError, NeedsNumber
from rewriter.marking import Marking

aten = torch.ops.aten


@dataclass(frozen=True)
class Flat:
    """The flat graph of a loss.

    Attributes:
        module: ``inputs → (*outputs, *new values)``.
        n_outputs: How many results are the loss's own.
        updated: Positions of the inputs that the remaining results are to be written to.
        promoted: Positions of the inputs on which the loss calls ``requires_grad_()``.
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
    flatten_output(module.graph)
    for node in module.graph.find_nodes(op="call_function", target=aten.detach.default):
        node.target = STOP
    n_outputs = len(results(module.graph))
    return Flat(module, n_outputs, _take_out_updates(module), marking.promoted)


def _run(captured: GraphModule, *, expand_points: bool) -> tuple[GraphModule, Marking]:
    examples = [example_of(node) for node in placeholders(captured.graph)]
    constants = [x.detach() if isinstance(x, Tensor) else x for x in examples]
    marking = Marking(captured, expand_points=expand_points)

    def run(*values: Any) -> Any:
        try:
            with torch.no_grad():
                return marking.run(*values, enable_io_processing=False)
        finally:
            marking.unwind()

    return trace_before_autograd(run, constants, fake_mode_of(examples)), marking


def _take_out_updates(module: GraphModule) -> tuple[int, ...]:
    """Turn writes to inputs at the graph's end into results of the graph."""
    graph = module.graph
    position = {node: index for index, node in enumerate(placeholders(graph))}
    new: dict[int, Any] = {}
    for node in list(graph.find_nodes(op="call_function", target=aten.copy_.default)):
        written, value = node.args[:2]
        if written not in position:
            raise CaptureError(f"the loss writes to {written}, which is neither input nor its own")
        new[position[written]] = value
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    output = graph.output_node()
    output.args = ((*results(graph), *new.values()),)
    module.recompile()
    return tuple(new)
