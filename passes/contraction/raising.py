"""Read a derivative graph as contractions of derivative tensors.

What of a body keeps the rows of its point apart is an operand ``f``; a derivative of what is linear
in operands is linear in operands of the next order. Views, sums and products with explicit tensors
only move indices.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes import derivative
from passes.contraction.constants import Constants, is_identity
from passes.contraction.first_order import cost
from passes.contraction.moves import MOVES, Move
from passes.contraction.picking import pick
from passes.contraction.rows import Rows, RowsMix
from passes.contraction.terms import Base, Computed, Expression, Factor, Index, Term, code_of
from passes.graph import (
    arguments,
    has_hints,
    is_equal,
    is_random,
    needs,
    placeholders,
    reaches,
    results,
    value_of,
)
from passes.nest import body_of, sites
from passes.simplify.emit import call

aten = torch.ops.aten
# Views that may be of all of a tensor, in order.
_WHOLE = {
    aten.alias.default, aten.permute.default, aten.reshape.default, aten.view.default,
    aten.expand.default,
}  # fmt: skip
# Of one tensor, and linear with numbers 0 and 1.
_PLAIN = {
    *_WHOLE, aten.clone.default, aten.t.default, aten.transpose.int, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten._unsafe_view.default,
    aten.sum.default, aten.sum.dim_IntList,
}  # fmt: skip
_DERIVATIVES = (derivative.gradient, derivative.tangent)
_MOVES: dict[Any, Move] = {
    **MOVES,
    aten.index_select.default: pick,
    aten.index.Tensor: pick,
}
# What they return is taken out of their argument.
_PARTS = {
    aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.view.default, aten.reshape.default, aten.alias.default, aten.permute.default,
    operator.getitem,
}  # fmt: skip


Flatten: TypeAlias = Callable[[GraphModule, dict[Node, Tensor]], GraphModule]


class Raised:
    """The nodes of a graph that are linear in derivatives, as expressions.

    Args:
        module: A derivative graph, or the body of a derivative node.
        known: Inputs of the graph that are constants, and their values.
        point: In a body, the input that it is differentiated at: what keeps its rows apart, and
            holds no derivative, is an operand too.
        mixing: In a body, why its rows mix; its result is then the only operand, and a whole.
        one_by_one: Let a value computed from derivatives be a factor of others: they are computed
            one after another, not together.
        flatten: Returns a body with the derivatives inside it computed by plain operators, given
            its inputs that are constants. Then a body that holds second derivatives, or what is not
            linear in derivatives, is an operand as a whole.

    Attributes:
        expressions: Node → what it is.
        refusals: Derivative node → why it is no operand.
    """

    def __init__(
        self,
        module: GraphModule,
        known: dict[Node, Tensor] | None = None,
        point: Node | None = None,
        *,
        mixing: str = "",
        one_by_one: bool = False,
        flatten: Flatten | None = None,
    ) -> None:
        self.module, self.point, self.mixing = module, point, mixing
        self.flatten = flatten
        self.constants = Constants(module.graph, known)
        self.expressions: dict[Node, Expression] = {}
        self.refusals: dict[Node, str] = {}
        self.one_by_one = one_by_one
        # What is computed from derivatives is no factor of them: they are computed together.
        derivatives = [] if one_by_one else sites(module)
        self._derived = reaches(derivatives)
        self._rows = None if point is None else Rows(module.graph, point)
        self._whole = whole_operands(module) if mixing else set[Node]()
        for node in module.graph.nodes:
            if node.op == "call_function" and not self._is_operand(node):
                found = self._raised(node)
                if found is not None:
                    self.expressions[node] = found

    def result(self, position: int) -> Expression:
        """Return a result of a body.

        Raises:
            RowsMix: It is not linear in operands.
        """
        result = results(self.module.graph)[position]
        found = self._known(result) if isinstance(result, Node) else None
        if found is not None:
            return found
        assert self._rows is not None
        reasons = [*self.refusals.values(), *self._rows.reasons.values()]
        raise RowsMix(reasons[0] if reasons else "an inner derivative is not used linearly")

    def _is_operand(self, node: Node) -> bool:
        whole = self._whole if self.mixing else self._rows.kept if self._rows else ()
        return node in whole and isinstance(value_of(node), Tensor) and has_hints(node)

    def _known(self, node: Node) -> Expression | None:
        if node not in self.expressions and self._is_operand(node):
            self.expressions[node] = self._part(node) or self._operand(node)
        return self.expressions.get(node)

    def _part(self, node: Node) -> Expression | None:
        """Return what is a part of an operand: all parts are derivatives of one operand."""
        source = node.args[0] if node.args else None
        if node.target not in _PARTS or not isinstance(source, Node):
            return None
        read = source.args[0] if node.target is operator.getitem else source
        if not isinstance(read, Node) or self._known(read) is None:
            return None
        return _MOVES[node.target](self.expressions, self.constants, node)

    def _operand(self, node: Node) -> Expression:
        """``f[n, o]``: a value, none of whose rows depends on another row of the point."""
        assert self.point is not None
        inputs = placeholders(self.module.graph)
        read = needs([node])
        first = [self.point, *(n for n in inputs if n is not self.point and n in read)]
        at = None if self._rows is None or self.mixing else self._rows.kept[node]
        body = up_to(self.module, first, node, at or 0)
        dims = tuple(Index(size) for size in value_of(node).shape)
        inner = [n.meta["rows"].order for n in body.graph.nodes if "rows" in n.meta]
        order = max(inner, default=0)
        base = Base(body, code_of(body), tuple(first), order, mixing=self.mixing)
        row, outs = (None, dims) if at is None else (dims[at], (*dims[:at], *dims[at + 1 :]))
        return Expression((Term(base, row, outs, ()),), dims)

    def _raised(self, node: Node) -> Expression | None:
        source = node.args[0] if node.args else None
        reads = node.all_input_nodes
        if node.target is operator.getitem and isinstance(source, Node):
            if source.target in _DERIVATIVES:
                return self._result_of(source, arguments(node)[1])
            reads = source.all_input_nodes  # of a split, whose pieces are the expressions
        move = _MOVES.get(node.target)
        if move is None:
            return None
        explicit = [n for n in list(reads) if self._known(n) is None]
        fixed = {n: self._unmoved(n) for n in self._derived.intersection(explicit)}
        if len(explicit) == len(reads) or None in fixed.values():
            return None
            return None
        if self.one_by_one and not explicit and len(node.all_input_nodes) == 2:
            found = self._product_of(node, move)
            if found is not None:
                return found
        found = move(self.expressions, self.constants, node)
        return found and found.with_factors(lambda item: fixed.get(item, item))

    def _unmoved(self, node: Node) -> Computed | None:
        """Return a value that a derivative node hands out, if its body computes it of its inputs
        and not of its point."""
        source = node.args[0] if node.target is operator.getitem else None
        if not isinstance(source, Node) or source.target not in _DERIVATIVES:
            return None
        _, n_points, n_outputs, _, *inputs = arguments(source)
        body = body_of(self.module, source)
        first = n_points if source.target is derivative.gradient else n_outputs
        position = arguments(node)[1] - first
        if position < 0:
            return None
        result = results(body.graph)[position]
        outside = dict(zip(placeholders(body.graph), inputs, strict=False))
        try:
            found = _outside(body, _moving(placeholders(body.graph)[:n_points]), outside, result)
        except RowsMix:
            return None
        return found if isinstance(found, Computed) else None

    def _product_of(self, node: Node, move: Move) -> Expression | None:
        """Return a product of two expressions as the dearer one's, the other being a factor, where
        that spares the dearer one."""
        costs = {n: cost(self.expressions[n]) for n in node.all_input_nodes}
        derivatives = [n for n in costs if costs[n] < math.inf]
        if not derivatives:
            return None
        one = max(derivatives, key=costs.__getitem__)
        found = move({one: self.expressions[one]}, self.constants, node)
        is_cheaper = found is not None and cost(found) < costs[one]
        return found if is_cheaper or len(derivatives) < len(costs) else None

    def _result_of(self, node: Node, position: int) -> Expression | None:
        """Return the derivative that a node computes, or the value of what is differentiated."""
        _, n_points, n_outputs, n_batch, *inputs = arguments(node)
        try:
            if n_points != 1:
                raise RowsMix(
                    "a derivative at several points; vmap(jacrev(f), (None, 0)) of parameters and "
                    "samples is kept as factors"
                )
            if n_outputs != 1:
                raise RowsMix("a derivative of several outputs")
            if any(is_equal(size, 0) for size in value_of(inputs[0]).shape):
                raise RowsMix("a derivative at no points")
            # The body with the derivatives inside it, which forward mode takes apart.
            body = node.meta.get("whole") or body_of(self.module, node)
            forward = node.target is derivative.tangent
            expression = self._of_body(body, inputs, max(position - 1, 0))
            if position > 0:
                return expression
            if forward:
                return self._along(expression, inputs[-1], n_batch)
            return self._pulled_back(expression, inputs[-1], n_batch, value_of(inputs[0]))
        except RowsMix as reason:
            self.refusals[node] = str(reason)
            return None

    def _of_body(self, body: GraphModule, inputs: Sequence[Any], position: int) -> Expression:
        """Return a result of a body, in terms of what is given for its inputs.

        Raises:
            RowsMix: It is not linear in operands whose rows are apart.
        """
        if any(is_random(node) for node in body.graph.nodes):
            raise RowsMix("a random draw inside")
        inside = placeholders(body.graph)
        outside = dict(zip(inside, inputs, strict=False))
        known = self.constants.inside(outside)
        may_be_flat = self.flatten is not None and bool(sites(body))
        try:
            found = self._linear_result(body, known, outside, position)
            if not may_be_flat or all(term.order < 2 for term in found.terms):
                return found
        except RowsMix:
            if not may_be_flat:
                raise
        assert self.flatten is not None
        flat = self.flatten(body, known)
        new = dict(zip(inside, placeholders(flat.graph), strict=True))
        given = {new[node]: outer for node, outer in outside.items()}
        return self._linear_result(flat, {new[n]: v for n, v in known.items()}, given, position)

    def _linear_result(
        self,
        body: GraphModule,
        known: dict[Node, Tensor],
        outside: dict[Node, Any],
        position: int,
    ) -> Expression:
        point = placeholders(body.graph)[0]
        try:
            expression = Raised(body, known, point, flatten=self.flatten).result(position)
        except RowsMix as reason:
            if sites(body) or derivative.holds_user_function(body):
                raise
            expression = Raised(body, known, point, mixing=str(reason)).result(position)
        moving = _moving([point])

        def seen_outside(item: Any) -> Any:
            return _outside(body, moving, outside, item)

        terms = []
        for term in expression.terms:
            if same_as(term.base.point) is not point:
                raise RowsMix("an inner derivative at another point")
            if any(n in moving for n in term.base.inputs[1:] if isinstance(n, Node)):
                raise RowsMix("an inner derivative reads what moves with the point")
            rest = map(seen_outside, term.base.inputs[1:])
            base = replace(term.base, inputs=(outside[point], *rest))
            terms.append(replace(term, base=base).with_factors(seen_outside))
        return expression.with_terms(terms)

    def _pulled_back(
        self, expression: Expression, seed: Any, n_batch: int, point: Tensor
    ) -> Expression:
        """``∂/∂x[n, j] Σ s[b, …] E[…]``: rows are apart, so n is E's own row."""
        at = tuple(Index(size) for size in point.shape)
        if self._are_units(expression, seed, n_batch):
            (term,) = expression.terms
            names = {} if term.row is None else {term.row: at[0]}
            moved = expression.renamed(names)
            slot = at if term.row is None else at[1:]
            found = [replace(t, slots=(*t.slots, slot)) for t in moved.terms]
            return Expression(tuple(found), (*moved.dims, *at))
        batch = [Index(size) for size in value_of(seed).shape[:n_batch]]
        dims = (*batch, *at)
        terms = []
        for term in expression.terms:
            names = {} if term.row is None else {term.row: at[0]}
            moved = term.renamed(names)
            assert moved is not None
            seeds = [None if d is None else names.get(d, d) for d in expression.dims]
            factor = Factor(seed, (*batch, *seeds))
            slot = at if term.row is None else at[1:]
            moved = replace(moved, slots=(*moved.slots, slot)).times(1.0, factor)
            terms.append(self._simple(moved, dims))
        return Expression(tuple(terms), dims)

    def _along(self, expression: Expression, direction: Any, n_batch: int) -> Expression:
        """``Σⱼ ∂E/∂x[n, j] v[b, n, j]``."""
        if self._are_units(expression, direction, n_batch):
            (term,) = expression.terms
            row = () if term.row is None else (term.row,)
            slot = tuple(Index(size) for size in value_of(direction).shape[n_batch + len(row) :])
            moved = replace(term, slots=(*term.slots, slot))
            return Expression((moved,), (*row, *slot, *expression.dims))
        batch = tuple(Index(size) for size in value_of(direction).shape[:n_batch])
        dims = (*batch, *expression.dims)
        terms = []
        for term in expression.terms:
            row = () if term.row is None else (term.row,)
            sizes = value_of(direction).shape[n_batch + len(row) :]
            slot = tuple(Index(size) for size in sizes)
            moved = replace(term, slots=(*term.slots, slot))
            moved = moved.times(1.0, Factor(direction, (*batch, *row, *slot)))
            terms.append(self._simple(moved, dims))
        return Expression(tuple(terms), dims)

    def _are_units(self, expression: Expression, vectors: Any, n_batch: int) -> bool:
        """Whether vectors are all unit vectors, numbered by the dimensions of their space: what
        numbers them is then what they select, rows too."""
        if n_batch < 2 or len(expression.terms) != 1 or len(set(expression.dims)) < n_batch:
            return False
        known = self.constants.value(vectors)
        return known is not None and known.dim() == 2 * n_batch and is_identity(known, n_batch)

    def _simple(self, term: Term, dims: Sequence[Index | None]) -> Term:
        """Take constants apart: numbers into the scale, identities into indices."""
        for factor in term.factors:
            known = self.constants.value(factor.node)
            apart = None if known is None else self.constants.apart(known, factor.indices)
            if apart is None:
                continue
            scale, equal = apart
            names = {}
            if equal is not None:
                free = [index for index in equal if index not in dims]
                if not free:
                    continue
                names = {free[-1]: equal[0] if equal[1] is free[-1] else equal[1]}
            rest = tuple(f for f in term.factors if f is not factor)
            moved = replace(term, scale=term.scale * scale, factors=rest).renamed(names)
            assert moved is not None
            return self._simple(moved, dims)
        return term


