"""What the page draws, made from a report's record: graphs with their groups, and who computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewriter.page.edges import edges_by_level
from rewriter.page.groups import Group, Key, group
from rewriter.page.looks import look_of, looks
from rewriter.page.words import shortened, si

Node = dict[str, Any]

MOST_OPEN = 30
"""As many boxes are drawn before anybody opens or closes one."""


def make_view(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return each stage of a report's record, ready to be drawn.

    Nodes that several stages have in common are kept once, in ``pool``; a stage has their numbers.
    """
    pool: list[Node] = []
    known: dict[str, int] = {}
    stages = []
    for stage in record["stages"]:
        graph = make_graph(stage, record["inputs"])
        numbers = []
        for node in graph["nodes"]:
            text = repr(node)
            if text not in known:
                known[text] = len(pool)
                pool.append(node)
            numbers.append(known[text])
        about = {name: value for name, value in stage.items() if name != "nodes"}
        stages.append({**about, **graph, "nodes": numbers})
    return {"stages": stages, "pool": pool, "looks": looks()}


def make_graph(stage: Mapping[str, Any], inputs: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return a stage's nodes, those of bodies too, its groups and edges, and what starts open.

    Args:
        stage: A stage of a report's record.
        inputs: The record's inputs: what the user calls the first inputs of the graph.
    """
    nodes: list[Node] = []
    keys: list[list[Key]] = []
    names = iter(inputs)
    for node in stage["nodes"]:
        named = next(names, None) if node["kind"] == "input" else None
        title = named["name"] if named else _title(node)
        _add({**node, "title": shortened(title)}, "", [], nodes, keys)
    innermost, groups = _renamed(*group(nodes, keys))
    for node, name in zip(nodes, innermost, strict=True):
        node["group"] = name
    return {
        "nodes": nodes,
        "groups": _facts(nodes, groups),
        "edges": edges_by_level(nodes, groups),
        "open": _opened(innermost, groups),
    }


def _title(node: Node) -> str:
    return node["op"].removeprefix("aten.") if node["kind"] == "call" else node["id"]


def _renamed(
    innermost: Sequence[str], groups: Mapping[str, Group]
) -> tuple[list[str], dict[str, Group]]:
    """Give groups short names that no node can have."""
    names = {"": ""} | {name: f"group {number}" for number, name in enumerate(groups)}
    return [names[name] for name in innermost], {
        names[one.name]: replace(one, name=names[one.name], parent=names[one.parent])
        for one in groups.values()
    }


def _add(
    node: Node, prefix: str, around: list[Key], nodes: list[dict[str, Any]], keys: list[list[Key]]
) -> None:
    """Append a node and, before it, the nodes of its body."""
    body = node.get("body") or []
    inside = [*around, Key("", "site", f"{prefix}{node['id']}")] if body else around
    for inner in body:
        _add(inner, f"{prefix}{node['id']}/", inside, nodes, keys)
    flat = {name: value for name, value in node.items() if name != "body"}
    flat["id"] = prefix + node["id"]
    flat["inputs"] = [prefix + name for name in dict.fromkeys(node["inputs"])]
    flat["inputs"] += [nodes[-1]["id"]] if body else []  # a site is what its body puts out
    flat["title"] = node.get("title") or shortened(_title(node))
    flat["about"] = shortened(node["tensor"])
    flat["look"] = look_of(node)
    nodes.append(flat)
    keys.append([*inside, *_keys(node)])


def _keys(node: Node) -> list[Key]:
    """Return what a node may be grouped by: its module path, or else its source line."""
    if node["kind"] == "site":
        return []
    if node["kind"] == "input":
        return [Key("", "input", "inputs")]
    look = look_of(node)
    if node["module"]:
        parts = node["module"].split(".")
        return [Key("", look, ".".join(parts[: n + 1])) for n in range(len(parts))]
    return [Key("", look, f"line {node['line']}")] if node["line"] else []


def _facts(nodes: Sequence[Node], groups: Mapping[str, Group]) -> dict[str, dict[str, Any]]:
    """Return what a drawing says about each group, by name."""
    counts, flops = dict.fromkeys(groups, 0), dict.fromkeys(groups, 0)
    for node in nodes:
        name = node["group"]
        while name:
            counts[name] += 1
            flops[name] += node["flops"]
            name = groups[name].parent
    return {
        name: {
            "label": one.label,
            "title": shortened(one.label),
            "about": f"{counts[name]} nodes" + (f" · {si(flops[name])}FLOP" if flops[name] else ""),
            "look": one.look,
            "parent": one.parent,
            "count": counts[name],
            "flops": flops[name],
        }
        for name, one in groups.items()
    }


def _opened(innermost: Sequence[str], groups: Mapping[str, Group]) -> list[str]:
    """Return the groups to open at first: outer ones before inner ones, as many as are readable."""
    members: dict[str, int] = {}
    for name in [*innermost, *(one.parent for one in groups.values())]:
        members[name] = members.get(name, 0) + 1
    shown, opened = members.get("", 0), []
    for one in sorted(groups.values(), key=lambda one: _depth(one, groups)):
        hidden = one.parent and one.parent not in opened
        if hidden or one.look in ("input", "site") or shown + members[one.name] > MOST_OPEN:
            continue
        shown += members[one.name]
        opened.append(one.name)
    return opened


def _depth(one: Group, groups: Mapping[str, Group]) -> int:
    return 1 + _depth(groups[one.parent], groups) if one.parent else 0
