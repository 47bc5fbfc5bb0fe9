"""Each rule of `verify` has a graph that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.graph import copy_graph, placeholders, results
from passes.markers import point_mark
from passes.nest import body_of, nest, sites
from passes.verify import Invalid, verify
from tests.passes.flat import Marks, flat_graph, random_points

aten = torch.ops.aten


def loss(m: Marks, x: Tensor, w: Tensor) -> Any:
    p = m.leaf(x)
    u = torch.tanh(p @ w)
    return (m.gradient(u, p) * u).sum()


@pytest.fixture
def module() -> GraphModule:
    """A derivative graph with one site that captures a weight and returns its value."""
    graph = flat_graph(loss, random_points(5, 3), random_points(3, 3))
    nest(graph)
    return graph


def site(module: GraphModule) -> Node:
    (node,) = sites(module)
    return node


def with_argument(node: Node, position: int, value: Any) -> None:
    node.args = (*node.args[:position], value, *node.args[position + 1 :])


def test_valid(module: GraphModule) -> None:
    verify(module)
    verify(copy_graph(module))
    verify(body_of(module, site(module)))


def test_flat_graph_is_valid() -> None:
    verify(flat_graph(loss, random_points(5, 3), random_points(3, 3)))


def unordered(module: GraphModule) -> None:
    placeholders(module.graph)[0].prepend(site(module))


def without_value(module: GraphModule) -> None:
    del next(iter(site(module).users)).meta["val"]


def input_without_value(module: GraphModule) -> None:
    del placeholders(module.graph)[1].meta["val"]


def method(module: GraphModule) -> None:
    with module.graph.inserting_before(module.graph.output_node()):
        node = module.graph.call_method("sin", (placeholders(module.graph)[0],))
    node.meta["val"] = placeholders(module.graph)[0].meta["val"]


def too_few_inputs(module: GraphModule) -> None:
    node = site(module)
    node.args = (*node.args[:5], *node.args[6:])


def other_shape(module: GraphModule) -> None:
    with_argument(site(module), 5, placeholders(module.graph)[0])


def other_type(module: GraphModule) -> None:
    weight = placeholders(module.graph)[1]
    weight.meta["val"] = weight.meta["val"].float()


def too_few_results(module: GraphModule) -> None:
    node = site(module)
    node.meta["val"] = node.meta["val"][:1]


def body_with_a_result_more(module: GraphModule) -> None:
    body = body_of(module, site(module))
    body.graph.output_node().args = ((*results(body.graph), results(body.graph)[0]),)


def gradient_of_another_shape(module: GraphModule) -> None:
    node = site(module)
    _, value = node.meta["val"]
    node.meta["val"] = (placeholders(module.graph)[1].meta["val"], value)


def invalid_body(module: GraphModule) -> None:
    body = body_of(module, site(module))
    (tanh,) = body.graph.find_nodes(op="call_function", target=aten.tanh.default)
    tanh.op, tanh.target = "call_method", "tanh"


def mark_left_behind(module: GraphModule) -> None:
    first = placeholders(module.graph)[0]
    with module.graph.inserting_before(site(module)):
        mark = module.graph.call_function(torch.ops.optimize_nested.point.default, (first, []))
    mark.meta["val"] = first.meta["val"]


# how to break the graph → the error and the rule it names
BREAKS: dict[Callable[[GraphModule], None], tuple[type[Exception], str]] = {
    unordered: (RuntimeError, "used before it has been defined"),
    without_value: (Invalid, "getitem.* has no example value"),
    input_without_value: (Invalid, "arg1_1 has no example value"),
    method: (Invalid, "sin calls sin; graphs hold functions only"),
    too_few_inputs: (Invalid, "gradient.* gives 1 inputs to a body that takes 2"),
    other_shape: (Invalid, "arg0_1 is not what the body takes as arg1_1"),
    other_type: (Invalid, "arg1_1 is not what the body takes as arg1_1"),
    too_few_results: (Invalid, r"gradient.* has 1 results, not 1 \+ 1"),
    body_with_a_result_more: (Invalid, r"gradient.* has 2 results, not 1 \+ 2"),
    gradient_of_another_shape: (Invalid, r"the gradient of leaf has shape \(3, 3\)"),
    invalid_body: (Invalid, "tanh calls tanh; graphs hold functions only"),
    mark_left_behind: (Invalid, "marks and derivative nodes in one graph"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken(module: GraphModule, broken: Callable[[GraphModule], None]) -> None:
    kind, rule = BREAKS[broken]
    broken(module)
    with pytest.raises(kind, match=rule):
        verify(module)


def test_invalid_is_ours() -> None:
    """A broken graph is a bug of a pass, never the user's mistake."""
    assert issubclass(Invalid, AssertionError)


def test_marks_alone_are_valid() -> None:
    verify(flat_graph(lambda m, x: point_mark(x, []).sin(), random_points(3)))
