"""Where each edge of a grouped graph is drawn.

An edge is drawn once: inside the innermost group that has both ends, between the two members of
that group that hold them. So a drawing has as many levels as the groups have, each of them is small
enough for a layout engine, and a group shows its own flow alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rewriter.page.groups import Group


def edges_by_level(
    nodes: Sequence[Mapping[str, Any]], groups: Mapping[str, Group]
) -> dict[str, list[tuple[str, str, int]]]:
    """Return for each group, "" for the whole graph, edges as (from, to, how many they stand for).

    Args:
        nodes: Nodes with ``id``, ``inputs`` and ``group``.
        groups: The groups by name.
    """
    paths = {node["id"]: ["", *_around(node["group"], groups), node["id"]] for node in nodes}
    levels: dict[str, Counter[tuple[str, str]]] = {}
    for node in nodes:
        for source in node["inputs"]:
            if source not in paths:
                continue
            a, b = paths[source], paths[node["id"]]
            depth = next(d for d, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            levels.setdefault(a[depth - 1], Counter())[a[depth], b[depth]] += 1
    return {
        name: [(source, target, count) for (source, target), count in edges.items()]
        for name, edges in levels.items()
    }


def _around(name: str, groups: Mapping[str, Group]) -> list[str]:
    """Return a group and those around it, outermost first."""
    return [*_around(groups[name].parent, groups), name] if name else []
