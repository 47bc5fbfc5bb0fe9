"""Add before a linear operator, not after it.

    op(x) + op(y) + … = op(x + y + …)

for an operator that is linear in one argument while all others are equal. A network that several
derivatives are taken of is pulled back once for each of them, and the results are added; going back
from the last sum, all these passes become one:

    mm(t ⊙ mm(a, V), W) + mm(t ⊙ mm(b, V), W) → mm(t ⊙ mm(a + b, V), W)

Products are fewer and nothing is computed that was not there before, except for operators that make
their argument smaller: those wait until some other operator needs the same sum.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.graph import arguments, elements, same_layout, value_of
from passes.simplify.emit import call
from passes.tangent_tables import BILINEAR, LINEAR

aten = torch.ops.aten

# These read a layout, or have another rule below.
_NOT_HERE = {
    aten.as_strided.default, aten.constant_pad_nd.default, aten.neg.default, aten.alias.default,
    aten.detach.default, aten.lift_fresh_copy.default,
}  # fmt: skip
_SUMMED = {op for op, positions in LINEAR.items() if positions == (0,)} - _NOT_HERE
_SUMS: dict[Any, int] = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
# Half the range of float16 is too little for a sum that was not written.
_TYPES = (torch.float32, torch.float64, torch.bfloat16)

Term = tuple[Node, int]  # a node and its sign


@dataclass(frozen=True)
class _Reading:
    """One way to see a node as an operator that is linear in some of its arguments.

    Attributes:
        key: Equal for two nodes only if they differ in these arguments alone.
        moved: The arguments.
        call: The node that calls the operator; it is not the node itself where that takes one
            result of several.
        positions: Where the arguments stand in the call.
    """

    key: Any
    moved: tuple[Node, ...]
    call: Node
    positions: tuple[int, ...]


def gather_sums(graph: Graph) -> int:
    """Add before linear operators: ``op(x, a) + op(y, a) → op(x + y, a)``."""
    return _Gathering(graph).run()


class _Gathering:
    """One walk over a graph, from its end to its start: when a sum is met, everything that reads
    its terms from further on has been seen."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.cursor = graph.output_node()
        self.sums: dict[tuple[Term, ...], Node] = {}
        self.waiting: dict[tuple[Term, ...], list[Node]] = {}
        self.changes = 0

    def run(self) -> int:
        while self.cursor.op != "root":
            node, self.cursor = self.cursor, self.cursor.prev
            if _is_sum(node) and not _is_inside_a_sum(node):
                self._gather(node)
        return self.changes

    def _gather(self, root: Node) -> None:
        """Rewrite one sum."""
        before = self.changes
        terms = list(_terms(root))
        while (group := self._group(root, terms)) is not None:
            terms = self._merged(root, terms, group)
            self.changes += 1
        if self.changes == before:
            return
        with self.graph.inserting_before(root):
            total = self._total(terms, root)
        total.meta = {**root.meta, "val": value_of(total)}
        root.replace_all_uses_with(total)
        self._drop(root)

    def _group(self, root: Node, terms: list[Term]) -> list[tuple[Term, _Reading]] | None:
        """Return the largest group of terms that are one operator on different arguments."""
        groups: dict[Any, list[tuple[Term, _Reading]]] = {}
        counts = Counter(node for node, _ in terms)
        for node, sign in terms:
            if counts[node] == 1 and len(node.users) == 1:
                for key, reading in {r.key: r for r in _readings(node)}.items():  # x·x is one
                    groups.setdefault(key, []).append(((node, sign), reading))
        for group in sorted(groups.values(), key=len, reverse=True):
            if len(group) < 2:
                return None
            if self._pays(root, group):
                return group
        return None

    def _pays(self, root: Node, group: list[tuple[Term, _Reading]]) -> bool:
        """Whether the arguments may be added, and some other operator needs their sum too if they
        are larger than the result."""
        first = group[0][1]
        x, *others = first.moved
        same = [same_layout(value_of(a), value_of(b)) for _, r in group
                for a, b in zip(r.moved, first.moved, strict=True)]  # fmt: skip
        value = value_of(root)
        if not all(same) or any(value_of(y).dtype != value.dtype for y in first.moved):
            return False
        if others and len({sign for (_, sign), _ in group}) > 1:
            return False
        if first.call.target not in _SUMMED or elements(value_of(x)) <= elements(value):
            return True
        key = _signed([(r.moved[0], sign) for (_, sign), r in group])[0]
        if key in self.sums and self.sums[key] < root:
            return True
        self.waiting.setdefault(key, []).append(root)
        return False

    def _merged(
        self, root: Node, terms: list[Term], group: list[tuple[Term, _Reading]]
    ) -> list[Term]:
        """Replace the terms of a group by one."""
        reading, taken = group[0][1], {node for (node, _), _ in group}
        args, outer = list(reading.call.args), 1
        for i, position in enumerate(reading.positions):
            key, outer = _signed([(r.moved[i], sign) for (_, sign), r in group])
            args[position] = self._sum(key)
        with self.graph.inserting_before(root):
            made = call(self.graph, reading.call.target, args, reading.call.kwargs, reading.call)
            if reading.call is not group[0][0][0]:
                item = group[0][0][0]
                made = call(self.graph, operator.getitem, [made, item.args[1]], {}, item)
        return [*(term for term in terms if term[0] not in taken), (made, outer)]

    def _sum(self, key: tuple[Term, ...]) -> Node:
        """Return the sum of some nodes; it stands right behind the last of them."""
        if key not in self.sums:
            last = max(node for node, _ in key)
            with self.graph.inserting_before(last.next):
                self.sums[key] = self._total(list(key), last)
            for root in self.waiting.pop(key, ()):
                if root.users:
                    self._gather(root)
        return self.sums[key]

    def _total(self, terms: list[Term], like: Node) -> Node:
        terms = sorted(terms, key=lambda term: -term[1])
        (total, sign), *rest = terms
        if sign < 0:
            total = call(self.graph, aten.neg.default, [total], {}, like)
        for node, sign in rest:
            target = aten.add.Tensor if sign > 0 else aten.sub.Tensor
            total = call(self.graph, target, [total, node], {}, like)
        return total

    def _drop(self, node: Node) -> None:
        """Erase a node without users, and what only it has read: what is read further back is
        known by its users."""
        stack, erased = [node], set[Node]()
        while stack:
            node = stack.pop()
            if node.users or node.op != "call_function" or node in erased:
                continue
            erased.add(node)
            if node is self.cursor:
                self.cursor = node.prev
            read = list(node.all_input_nodes)
            self.graph.erase_node(node)
            stack.extend(read)


