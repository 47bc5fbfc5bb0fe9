"""The nodes of a stage as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
from torch.fx import GraphModule, Node

from passes import derivative
from passes.bytes import node_bytes
from passes.graph import describe, value_of
from passes.markers import GRADIENT, TANGENT
from passes.origin import mark_of, origin_of
from passes.price import evaluated, node_flops
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
    and costs what they cost. A node's id is what the computation is called in every stage.

    Args:
        module: The graph.
        hints: What its symbolic sizes are.
        sites: ``file:line: code`` → site, where no node of the graph says it.
    """
    ids: dict[Node, str] = {}
    _name(module, "", ids, set())
    return _records(module, ids, hints, sites)


def _name(module: GraphModule, prefix: str, ids: dict[Node, str], taken: set[str]) -> None:
    """Name the nodes of a graph, then those of the graphs that it calls."""
    for node in module.graph.nodes:
        source = mark_of(node).source if node.op == "call_function" else ""
        wishes = [source, f"{prefix}{node.name}", f"{prefix}{source}.{node.name}"]
        name = next(wish for wish in wishes if wish and wish not in taken)
        ids[node] = name
        taken.add(name)
    for node in module.graph.nodes:
        for kind, part in _parts(module, node):
            _name(part, f"{ids[node]}.{kind}.", ids, taken)


def _parts(module: GraphModule, node: Node) -> Iterator[tuple[str, GraphModule]]:
    """Yield the graphs that a node calls: ``body``, or ``primal`` and ``tangent``."""
    for read in node.all_input_nodes:
        if read.op == "get_attr" and node.op == "call_function":
            part = getattr(module, str(read.target), None)
            if isinstance(part, GraphModule):
                yield str(read.target).split("_")[0], part


def _records(
    module: GraphModule,
    ids: Mapping[Node, str],
    hints: dict[sympy.Symbol, int],
    sites: Mapping[str, str],
) -> list[dict[str, Any]]:
    found = []
    for node in [node for node in module.graph.nodes if node.op != "get_attr"]:
        parts = [part for _, part in _parts(module, node)]
        body = [record for part in parts for record in _records(part, ids, hints, sites)]
        record = _record(node, ids, hints, body)
        if record["kind"] == "site" and record["site"] is None:
            record["site"] = sites.get(origin_of(node).where)
        found.append({**record, "body": body} if body else record)
    return found


def _record(
    node: Node, ids: Mapping[Node, str], hints: dict[sympy.Symbol, int], body: list[dict[str, Any]]
) -> dict[str, Any]:
    origin = origin_of(node)
    path, line, code = place_of(origin.where)
    is_call = node.op == "call_function"
    cost = node_flops(node) if is_call else sympy.Integer(0)
    moved = node_bytes(node) if is_call else sympy.Integer(0)
    return {
        "id": ids[node],
        "name": node.name,
        "op": _operator(node),
        "kind": "site" if node.target in _DERIVATIVES else _KINDS.get(node.op, "call"),
        "role": origin.role,
        "module": origin.module,
        "tensor": "" if node.op == "output" else describe(value_of(node)),
        "flops": sum(inner["flops"] for inner in body) if body else evaluated(cost, hints),
        "flops_formula": str(cost) if cost != 0 else "",
        "bytes": sum(inner["bytes"] for inner in body) if body else evaluated(moved, hints),
        "where": f"{shown(path)}:{line}: {code}" if path else "",
        "path": shown(path) if path else "",
        "line": line,
        "site": origin.site or None,
        "stage": origin.stage,
        "inputs": [ids[read] for read in node.all_input_nodes if read.op != "get_attr"],
    }


def _operator(node: Node) -> str:
    if node.op in _KINDS:
        return _KINDS[node.op]
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))
