"""Check a graph between passes: valid before, valid after."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from passes import derivative
from passes.graph import arguments, placeholders, results, value_of
from passes.markers import MARKS
from passes.nest import body_of


class Invalid(AssertionError):
    """A pass left a graph that breaks a rule; names the node and the rule."""


def verify(module: GraphModule) -> None:
    """Check a flat, derivative or joint graph.

    - It passes FX's own lint, and every node that computes has an example value.
    - A derivative node's body takes exactly its points and captured values, in the same shapes, and
      returns at least its outputs; its example values are the gradients' and the body's.
    - Marks and derivative nodes do not mix: a graph that was nested holds no marks.

    Raises:
        Invalid: Names the node and the rule.
    """
    module.graph.lint()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "call_function") and node.users and "val" not in node.meta:
            raise Invalid(f"{node} has no example value")
        if node.op in ("call_method", "call_module"):
            raise Invalid(f"{node} calls {node.target}; graphs hold functions only")
        if node.target is derivative.gradient:
            _verify_gradient(module, node)
    nested = any(node.target in derivative.OPERATORS for node in module.graph.nodes)
    marked = any(node.target in MARKS for node in module.graph.nodes)
    if nested and marked:
        raise Invalid("marks and derivative nodes in one graph")


def _verify_gradient(module: GraphModule, node: Node) -> None:
    _, n_points, n_outputs, seed_dims, *inputs = arguments(node)
    body = body_of(module, node)
    verify(body)
    read = inputs[: len(inputs) - n_outputs]
    taken = placeholders(body.graph)
    if len(read) != len(taken):
        raise Invalid(f"{node} gives {len(read)} inputs to a body that takes {len(taken)}")
    for outer, inner in zip(read, taken, strict=True):
        _verify_same(node, outer, inner)
    returned = results(body.graph)
    values = value_of(node)
    if len(values) != n_points + len(returned):
        raise Invalid(f"{node} has {len(values)} results, not {n_points} + {len(returned)}")
    for point, grad in zip(inputs[:n_points], values[:n_points], strict=True):
        if list(grad.shape[seed_dims:]) != list(value_of(point).shape):
            raise Invalid(f"{node}: the gradient of {point} has shape {tuple(grad.shape)}")


def _verify_same(node: Node, outer: Node, inner: Node) -> None:
    left, right = value_of(outer), value_of(inner)
    if not isinstance(left, Tensor):
        return
    if left.dtype != right.dtype or list(left.shape) != list(right.shape):
        raise Invalid(f"{node}: {outer} is not what the body takes as {inner}")