def _moving(points: Sequence[Node]) -> set[Node]:
    """Return what has a derivative at points."""
    return reaches(points, through=lambda node: node.target is not derivative.stop)


def _outside(body: GraphModule, moving: set[Node], outside: dict[Node, Any], item: Any) -> Any:
    """Return what is the same as an explicit tensor of a body, outside of it: what is given for an
    input, or what is computed from that.

    Raises:
        RowsMix: It depends on the body's point, or on a derivative.
    """
    if isinstance(item, Computed):
        read = tuple(_outside(body, moving, outside, i) for i in item.inputs)
        return replace(item, inputs=read)
    if item in outside or not isinstance(item, Node):
        return outside.get(item, item)
    if item in moving:
        raise RowsMix("an inner derivative with a factor that moves with the point")
    read = needs([item])
    if any("site" in node.meta for node in read):
        raise RowsMix("a factor that is computed from another derivative")
    inputs = [n for n in placeholders(body.graph) if n in read]
    own = up_to(body, inputs, item)
    return Computed(own, code_of(own), tuple(outside[n] for n in inputs), value_of(item))


def same_as(node: Any) -> Any:
    """Return the node that a view of all of it, in order, is made of."""
    while isinstance(node, Node) and node.target in _WHOLE:
        source: Any = node.args[0]
        if node.target is aten.permute.default and list(arguments(node)[1]) != sorted(
            arguments(node)[1]
        ):
            break
        if node.target not in (aten.alias.default, aten.permute.default) and (
            value_of(source).shape != value_of(node).shape
        ):
            break
        node = source
    return node


def whole_operands(module: GraphModule) -> set[Node]:
    """Return what the results of a body are views, slices and sums of."""
    found = set()
    for node in results(module.graph):
        while isinstance(node, Node) and node.target in _PLAIN and len(node.all_input_nodes) == 1:
            node = node.args[0]
        if isinstance(node, Node) and node.op == "call_function":
            found.add(node)
    return found


def up_to(module: GraphModule, inputs: Sequence[Node], node: Node, first: int = 0) -> GraphModule:
    """Return the graph that computes a node from the given inputs, with one of its dimensions made
    the first."""
    graph = Graph()
    copies = {source: graph.node_copy(source) for source in inputs}
    read = needs([node])
    for source in module.graph.nodes:
        if source in read and source not in copies:
            copies[source] = graph.node_copy(source, copies.__getitem__)
    result = copies[node]
    if first:
        order = [first, *(d for d in range(value_of(node).dim()) if d != first)]
        result = call(graph, aten.permute.default, (result, order), {}, node)
    graph.output((result,))
    return GraphModule(module, graph)
