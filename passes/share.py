"""Merge equal computations of the flat graph, also across the marks of derivatives."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from passes.graph import arguments, drop_dead, finish, is_impure, needs, reaches, value_of
from passes.markers import GRADIENT, LEAF, POINT, STOP, TANGENT
from passes.order import sort_nodes


def share(module: GraphModule, active: set[Node]) -> int:
    """Compute each value once: ``f(x) … f(point(x)) → one f(point(x))``.

    A mark changes what derivatives see, not the value. So ``net(x)`` written beside
    ``net(x.detach().requires_grad_())`` is the same tensor, and using one for the other is exact
    for every gradient when

    - a ``leaf`` or ``stop`` that is looked through has an input that carries no gradient anyway,
      and
    - no inner derivative taken at a point that only one of the two depends on sees the exchanged
      use.

    Args:
        module: The flat graph; changed in place.
        active: Nodes that carry a gradient from outside (`nest.active_nodes`).

    Returns:
        How many nodes were merged.
    """
    graph = module.graph
    merged = _merge_points(graph, active) + _merge_values(graph, active)
    merged += _merge_gradients(graph)
    if merged:
        sort_nodes(graph)
        drop_dead(graph)
        finish(module)
    return merged


def _looked_through(node: Node, active: set[Node]) -> bool:
    if node.target is POINT:
        return True
    return node.target in (LEAF, STOP) and arguments(node)[0] not in active


def _seen_by(graph: Graph) -> dict[Node, set[Node]]:
    """Return for each point the nodes that a derivative at that point differentiates through."""
    seen: dict[Node, set[Node]] = {}
    for mark in [node for node in graph.nodes if node.target in (GRADIENT, TANGENT)]:
        through = needs(arguments(mark)[0]) | {mark}
        for point in arguments(mark)[1]:
            seen.setdefault(point, set()).update(through)
    return seen


def _merge_points(graph: Graph, active: set[Node]) -> int:
    """Make one point of two marks on the same tensor that no derivative tells apart."""
    merged = 0
    first: dict[tuple[Any, Any], Node] = {}
    for mark in [node for node in graph.nodes if node.target in (LEAF, POINT)]:
        kept = first.setdefault((mark.target, arguments(mark)[0]), mark)
        if kept is mark:
            continue
        seen = _seen_by(graph)
        if mark in seen.get(kept, ()) or kept in seen.get(mark, ()):
            continue
        mark.replace_all_uses_with(kept)
        merged += 1
    return merged


def _merge_values(graph: Graph, active: set[Node]) -> int:
    seen = _seen_by(graph)
    points_of = {point: reaches([point]) for point in seen}
    interned: dict[_Interned, _Interned] = {}
    number: dict[Node, Any] = {}
    classes: dict[Any, list[Node]] = {}
    merged = 0
    for node in graph.nodes:
        if is_impure(node):
            number[node] = node
            continue
        if _looked_through(node, active):
            number[node] = number[arguments(node)[0]]
            continue
        key = _key(node, number)
        number[node] = key = interned.setdefault(key, key)
        equals = classes.setdefault(key, [])
        for other in equals:
            differing = [p for p, after in points_of.items() if (node in after) != (other in after)]
            unseen = all(not (seen[p] & set(node.users)) for p in differing)
            if unseen and node.users:
                node.replace_all_uses_with(other)
                merged += 1
                break
            # The other way round: the earlier one's uses may be free to take this one's place.
            unseen = all(not (seen[p] & set(other.users)) for p in differing)
            if unseen and other.users and differing:
                other.replace_all_uses_with(node)
                merged += 1
                equals.remove(other)
                equals.append(node)
                break
        else:
            equals.append(node)
    return merged


def _key(node: Node, number: dict[Node, Any]) -> Any:
    """Return what makes two nodes compute the same value; hashing makes deep expressions cheap to
    compare."""
    flat, spec = pytree.tree_flatten((arguments(node), node.kwargs))
    items = tuple(
        ("node", number[item]) if isinstance(item, Node) else (type(item).__name__, repr(item))
        for item in flat
    )
    return _Interned((node.op, str(node.target), items, str(spec)))


class _Interned:
    """A key that compares by content and hashes once."""

    __slots__ = ("content", "hashed")

    def __init__(self, content: Any) -> None:
        self.content = content
        self.hashed = hash(content)

    def __hash__(self) -> int:
        return self.hashed

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, _Interned)
            and self.hashed == other.hashed
            and self.content == other.content
        )


def _merge_gradients(graph: Graph) -> int:
    """``gradient(u, x), gradient(u, t) → gradient(u, (x, t))``: one pass back serves every point it
    comes by."""
    merged = 0
    groups: dict[Any, list[Node]] = {}
    for mark in graph.find_nodes(op="call_function", target=GRADIENT):
        outputs, _, seeds, seed_dims = arguments(mark)
        groups.setdefault((tuple(outputs), tuple(seeds), seed_dims), []).append(mark)
    for marks in groups.values():
        points = list(dict.fromkeys(point for mark in marks for point in arguments(mark)[1]))
        independent = not any(set(points) & (reaches([point]) - {point}) for point in points)
        if len(marks) == 1 or not independent:
            continue
        outputs, _, seeds, seed_dims = arguments(marks[0])
        with graph.inserting_before(marks[0]):
            union = graph.call_function(GRADIENT, (outputs, points, seeds, seed_dims))
            values = {
                p: v for m in marks for p, v in zip(arguments(m)[1], value_of(m), strict=True)
            }
            union.meta = {**marks[0].meta, "val": [values[point] for point in points]}
        for mark in marks:
            for item in list(mark.users):
                assert item.target is operator.getitem, f"{item} reads the mark {mark} whole"
                item.args = (union, points.index(arguments(mark)[1][arguments(item)[1]]))
            graph.erase_node(mark)
        merged += len(marks) - 1
    return merged
