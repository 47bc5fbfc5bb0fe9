"""Put the nodes of a graph into groups that can be drawn as one: by role, then by module path.

The primal, tangent, cotangent and gradient passes of one module lie at different places of the data
flow. A group that held them all would be a knot of edges in both directions, so a group is one
module *in one pass*; where a pass comes back to a module that it has left, a new group starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST, MOST = 3, 48
"""A group with fewer members is not worth a box; the members of one with more are drawn in runs."""


@dataclass(frozen=True)
class Group:
    """Nodes that can be drawn as one.

    Attributes:
        name: Unique in its graph.
        label: What to call it: a module path, a source line, or the numbers of a run.
        look: The look of its members (a key of `rewriter.page.looks.LOOKS`).
        parent: The name of the group around it; "" for none.
    """

    name: str
    label: str
    look: str
    parent: str


@dataclass(frozen=True)
class Key:
    """What nodes have in common that may share a group."""

    parent: str
    look: str
    label: str


def group(
    nodes: Sequence[Mapping[str, Any]], keys: Sequence[Sequence[Key]]
) -> tuple[list[str], dict[str, Group]]:
    """Return the innermost group of each node ("" for none), and the groups, outer ones first.

    Args:
        nodes: Nodes of a graph, in topological order (a report's ``NODE`` records).
        keys: For each node what it may be grouped by, outermost first.
    """
    place = {node["id"]: index for index, node in enumerate(nodes)}
    inputs = [[place[name] for name in node["inputs"] if name in place] for node in nodes]
    paths: list[list[Group]] = [[] for _ in nodes]
    for depth in range(max(map(len, keys), default=0)):
        own = [
            Key(path[-1].name if path else "", key[depth].look, key[depth].label)
            if len(key) > depth
            else None
            for path, key in zip(paths, keys, strict=True)
        ]
        for path, key, visit in zip(paths, own, _visits(own, inputs), strict=True):
            if key is not None:
                name = f"{key.parent}/{key.look}:{key.label}" + (f"#{visit}" if visit else "")
                path.append(Group(name, key.label, key.look, key.parent))
    labels = [key[-1].label if key else node["id"] for key, node in zip(keys, nodes, strict=True)]
    paths = _in_runs(_without_small(paths), labels)
    return (
        [path[-1].name if path else "" for path in paths],
        {group.name: group for path in paths for group in path},
    )


def _visits(keys: Sequence[Key | None], inputs: Sequence[Sequence[int]]) -> list[int]:
    """Return for each node how often the data flow has left its key before and come back."""
    visits: list[int] = []
    # For each node and key: the visit on which a later node with that key is, at the least.
    coming: list[dict[Key, int]] = []
    for key, own in zip(keys, inputs, strict=True):
        reached: dict[Key, int] = {}
        for source in own:
            for other, visit in coming[source].items():
                reached[other] = max(visit, reached.get(other, 0))
            left = keys[source]
            if left is not None:
                visit = visits[source] + (left != key)
                reached[left] = max(visit, reached.get(left, 0))
        visits.append(0 if key is None else reached.get(key, 0))
        coming.append(reached)
    return visits


def _without_small(paths: Sequence[list[Group]]) -> list[list[Group]]:
    """Leave out groups with few members, and those that hold nothing but one other group."""
    sizes: dict[str, int] = {}
    inner: dict[str, set[str]] = {}
    for path in paths:
        for depth, one in enumerate(path):
            sizes[one.name] = sizes.get(one.name, 0) + 1
            below = path[depth + 1].name if len(path) > depth + 1 else ""
            inner.setdefault(one.name, set()).add(below)
    kept = {
        name
        for name, size in sizes.items()
        if size >= FEWEST and (len(inner[name]) > 1 or inner[name] == {""})
    }
    return [_chained([one for one in path if one.name in kept]) for path in paths]


def _in_runs(paths: list[list[Group]], labels: Sequence[str]) -> list[list[Group]]:
    """Divide what has more than `MOST` members into runs of neighbours, at every depth."""
    depth = 0
    while any(len(path) >= depth for path in paths):
        members: dict[str, dict[str, str]] = {}  # for each group: its members and their labels
        for index, path in enumerate(paths):
            if len(path) >= depth:
                label = path[depth].label if len(path) > depth else labels[index]
                own = members.setdefault(_outer(path, depth), {})
                own.setdefault(_member(index, path, depth), label)
        for index, path in enumerate(paths):
            own = members[_outer(path, depth)] if len(path) >= depth else {}
            if len(own) <= MOST:
                continue
            size = max(MOST // 2, -(-len(own) // MOST))
            start = list(own).index(_member(index, path, depth)) // size * size
            run = list(own.values())[start : start + size]
            look = path[depth - 1].look if depth else path[depth].look if path else "primal"
            name = f"{_outer(path, depth)}/{start}"
            made = Group(name, f"{run[0]} … {run[-1]}", look, _outer(path, depth))
            paths[index] = _chained([*path[:depth], made, *path[depth:]])
        depth += 1
    return paths


def _outer(path: Sequence[Group], depth: int) -> str:
    return path[depth - 1].name if depth else ""


def _member(index: int, path: Sequence[Group], depth: int) -> str:
    return path[depth].name if len(path) > depth else f"node {index}"


def _chained(path: Sequence[Group]) -> list[Group]:
    """Return groups of one path, each with the one before it as its parent."""
    found: list[Group] = []
    for one in path:
        parent = found[-1].name if found else ""
        found.append(Group(one.name, one.label, one.look, parent))
    return found
