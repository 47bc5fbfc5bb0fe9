"""Write a sum of products down as operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.contraction.terms import Index
from passes.graph import are_equal, elements, hint, value_of
from passes.simplify.emit import call, size_of
from passes.simplify.factors import convolutions
from passes.simplify.factors.operators import finishing
from passes.simplify.factors.order import Step, cheapest, key_of
from passes.simplify.factors.tables import LOOK_UPS, put_back, without_ones
from passes.simplify.factors.terms import Dim, Expression, NotAProduct, Place, Term, size_of_dim

aten = torch.ops.aten

Part = tuple[Node, Dim]  # a tensor and the index of each of its dimensions


class Lowering:
    """Adds operators to a graph; one that it has added before is used again.

    Attributes:
        made: What was added.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: list[Node] = []
        self._known: dict[Any, Node] = {}
        self._steps: dict[Any, tuple[Node, tuple[int, ...]]] = {}

    def lower(self, expression: Expression, root: Node) -> Node:
        """Add what computes an expression, in front of the node that it stands for.

        Raises:
            NotAProduct: It is a concatenation of parts that do not make a whole.
        """
        with self.graph.inserting_before(root):
            held = {index for term in expression.terms for index, _ in term.places}
            total = self._pieces(expression, root) if held else self._sum(expression, root)
            for target, rest in finishing(root):
                total = self._call(target, (total, *rest), root)
            return self._laid_out(total, root)

    def drop(self) -> None:
        """Take away everything that was added."""
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()

    def _call(self, target: Any, args: Any, root: Node, options: Any = None) -> Node:
        key = (target, str(args))
        if key not in self._known:
            self._known[key] = call(self.graph, target, args, options or {}, root)
            self.made.append(self._known[key])
        return self._known[key]

    def _pieces(self, expression: Expression, root: Node) -> Node:
        """Concatenate what there is for each part of a dimension."""
        held = {index for term in expression.terms for index, _ in term.places}
        if len(held) > 1 or any(len(term.places) != 1 for term in expression.terms):
            raise NotAProduct("a concatenation in two dimensions")
        (index,) = held
        if (index,) not in expression.dims:
            raise NotAProduct("a part of a concatenated dimension")
        at = expression.dims.index((index,))
        parts: dict[Place, list[Term]] = {}
        for term in expression.terms:
            parts.setdefault(term.places[0][1], []).append(Term(term.scale, term.factors))
        places = sorted(parts, key=lambda place: place.start)
        ends = [place.stop for place in places]
        if [0, *ends] != [*(place.start for place in places), index.size]:
            raise NotAProduct("parts of a concatenation that do not follow on each other")
        pieces = []
        for place in places:
            dims = (*expression.dims[:at], place.dim, *expression.dims[at + 1 :])
            pieces.append(self._sum(Expression(dims, tuple(parts[place])), root))
        return self._call(aten.cat.default, (pieces, at), root)

    def _sum(self, expression: Expression, root: Node) -> Node:
        total: Node | None = None
        for term in expression.terms:
            part = self._term(term, expression.dims, root)
            if total is None:
                total = part
            else:
                total = self._call(aten.add.Tensor, (total, part), root)
        if total is None:
            raise NotAProduct("nothing is left of it")
        sizes = [size_of_dim(dim) for dim in expression.dims]
        if are_equal(sizes, value_of(total).shape):
            return total
        if not all(isinstance(size, int) for size in sizes):
            raise NotAProduct("what is repeated a symbolic number of times")
        return self._call(aten.expand.default, (total, tuple(sizes)), root)

    def _term(self, term: Term, dims: tuple[Dim, ...], root: Node) -> Node:
        """Contract one term; the result has every dimension, of size 1 where it is repeated."""
        wanted: Dim = sum(dims, ())

        def add(target: Any, args: Any, options: Any = None) -> Node:
            return self._call(target, args, root, options)

        term, table = without_ones(term, wanted, add)
        asked = [*wanted, *(table.indices if table else ())]
        node, have = self._step(cheapest(term.factors, asked, self._steps), root)
        if table:
            node, have = put_back(table, node, have, add)
        node = self._ordered((node, have), [i for i in wanted if i in have], root)
        if term.scale != 1:
            node = self._call(aten.mul.Tensor, (node, term.scale), root)
        sizes: list[Any] = []
        for dim in dims:
            missing = [i for i in dim if i not in have]
            if missing and len(missing) < len(dim):
                raise NotAProduct("a dimension that is repeated in part")
            sizes.append([] if missing else list(dim))
        return self._shaped(node, [i for i in wanted if i in have], sizes, root)

    def _step(self, step: Step, root: Node) -> Part:
        key, order = key_of(step)
        if key not in self._steps:
            node, have = self._contracted(step, root)
            self._steps[key] = node, tuple(order.index(index) for index in have)
        node, numbers = self._steps[key]
        return node, tuple(order[number] for number in numbers)

    def _contracted(self, step: Step, root: Node) -> Part:
        if not isinstance(step.parts, tuple):
            return self._factor(step, root)
        one, other = (self._step(part, root) for part in step.parts)
        gone = [i for i in one[1] if i in other[1] and i not in step.kept]
        batch = [i for i in one[1] if i in other[1] and i in step.kept]
        left = [i for i in one[1] if i not in other[1]]
        right = [i for i in other[1] if i not in one[1]]
        if gone and (left or right):
            return self._matrices(one, other, (batch, left, gone, right), root)
        every = [*batch, *left, *gone, *right]
        a, b = (self._spread(part, every, root) for part in (one, other))
        product = self._call(aten.mul.Tensor, (a, b), root)
        return self._total(product, every, gone, root)

    def _factor(self, step: Step, root: Node) -> Part:
        factor: Any = step.parts
        node, every = factor.node, list(factor.indices)
        if len(set(every)) < len(every):
            raise NotAProduct("a diagonal")
        if not are_equal([i.size for i in every], value_of(node).shape):
            sizes = tuple(self._size(i, factor.dims, node) for i in every)
            node = self._call(aten.reshape.default, (node, sizes), root)
        return self._total(node, every, [i for i in every if i not in step.kept], root)

    def _total(self, node: Node, every: Sequence[Index], gone: Sequence[Index], root: Node) -> Part:
        if gone:
            node = self._call(
                aten.sum.dim_IntList, (node, [every.index(index) for index in gone]), root
            )
        return node, tuple(i for i in every if i not in gone)

    def _matrices(self, one: Part, other: Part, groups: Any, root: Node) -> Part:
        """Multiply matrices: rows from the left, columns from the right, both for each of a
        batch."""
        batch, left, gone, right = groups
        a = self._ordered(one, [*batch, *left, *gone], root)
        b = self._ordered(other, [*batch, *gone, *right], root)
        grouped = [list(batch)] if batch else []
        a = self._shaped(a, [*batch, *left, *gone], [*grouped, left, gone], root)
        b = self._shaped(b, [*batch, *gone, *right], [*grouped, gone, right], root)
        product = self._call(aten.bmm.default if batch else aten.mm.default, (a, b), root)
        every = [*batch, *left, *right]
        sizes = [self._size_in(i, (one, other)) for i in every]
        if not are_equal([i.size for i in every], value_of(product).shape):
            product = self._call(aten.reshape.default, (product, tuple(sizes)), root)
        return product, tuple(every)

    def _ordered(self, part: Part, order: Sequence[Index], root: Node) -> Node:
        node, have = part
        dims = [have.index(index) for index in order]
        if dims == list(range(len(dims))):
            return node
        return self._call(aten.permute.default, (node, dims), root)

    def _spread(self, part: Part, every: Sequence[Index], root: Node) -> Node:
        """Give a tensor a dimension for each of some indices."""
        node = self._ordered(part, [i for i in every if i in part[1]], root)
        for at, index in enumerate(every):
            if index not in part[1]:
                node = self._call(aten.unsqueeze.default, (node, at), root)
        return node

    def _shaped(
        self, node: Node, have: Sequence[Index], groups: Sequence[Sequence[Index]], root: Node
    ) -> Node:
        """Put indices that stand next to each other together in dimensions."""
        sizes = [math.prod(i.size for i in group) for group in groups]
        if are_equal(sizes, value_of(node).shape):
            return node
        unknown = [at for at, size in enumerate(sizes) if not isinstance(size, int)]
        made: list[Any] = list(sizes)
        for at in unknown:
            if len(groups[at]) == 1:
                made[at] = self._size_of(node, list(have).index(groups[at][0]))
            elif len(unknown) == 1:
                made[at] = -1
            else:
                raise NotAProduct("two sizes that are products of symbols")
        return self._call(aten.reshape.default, (node, tuple(made)), root)

    def _size(self, index: Index, dims: Sequence[Dim], node: Node) -> Any:
        if isinstance(index.size, int):
            return index.size
        if (index,) not in dims:
            raise NotAProduct("a symbolic size inside of a dimension")
        return self._size_of(node, list(dims).index((index,)))

    def _size_in(self, index: Index, parts: Sequence[Part]) -> Any:
        if isinstance(index.size, int):
            return index.size
        node, have = next(part for part in parts if index in part[1])
        return self._size_of(node, have.index(index))

    def _size_of(self, node: Node, dim: int) -> Any:
        size = size_of(self.graph, node, dim)
        if isinstance(size, Node):
            self.made.append(size)
        return size

    def _laid_out(self, node: Node, root: Node) -> Node:
        """Return it with the memory layout of what it replaces: a view may rely on that."""
        value = value_of(root)
        assert are_equal(value_of(node).shape, value.shape), (value_of(node).shape, value.shape)
        if are_equal(value_of(node).stride(), value.stride()) or value.dim() == 0:
            return node
        order = sorted(range(value.dim()), key=lambda d: -hint(value.stride(d)))
        turned = self._call(aten.permute.default, (node, order), root)
        copied = call(
            self.graph,
            aten.clone.default,
            (turned,),
            {"memory_format": torch.contiguous_format},
            root,
        )
        self.made.append(copied)
        back = [order.index(d) for d in range(len(order))]
        return self._call(aten.permute.default, (copied, back), root)