def _is_sum(node: Any) -> bool:
    """Whether this is a plain sum or difference of two tensors that look like it."""
    if not isinstance(node, Node) or node.target not in _SUMS or node.kwargs or not node.users:
        return False
    value, operands = value_of(node), [value_of(x) for x in node.args if isinstance(x, Node)]
    if len(operands) != 2 or not isinstance(value, Tensor) or value.dtype not in _TYPES:
        return False
    return all(isinstance(x, Tensor) and same_layout(x, value) for x in operands)


def _is_inside_a_sum(node: Node) -> bool:
    user = next(iter(node.users))
    if user.target is aten.neg.default and len(node.users) == len(user.users) == 1:
        user = next(iter(user.users))
    return len(node.users) == 1 and _is_sum(user) and user.args[0] is not user.args[1]


def _terms(root: Node) -> Iterator[Term]:
    """Yield the terms of a sum of sums, from left to right."""
    stack: list[Term] = [(root, 1)]
    while stack:
        node, sign = stack.pop()
        own = node is root or len(node.users) == 1
        if own and _is_sum(node) and node.args[0] is not node.args[1]:
            left, right = arguments(node)
            stack += [(right, sign * _SUMS[node.target]), (left, sign)]
        elif own and node.target is aten.neg.default:
            stack.append((arguments(node)[0], -sign))
        else:
            yield node, sign


def _signed(terms: list[Term]) -> tuple[tuple[Term, ...], int]:
    """Put terms in order and let the first be positive; return the sign that this takes."""
    terms = sorted(terms, key=lambda term: term[0])
    outer = terms[0][1]
    return tuple((node, sign * outer) for node, sign in terms), outer


def _readings(node: Node) -> Iterator[_Reading]:
    """Yield the ways to see a node as a linear operator on one of its arguments."""
    target: Any = node.target
    args = arguments(node)
    if target in _SUMMED or target is aten.div.Tensor or target is aten.div.Scalar:
        yield from _reading(node, (0,))
    elif target is aten.where.self:
        yield from _reading(node, (1, 2))
    elif target in BILINEAR:
        for position in BILINEAR[target]:
            yield from _reading(node, (position,), commutes=target is aten.mul.Tensor)
    elif target is aten.convolution.default and args[2] is None:
        yield from _reading(node, (0,))
        yield from _reading(node, (1,))
    elif target is operator.getitem:
        yield from _of_pullback(node)


def _of_pullback(node: Node) -> Iterator[_Reading]:
    """Read one result of a `convolution_backward` that computes no other: the input's gradient is
    linear in cotangent and weight, the weight's in cotangent and input."""
    call, index = arguments(node)
    if call.target is not aten.convolution_backward.default or len(call.users) > 1:
        return
    only = [i == index for i in range(3)]
    if index == 2 or list(arguments(call)[10]) != only:
        return
    unread = 1 if index == 0 else 2
    for position in (0, 3 - unread):
        for reading in _reading(call, (position,), unread=unread):
            yield _Reading((index, reading.key), reading.moved, call, reading.positions)


def _reading(
    node: Node, positions: tuple[int, ...], *, commutes: bool = False, unread: int | None = None
) -> Iterator[_Reading]:
    args = list(node.args)
    moved = [x for x in map(args.__getitem__, positions) if isinstance(x, Node)]
    if len(moved) < len(positions) or not all(isinstance(value_of(x), Tensor) for x in moved):
        return
    for position in positions:
        args[position] = None
    if unread is not None:
        shape = value_of(args[unread]).shape
        args[unread] = tuple(map(str, shape))
    if commutes:
        args = [x for x in args if x is not None]
    flat, spec = pytree.tree_flatten((args, node.kwargs))
    items = tuple(x if isinstance(x, Node) else (type(x).__name__, repr(x)) for x in flat)
    where = () if commutes else positions
    yield _Reading((node.target, where, items, str(spec)), tuple(moved), node, positions)
