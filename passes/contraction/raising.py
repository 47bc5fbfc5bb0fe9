"""Read a derivative graph as contractions of derivative tensors.

What of a body keeps the rows of its point apart is an operand ``f``; a derivative of what is linear
in operands is linear in operands of the next order. Views, sums and products with explicit tensors
only move indices.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes import derivative
from passes.contraction.constants import Constants
from passes.contraction.moves import MOVES
from passes.contraction.rows import Rows, RowsMix
from passes.contraction.terms import Base, Expression, Factor, Index, Term
from passes.graph import arguments, is_random, needs, placeholders, reaches, results, value_of
from passes.nest import attribute_of, body_of, sites

aten = torch.ops.aten
# Views that may be of all of a tensor, in order.
_WHOLE = {
    aten.alias.default, aten.permute.default, aten.reshape.default, aten.view.default,
    aten.expand.default,
}  # fmt: skip
_DERIVATIVES = (derivative.gradient, derivative.tangent)


class Raised:
    """The nodes of a graph that are linear in derivatives, as expressions.

    Args:
        module: A derivative graph, or the body of a derivative node.
        known: Inputs of the graph that are constants, and their values.
        point: In a body, the input that it is differentiated at: what keeps its rows apart, and
            holds no derivative, is an operand too.

    Attributes:
        expressions: Node → what it is.
        refusals: Derivative node → why it is no operand.
    """

    def __init__(
        self,
        module: GraphModule,
        known: dict[Node, Tensor] | None = None,
        point: Node | None = None,
    ) -> None:
        self.module, self.point = module, point
        self.constants = Constants(module.graph, known)
        self.expressions: dict[Node, Expression] = {}
        self.refusals: dict[Node, str] = {}
        # What is computed from derivatives is no factor of them: they are computed together.
        self._derived = reaches([n for n in module.graph.nodes if "site" in n.meta])
        self._rows = None if point is None else Rows(module.graph, point)
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
        return self._rows is not None and node in self._rows.kept

    def _known(self, node: Node) -> Expression | None:
        if node not in self.expressions and self._is_operand(node):
            self.expressions[node] = self._operand(node)
        return self.expressions.get(node)

    def _operand(self, node: Node) -> Expression:
        """``f[n, o]``: a value, none of whose rows depends on another row of the point."""
        assert self.point is not None
        inputs = placeholders(self.module.graph)
        first = [self.point, *(n for n in inputs if n is not self.point)]
        body = up_to(self.module, first, node)
        row, *outs = (Index(size) for size in value_of(node).shape)
        # A constant is one of these graphs' own, whatever its name.
        own = [id(attribute_of(body, str(n.target))) for n in body.graph.find_nodes(op="get_attr")]
        base = Base(body, f"{body.code}{own}", tuple(first))
        return Expression((Term(base, row, tuple(outs), ()),), (row, *outs))

    def _raised(self, node: Node) -> Expression | None:
        source = node.args[0] if node.args else None
        reads = node.all_input_nodes
        if node.target is operator.getitem and isinstance(source, Node):
            if source.target in _DERIVATIVES:
                return self._result_of(source, arguments(node)[1])
            reads = source.all_input_nodes  # of a split, whose pieces are the expressions
        move = MOVES.get(node.target)
        if move is None:
            return None
        explicit = [n for n in list(reads) if self._known(n) is None]
        if len(explicit) == len(reads) or self._derived.intersection(explicit):
            return None
        return move(self.expressions, self.constants, node)

    def _result_of(self, node: Node, position: int) -> Expression | None:
        """Return the derivative that a node computes, or the value of what is differentiated."""
        _, n_points, n_outputs, n_batch, *inputs = arguments(node)
        try:
            if n_points != 1 or n_outputs != 1:
                raise RowsMix("a derivative at several points, or of several outputs")
            # The body with the derivatives inside it, which forward mode takes apart.
            body = node.meta.get("whole") or body_of(self.module, node)
            forward = node.target is derivative.tangent
            if forward and not sites(body):
                raise RowsMix("a first derivative in forward mode is as cheap as it can be")
            outside = dict(zip(placeholders(body.graph), inputs, strict=False))
            expression = self._of_body(body, outside, max(position - 1, 0))
            if position > 0:
                return expression
            if forward:
                return self._along(expression, inputs[-1], n_batch)
            return self._pulled_back(expression, inputs[-1], n_batch, value_of(inputs[0]))
        except RowsMix as reason:
            self.refusals[node] = str(reason)
            return None

    def _of_body(self, body: GraphModule, outside: dict[Node, Any], position: int) -> Expression:
        """Return a result of a body, in terms of what is given for its inputs.

        Raises:
            RowsMix: It is not linear in operands whose rows are apart.
        """
        point = placeholders(body.graph)[0]
        if any(is_random(node) for node in body.graph.nodes):
            raise RowsMix("a random draw inside")
        expression = Raised(body, self.constants.inside(outside), point).result(position)
        moving = reaches([point])
        terms = []
        for term in expression.terms:
            read = [*(f.node for f in term.factors), *term.base.inputs[1:]]
            if same_as(term.base.point) is not point or any(n in moving for n in read):
                raise RowsMix("an inner derivative at another point, or with a factor that moves")
            if any(isinstance(n, Node) and n not in outside for n in read):
                raise RowsMix("an inner derivative reads what its body computes")
            given = (outside[point], *(outside.get(n, n) for n in term.base.inputs[1:]))
            base = replace(term.base, inputs=given)
            factors = tuple(Factor(outside[f.node], f.indices) for f in term.factors)
            terms.append(replace(term, base=base, factors=factors))
        return expression.with_terms(terms)

    def _pulled_back(
        self, expression: Expression, seed: Any, n_batch: int, point: Tensor
    ) -> Expression:
        """``∂/∂x[n, j] Σ s[b, …] E[…]``: rows are apart, so n is E's own row."""
        row, *rest = (Index(size) for size in point.shape)
        batch = [Index(size) for size in value_of(seed).shape[:n_batch]]
        dims = (*batch, row, *rest)
        terms = []
        for term in expression.terms:
            names = {term.row: row}
            moved = term.renamed(names)
            assert moved is not None
            seeds = [None if d is None else names.get(d, d) for d in expression.dims]
            factor = Factor(seed, (*batch, *seeds))
            moved = replace(moved, slots=(*moved.slots, tuple(rest))).times(1.0, factor)
            terms.append(self._simple(moved, dims))
        return Expression(tuple(terms), dims)

    def _along(self, expression: Expression, direction: Any, n_batch: int) -> Expression:
        """``Σⱼ ∂E/∂x[n, j] v[b, n, j]``."""
        batch = tuple(Index(size) for size in value_of(direction).shape[:n_batch])
        dims = (*batch, *expression.dims)
        terms = []
        for term in expression.terms:
            slot = tuple(Index(size) for size in value_of(direction).shape[n_batch + 1 :])
            moved = replace(term, slots=(*term.slots, slot))
            moved = moved.times(1.0, Factor(direction, (*batch, term.row, *slot)))
            terms.append(self._simple(moved, dims))
        return Expression(tuple(terms), dims)

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


def up_to(module: GraphModule, inputs: Sequence[Node], node: Node) -> GraphModule:
    """Return the graph that computes a node from the given inputs."""
    graph = Graph()
    copies = {source: graph.node_copy(source) for source in inputs}
    read = needs([node])
    for source in module.graph.nodes:
        if source in read and source not in copies:
            copies[source] = graph.node_copy(source, copies.__getitem__)
    graph.output((copies[node],))
    return GraphModule(module, graph)