def flops(node: Node) -> int:
    """Return the multiplications and additions of a matrix product or convolution; 0 for anything
    else."""
    if node.target not in _MATRICES:
        return convolutions.flops(node)
    return 2 * elements(value_of(node)) * hint(value_of(node.args[0]).shape[-1])


def work(node: Node) -> int:
    """Return the multiplications and additions of an operator and the elements that it writes."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return 0
    if flops(node):
        return flops(node) + elements(value)
    if node.target in _FOLDS:
        return max(elements(value), elements(value_of(node.args[0])))
    if node.target in _SUMS:
        return elements(value_of(node.args[0])) + elements(value)
    if node.target is aten.index_put.default:
        return elements(value) + 2 * elements(value_of(node.args[2]))
    return _PER_ELEMENT.get(node.target, 0) * elements(value)


_MATRICES = {aten.mm.default, aten.bmm.default}
_FOLDS = {aten.im2col.default, aten.col2im.default}
_SUMS = {aten.sum.dim_IntList, aten.sum.default, aten.linalg_vector_norm.default}
_PER_ELEMENT: dict[Any, int] = dict.fromkeys(
    [aten.eq.Tensor, aten._to_copy.default, *LOOK_UPS], 1
) | dict.fromkeys([
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor,
    aten.sub.Tensor, aten.neg.default, aten.pow.Tensor_Scalar, aten.where.self, aten.clone.default,
    aten.reciprocal.default, aten.cat.default,
], 2)  # fmt: skip
