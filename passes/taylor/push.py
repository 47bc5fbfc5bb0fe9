"""Run a graph on Taylor series."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.traceback import set_current_meta
from torch.utils import _pytree as pytree

from passes.derivative import taylor
from passes.graph import results
from passes.markers import stop
from passes.taylor.jets import Jets, Series
from passes.taylor.rules import NoSeries, series_of
from passes.tracking import acting, follow


def push_series(
    module: GraphModule,
    jets: Jets,
    primals: Sequence[Any],
    series: Sequence[Series | None],
    starts: Mapping[Node, Callable[[Any, tuple], Series]] | None = None,
) -> tuple[list[Any], list[Series]]:
    """Run a functional ATen graph on values and their Taylor series at once.

    Args:
        module: f.
        jets: The arithmetic: order, directions, what is collapsed.
        primals: The inputs' values x₀.
        series: Their coefficients; None for an input that does not move.
        starts: Nodes whose coefficients are given, in place of those of what they read, by their
            values and those of their arguments.

    Returns:
        f's values, and the coefficients of each.

    Raises:
        NoSeries: An operator has no Taylor rule; names it.
    """
    value: dict[Node, Any] = {}
    moved: dict[Node, Series | None] = {}
    given = iter(zip(primals, series, strict=True))
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value[node], moved[node] = next(given)
        elif node.op == "get_attr":
            value[node], moved[node] = getattr(module, str(node.target)), None
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value.__getitem__)
            with set_current_meta(node):
                value[node] = out = node.target(*args, **kwargs)
                follow(pytree.tree_leaves(out))
            moved[node] = None
            if starts and node in starts:
                with acting(node, "tangent"):
                    moved[node] = found = starts[node](out, args)
                    follow([term for term in found.terms if term is not None])
                continue
            if node.target is stop or all(moved[read] is None for read in node.all_input_nodes):
                continue
            if any(moved[n] is not None for n in _nodes_in(node.kwargs)):
                raise NoSeries(f"{node.target}: a keyword argument moves")
            if node.target is taylor:
                part, *inner = node.args
                along = [moved.get(n) if isinstance(n, Node) else None for n in inner]
                read = [value[n] if isinstance(n, Node) else n for n in inner]
                _, found = push_series(value[part], jets, read, along)
                terms = zip(*(series.terms for series in found), strict=True)
                moved[node] = Series(tuple(terms))
                continue
            along = pytree.tree_map(
                lambda item: moved[item] if isinstance(item, Node) else None, node.args
            )
            with acting(node, "tangent"):
                found = series_of(jets, node.target, out, args, kwargs, along)
                follow(pytree.tree_leaves([term for term in found.terms if term is not None]))
            moved[node] = None if found.is_zero else found
    ends = results(module.graph)
    return (
        [value[n] if isinstance(n, Node) else n for n in ends],
        [(moved[n] if isinstance(n, Node) else None) or jets.zero for n in ends],
    )


def _nodes_in(arguments: Any) -> list[Node]:
    return [item for item in pytree.tree_leaves(arguments) if isinstance(item, Node)]
