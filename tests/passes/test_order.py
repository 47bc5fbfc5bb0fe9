"""Sorting: runnable, near to what was, random draws in sequence."""

from __future__ import annotations

import itertools
import random

import torch
from torch.fx import Graph, Node

from passes.graph import is_random
from passes.order import sort_nodes

aten = torch.ops.aten


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def chain(*steps: str) -> tuple[Graph, dict[str, Node]]:
    """A graph from lines like ``"b = a"`` (sine), ``"c = a b"`` (sum), ``"d = draw"``, ``"x"``."""
    graph, made = Graph(), {}
    for step in steps:
        name, _, right = step.partition(" = ")
        read = [made[part] for part in right.split() if part != "draw"]
        if not right:
            made[name] = graph.placeholder(name)
        elif right == "draw":
            made[name] = graph.create_node("call_function", aten.rand.default, ([2],), name=name)
        else:
            target = aten.sin.default if len(read) == 1 else aten.add.Tensor
            made[name] = graph.create_node("call_function", target, tuple(read), name=name)
    graph.output((made[name],))
    return graph, made


def test_sorted_graph_stays() -> None:
    graph, _ = chain("x", "y", "a = x", "b = y", "c = b a")
    before = names(graph)
    assert sort_nodes(graph) == 0
    assert names(graph) == before


def test_use_before_definition() -> None:
    """Only what must move moves."""
    graph, made = chain("x", "y", "a = x", "b = y", "c = y", "d = a b")
    made["a"].args = (made["c"],)
    assert sort_nodes(graph) > 0
    assert names(graph) == ["x", "y", "b", "c", "a", "d", "output"]
    graph.lint()
    assert sort_nodes(graph) == 0


def test_inputs_keep_their_order() -> None:
    """An input that nobody reads first is still the first argument."""
    graph, made = chain("x", "y", "a = y", "b = x", "c = a b")
    made["a"].prepend(made["y"])
    sort_nodes(graph)
    assert names(graph)[:2] == ["x", "y"]


def test_draws_keep_their_order() -> None:
    """The second draw is ready first, and waits: the generator hands out numbers in sequence."""
    graph, made = chain("x", "a = x", "second = draw", "b = second", "c = a b")
    with graph.inserting_before(made["second"]):
        args = (made["c"],)  # as a pass might leave it: the first draw reads what comes later
        first = graph.create_node("call_function", aten.bernoulli.default, args, name="first")
    made["c"].args = (made["a"], made["x"])
    graph.output_node().args = ((first, made["b"]),)
    sort_nodes(graph)
    assert names(graph) == ["x", "a", "c", "first", "second", "b", "output"]
    graph.lint()


def test_shuffled_graphs_become_runnable() -> None:
    choose = random.Random(0)
    for _ in range(10):
        graph, made = chain("x", "y", *_random_steps(choose, 30))
        nodes = list(made.values())
        choose.shuffle(nodes)
        draws = [node for node in graph.nodes if is_random(node)]
        output = graph.output_node()
        for node in nodes:
            output.prepend(node)
        for one, other in itertools.pairwise(draws):
            one.append(other)  # a pass never swaps draws
        sort_nodes(graph)
        graph.lint()
        assert [node for node in graph.nodes if is_random(node)] == draws
        assert sort_nodes(graph) == 0


def _random_steps(choose: random.Random, count: int) -> list[str]:
    steps, known = [], ["x", "y"]
    for index in range(count):
        name = f"n{index}"
        right = "draw" if choose.random() < 0.15 else " ".join(choose.sample(known, 2))
        steps.append(f"{name} = {right}")
        known.append(name)
    return steps
