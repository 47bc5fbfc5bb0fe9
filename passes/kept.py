"""What a graph keeps in memory."""

from __future__ import annotations

import sympy
from torch.fx import GraphModule, Node

from passes.bytes import bytes_made, memory_owners

# Bytes as a polynomial: product of sizes → coefficient. Adding two is cheaper than in sympy, and
# whether one is the larger at all sizes can be read off.
_Terms = dict[sympy.Expr, sympy.Expr | int]


def bytes_kept(module: GraphModule) -> sympy.Expr:
    """Return the most bytes that computed values fill at one moment.

    The graph runs in its own order and every value is freed after its last use. Inputs do not
    count; a view keeps the memory that it looks at. Where it depends on the sizes which moment that
    is, the result is a ``Max``.

    Args:
        module: A functional ATen graph.
    """
    nodes = list(module.graph.nodes)
    owner = memory_owners(module)
    last: dict[Node, int] = {}
    for index, node in enumerate(nodes):
        for read in (node, *node.all_input_nodes):
            last[owner[read]] = index
    dying: dict[int, list[Node]] = {}
    for node, index in last.items():
        dying.setdefault(index, []).append(node)
    size: dict[Node, _Terms] = {}
    kept: _Terms = {}
    peaks: list[_Terms] = []
    known: dict[sympy.Expr, _Terms] = {}
    for index, node in enumerate(nodes):
        if node.op == "call_function" and owner[node] is node:
            made = bytes_made(node)
            size[node] = known.setdefault(made, _terms(made))
            _add(kept, size[node], 1)
        freed = [size[dead] for dead in dying.get(index, ()) if dead in size]
        if freed or index == len(nodes) - 1:
            _keep_largest(peaks, kept)
        for terms in freed:
            _add(kept, terms, -1)
    found = [sum((c * m for m, c in peak.items()), start=sympy.Integer(0)) for peak in peaks]
    # Sympy's own comparison of long expressions takes longer than the rest.
    return found[0] if len(found) == 1 else sympy.Max(*found, evaluate=False)


def _terms(expression: sympy.Expr) -> _Terms:
    if expression.is_Integer:
        return {sympy.Integer(1): int(expression)}
    return dict(expression.expand().as_coefficients_dict())


def _add(total: _Terms, terms: _Terms, sign: int) -> None:
    for term, coefficient in terms.items():
        total[term] = total.get(term, 0) + sign * coefficient


def _keep_largest(peaks: list[_Terms], new: _Terms) -> None:
    """Add a sum to those that no other exceeds at all sizes; sizes and their products are not
    negative."""
    if any(_is_at_most(new, peak) for peak in peaks):
        return
    peaks[:] = [peak for peak in peaks if not _is_at_most(peak, new)]
    peaks.append(dict(new))


def _is_at_most(one: _Terms, other: _Terms) -> bool:
    return all(one.get(term, 0) <= other.get(term, 0) for term in {*one, *other})
