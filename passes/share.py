"""Merge equal computations of the flat graph, also across the marks of derivatives."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from passes.graph import arguments, drop_dead, finish, is_impure, needs, reaches, value_of
from passes.markers import GRADIENT, LEAF, POINT, STOP, TANGENT
from passes.order import sort_nodes
from passes.origin import note_new
from passes.simplify.aliases import merge_views
from passes.simplify.common import merge_common


def share(module: GraphModule, active: set[Node]) -> int:
    """Compute each value once: ``f(x) … f(point(x)) → one f(point(x))``.

    Equal expressions are one expression. Beyond that, a mark changes what derivatives see and not
    the value. So ``net(x)`` written beside ``net(x.detach().requires_grad_())`` is the same tensor,
    and using one for the other is exact for every gradient when

    - a ``leaf`` or ``stop`` that is looked through has an input that carries no gradient anyway,
    - no inner derivative at a point that either of the two depends on sees the exchanged use.

    Args:
        module: The flat graph; changed in place.
        active: Nodes that carry a gradient from outside (`nest.active_nodes`).

    Returns:
        How many nodes were merged.
    """
    total = 0
    while merged := _one_round(module.graph, active):
        total += merged
    note_new(module, "share", "share.")
    finish(module)
    return total


def _one_round(graph: Graph, active: set[Node]) -> int:
    drop_dead(graph)
    merged = _merge_expressions(graph)
    merged += _merge_points(graph)
    merged += _merge_values(graph, active)
    sort_nodes(graph)
    drop_dead(graph)
    merged += _merge_gradients(graph)
    if merged:
        sort_nodes(graph)
        drop_dead(graph)
    return merged


# Two marks on one tensor are two variables.
_VARIABLES = (LEAF, POINT)
_DERIVATIVES = (GRADIENT, TANGENT)


def _merge_expressions(graph: Graph) -> int:
    """Merge nodes that call the same operator on the same nodes, and views of views.

    A node that a derivative is taken at is a variable to it: an equal expression is a constant.
    """
    marks = [node for node in graph.nodes if node.target in _DERIVATIVES]
    variables = {node for node in graph.nodes if node.target in _VARIABLES}
    variables = variables.union(*(arguments(mark)[1] for mark in marks))
    return merge_views(graph, variables) + merge_common(graph, variables)


def _looked_through(node: Node, active: set[Node]) -> bool:
    if node.target is POINT:
        return True
    return node.target in (LEAF, STOP) and arguments(node)[0] not in active


def _seen_by(graph: Graph) -> dict[Node, set[Node]]:
    """Return for each point the nodes that a derivative at that point differentiates through."""
    seen: dict[Node, set[Node]] = {}
    for mark in [node for node in graph.nodes if node.target in _DERIVATIVES]:
        through = needs(arguments(mark)[0]) | {mark}
        for point in arguments(mark)[1]:
            seen.setdefault(point, set()).update(through)
    return seen


def _merge_points(graph: Graph) -> int:
    """Make one point of two marks on the same tensor that no derivative tells apart."""
    merged = 0
    first: dict[tuple[Any, Any], Node] = {}
    for mark in [node for node in graph.nodes if node.target in _VARIABLES]:
        kept = first.setdefault((mark.target, mark.args[0]), mark)
        if kept is mark:
            continue
        seen = _seen_by(graph)
        if mark in seen.get(kept, ()) or kept in seen.get(mark, ()):
            continue
        mark.replace_all_uses_with(kept)
        merged += 1
    return merged


class _Dependence:
    """Which points each node depends on, as derivatives see it; kept up as nodes are merged."""

    def __init__(self, points: set[Node]) -> None:
        self.points = points
        self.of: dict[Node, frozenset[Node]] = {}

    def visit(self, node: Node) -> None:
        found: set[Node] = {node} & self.points
        if node.target not in (STOP, LEAF):
            found.update(*(self.of.get(read, ()) for read in node.all_input_nodes))
        self.of[node] = frozenset(found)

    def revisit(self, nodes: list[Node]) -> None:
        """Compute anew what depends on ``nodes``, as far as it was visited."""
        behind = reaches(nodes) & self.of.keys()
        for node in [n for n in self.of if n in behind]:
            self.visit(node)


def _merge_values(graph: Graph, active: set[Node]) -> int:
    seen = _seen_by(graph)
    dependence = _Dependence(set(seen))
    interned: dict[_Interned, _Interned] = {}
    number: dict[Node, Any] = {}
    classes: dict[Any, list[Node]] = {}
    merged = 0

    def is_unseen(node: Node, other: Node) -> bool:
        concerned = dependence.of[node] | dependence.of[other]
        return bool(node.users) and all(not (seen[p] & set(node.users)) for p in concerned)

    for node in list(graph.nodes):
        dependence.visit(node)
        if is_impure(node) or node.target in _DERIVATIVES:
            number[node] = node
            continue
        if _looked_through(node, active):
            number[node] = number[arguments(node)[0]]
            continue
        key = _key(node, number)
        number[node] = key = interned.setdefault(key, key)
        equals = classes.setdefault(key, [])
        for other in equals:
            if is_unseen(node, other):
                node.replace_all_uses_with(other)
                merged += 1
                break
            # The other way round: the earlier one's uses may be free to take this one's place.
            if is_unseen(other, node):
                users = list(other.users)
                other.replace_all_uses_with(node)
                dependence.revisit(users)
                merged += 1
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
