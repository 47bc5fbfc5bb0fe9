"""The nodes of a stage as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
from torch.fx import GraphModule, Node

from passes import derivative
from passes.graph import describe, value_of
from passes.markers import GRADIENT, TANGENT
from passes.origin import origin_of
from passes.price import evaluated, node_bytes, node_flops
from rewriter.sources import place_of, shown

_KINDS = {"placeholder": "input", "output": "output"}
_DERIVATIVES = (
    GRADIENT, TANGENT, derivative.gradient, derivative.tangent, derivative.jvp_over_gradient
)  # fmt: skip


def nodes_of(
    module: GraphModule, hints: dict[sympy.Symbol, int], sites: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the nodes of a graph in order, for `Report.to_dict`.

    A derivative that is still one node has the nodes of the graphs that it calls as its ``body``,
    and costs what they cost.

    Args:
        module: The graph.
        hints: What its symbolic sizes are.
        sites: ``file:line: code`` → site, where no node of the graph says it.
    """
    return list(_records(module, "", hints, sites))


def _records(
    module: GraphModule, prefix: str, hints: dict[sympy.Symbol, int], sites: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            continue
        body = [
            record
            for name, part in _parts(module, node)
            for record in _records(part, f"{prefix}{node.name}.{name}.", hints, sites)
        ]
        yield _record(node, prefix, hints, sites, body)


def _parts(module: GraphModule, node: Node) -> Iterator[tuple[str, GraphModule]]:
    """Yield the graphs that a node calls; the body itself where a form of it is called."""
    for read in node.all_input_nodes:
        if read.op == "get_attr" and node.op == "call_function":
            part = getattr(module, str(read.target), None)
            if isinstance(part, GraphModule):
                yield str(read.target).split("_")[0], part


def _record(
    node: Node,
    prefix: str,
    hints: dict[sympy.Symbol, int],
    sites: Mapping[str, str],
    body: list[dict[str, Any]],
) -> dict[str, Any]:
    origin = origin_of(node)
    path, line, code = place_of(origin.where)
    is_call = node.op == "call_function"
    cost = node_flops(node) if is_call else sympy.Integer(0)
    moved = node_bytes(node) if is_call else sympy.Integer(0)
    is_site = node.target in _DERIVATIVES
    found = {
        "id": f"{prefix}{node.name}",
        "op": _operator(node),
        "kind": "site" if is_site else _KINDS.get(node.op, "call"),
        "role": origin.role,
        "module": origin.module,
        "tensor": "" if node.op == "output" else describe(value_of(node)),
        "flops": evaluated(cost, hints) or sum(inner["flops"] for inner in body),
        "flops_formula": str(cost) if cost != 0 else "",
        "bytes": evaluated(moved, hints) or sum(inner["bytes"] for inner in body),
        "where": f"{shown(path)}:{line}: {code}" if path else "",
        "path": shown(path) if path else "",
        "line": line,
        "site": origin.site or (sites.get(origin.where) if is_site else None),
        "stage": origin.stage,
        "inputs": [f"{prefix}{r.name}" for r in node.all_input_nodes if r.op != "get_attr"],
    }
    return {**found, "body": body} if body else found


def _operator(node: Node) -> str:
    if node.op in _KINDS:
        return _KINDS[node.op]
    name = getattr(node.target, "overloadpacket", None)
    return str(name) if name is not None else getattr(node.target, "__name__", str(node.target))
