"""Read a derivative graph as contractions of derivative tensors.

A derivative node with a body without derivatives is an operand ``∂φ``; one whose body contains such
a node is a derivative of what that body makes of it, which is linear in it. Views, sums and products
with explicit tensors only move indices.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes import derivative
from passes.contraction.constants import Constants
from passes.contraction.moves import MOVES
from passes.contraction.rows import RowsMix, check_rows
from passes.contraction.terms import Base, Expression, Factor, Index, Term
from passes.graph import arguments, placeholders, reaches, results, value_of
from passes.nest import body_of, sites

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

    Attributes:
        expressions: Node → what it is.
        refusals: Derivative node → why it is no operand.
    """

    def __init__(self, module: GraphModule, known: dict[Node, Tensor] | None = None) -> None:
        self.module = module
        self.constants = Constants(module.graph, known)
        self.expressions: dict[Node, Expression] = {}
        self.refusals: dict[Node, str] = {}
        for node in module.graph.nodes:
            if node.op == "call_function":
                found = self._raised(node)
                if found is not None:
                    self.expressions[node] = found

    def _raised(self, node: Node) -> Expression | None:
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, Node):
            if source.target in _DERIVATIVES:
                return self._first_result(source) if node.args[1] == 0 else None
            reads = source.all_input_nodes  # of a split, whose pieces are the expressions
        else:
            reads = node.all_input_nodes
        move = MOVES.get(node.target)
        if move is None or not any(n in self.expressions for n in reads):
            return None
        return move(self.expressions, self.constants, node)

    def _first_result(self, node: Node) -> Expression | None:
        try:
            return self._derivative(node)
        except RowsMix as reason:
            self.refusals[node] = str(reason)
            return None

    def _derivative(self, node: Node) -> Expression:
        """Return the derivative of what the body of a node computes, times its seed or
        direction.

        Raises:
            RowsMix: It is no contraction of a derivative tensor; the reason.
        """
        _, n_points, n_outputs, n_batch, *inputs = arguments(node)
        body, point = node.meta.get("whole") or body_of(self.module, node), inputs[0]
        if n_points != 1 or n_outputs != 1:
            raise RowsMix("a derivative at several points, or of several outputs")
        forward = node.target is derivative.tangent
        if not sites(body):
            if forward:
                raise RowsMix("a first derivative in forward mode is as cheap as it can be")
            return self._operand(body, inputs[:-1], inputs[-1], n_batch)
        outside = dict(zip(placeholders(body.graph), inputs, strict=False))
        expression = self._of_body(body, outside)
        if forward:
            return self._along(expression, inputs[-1], n_batch)
        if n_batch:
            raise RowsMix("several seeds at once, of a derivative of a derivative")
        return self._pulled_back(expression, inputs[-1], value_of(point))

    def _operand(
        self, body: GraphModule, inputs: list[Any], seed: Any, n_batch: int
    ) -> Expression:
        """``Σₒ c[b, n, o] ∂f[n, o; j]``."""
        check_rows(body)
        row, *rest = (Index(size) for size in value_of(inputs[0]).shape)
        sizes = value_of(seed).shape
        batch = [Index(size) for size in sizes[:n_batch]]
        outs = tuple(Index(size) for size in sizes[n_batch + 1 :])
        dims = (*batch, row, *rest)
        base = Base(body, body.code, tuple(inputs))
        term = Term(base, row, outs, (tuple(rest),))
        term = term.times(1.0, Factor(seed, (*batch, row, *outs)))
        return Expression((self._simple(term, dims),), dims)

    def _of_body(self, body: GraphModule, outside: dict[Node, Any]) -> Expression:
        """Return what a body computes, in terms of what is given for its inputs."""
        inner = Raised(body, self.constants.inside(outside))
        expression = inner.expressions.get(results(body.graph)[0])
        if expression is None:
            reasons = list(inner.refusals.values())
            raise RowsMix(reasons[0] if reasons else "an inner derivative is not used linearly")
        point = placeholders(body.graph)[0]
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

    def _pulled_back(self, expression: Expression, seed: Any, point: Tensor) -> Expression:
        """``∂/∂x[n, j] Σ s[…] E[…]``: rows are apart, so n is E's own row."""
        slot = tuple(Index(size) for size in point.shape[1:])
        row = Index(point.shape[0])
        dims = (row, *slot)
        terms = []
        for term in expression.terms:
            names = {term.row: row}
            moved = term.renamed(names)
            assert moved is not None
            seeds = tuple(None if d is None else names.get(d, d) for d in expression.dims)
            moved = replace(moved, slots=(*moved.slots, slot)).times(1.0, Factor(seed, seeds))
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
