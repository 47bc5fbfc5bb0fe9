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
from torch.fx import GraphModule, Node

from passes import derivative
from passes.contraction.constants import Constants
from passes.contraction.differentiating import Differentiable, pulled_back, pushed_along
from passes.contraction.first_order import cost
from passes.contraction.moves import MOVES, Move
from passes.contraction.operands import (
    dependent,
    moving_with,
    place_of,
    read_by,
    seen_outside,
    up_to,
    whole_operands,
)
from passes.contraction.picking import pick
from passes.contraction.rows import Rows, RowsMix
from passes.contraction.terms import (
    Base,
    Computed,
    Expression,
    Index,
    Term,
    code_of,
)
from passes.graph import (
    arguments,
    has_hints,
    is_equal,
    is_random,
    placeholders,
    reaches,
    results,
    value_of,
)
from passes.nest import body_of, sites
from passes.symmetry import not_a_gradient

aten = torch.ops.aten
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


class _Read:
    """Bodies that were read while one graph is: a derivative inside of another is asked for once
    for each point and output of each one around it, which is exponential in how deep it lies."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, Node, str], list[tuple[dict[Node, Tensor], Raised]]] = {}

    def body(
        self,
        body: GraphModule,
        known: dict[Node, Tensor],
        point: Node,
        flatten: Flatten | None,
        mixing: str = "",
    ) -> Raised:
        """Return a body, read at one of its points."""
        same = self._found.setdefault((id(body), point, mixing), [])
        for constants, raised in same:  # it keeps its body alive, whose id is no other's
            if _are_equal(constants, known):
                return raised
        raised = Raised(body, known, point, mixing=mixing, flatten=flatten, read=self)
        same.append((known, raised))
        return raised


def _are_equal(one: dict[Node, Tensor], other: dict[Node, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        x is other[node]
        or (
            (x.dtype, x.shape) == (other[node].dtype, other[node].shape)
            and torch.equal(x, other[node])
        )
        for node, x in one.items()
    )


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
        read: In a body, the bodies that were read before.

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
        read: _Read | None = None,
    ) -> None:
        self.module, self.point, self.mixing = module, point, mixing
        self.flatten = flatten
        self._read = _Read() if read is None else read
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
        inputs = read_by(self.module, node)
        at = None if self._rows is None or self.mixing else self._rows.kept[node]
        body = up_to(self.module, inputs, node, at or 0)
        dims = tuple(Index(size) for size in value_of(node).shape)
        inner = [n.meta["rows"].order for n in body.graph.nodes if "rows" in n.meta]
        order = max(inner, default=0)
        apart = frozenset() if self.mixing else frozenset([inputs.index(self.point)])
        base = Base(body, code_of(body), tuple(inputs), order, self.mixing, apart)
        row, outs = (None, dims) if at is None else (dims[at], (*dims[:at], *dims[at + 1 :]))
        return Expression((Term(base, row, outs),), dims).without_single(at)

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
            found = seen_outside(
                body, moving_with(placeholders(body.graph)[:n_points]), outside, result
            )
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
        forward = node.target is derivative.tangent
        n_derivatives = n_outputs if forward else n_points
        try:
            if any(is_equal(n, 0) for x in inputs[:n_points] for n in value_of(x).shape):
                raise RowsMix("a derivative at no points")
            # The body with the derivatives inside it, which forward mode takes apart.
            body = node.meta.get("whole") or body_of(self.module, node)
            if position >= n_derivatives:
                result = position - n_derivatives
                (_, point), *_ = dependent(body, [result], range(n_points))
                return self._of_body(body, inputs, result, point).expression
            outputs, points = ([position], range(n_points)) if forward else (
                range(n_outputs), [position]
            )  # fmt: skip
            total: Expression | None = None
            for output, point in dependent(body, outputs, points):
                found = self._of_body(body, inputs, output, point)
                if forward:
                    one = pushed_along(found, inputs[point - n_points], n_batch, self.constants)
                else:
                    seed, like = inputs[output - n_outputs], value_of(inputs[point])
                    one = pulled_back(found, seed, n_batch, like, self.constants)
                total = one if total is None else total.plus(one)
                if total is None:
                    raise RowsMix("derivatives of several outputs, one of them on a diagonal only")
            return total
        except RowsMix as reason:
            self.refusals[node] = str(reason)
            return None

    def _of_body(
        self, body: GraphModule, inputs: Sequence[Any], position: int, point: int
    ) -> Differentiable:
        """Return a result of a body, in terms of what is given for its inputs.

        Args:
            body: What is differentiated.
            inputs: What is given.
            position: Of the result.
            point: The position of the point among the inputs.

        Raises:
            RowsMix: It is not linear in operands whose rows are apart.
        """
        if any(is_random(node) for node in body.graph.nodes):
            raise RowsMix("a random draw inside")
        inside = placeholders(body.graph)
        reason = not_a_gradient(body, [inside[point]])
        if reason:
            raise RowsMix(reason)
        outside = dict(zip(inside, inputs, strict=False))
        known = self.constants.inside(outside)
        may_be_flat = self.flatten is not None and bool(sites(body))
        try:
            found = self._linear_result(body, known, outside, position, point)
            if not may_be_flat or all(term.order < 2 for term in found.expression.terms):
                return found
        except RowsMix:
            if not may_be_flat:
                raise
        assert self.flatten is not None
        flat = self.flatten(body, known)
        new = dict(zip(inside, placeholders(flat.graph), strict=True))
        given = {new[node]: outer for node, outer in outside.items()}
        constants = {new[n]: v for n, v in known.items()}
        return self._linear_result(flat, constants, given, position, point)

    def _linear_result(
        self,
        body: GraphModule,
        known: dict[Node, Tensor],
        outside: dict[Node, Any],
        position: int,
        number: int,
    ) -> Differentiable:
        point = placeholders(body.graph)[number]
        try:
            expression = self._read.body(body, known, point, self.flatten).result(position)
        except RowsMix as reason:
            if sites(body) or derivative.holds_user_function(body):
                raise
            mixed = self._read.body(body, known, point, None, str(reason))
            expression = mixed.result(position)
        moving = moving_with([point])

        def given(item: Any) -> Any:
            return seen_outside(body, moving, outside, item)

        terms, at = [], []
        for term in expression.terms:
            place = place_of(point, term.base, moving)
            inputs = [
                outside[point] if k == place else given(item)
                for k, item in enumerate(term.base.inputs)
            ]
            apart = term.base.apart | ({place} if term.row is not None else set())
            base = replace(term.base, inputs=tuple(inputs), apart=apart)
            terms.append(replace(term, base=base).with_factors(given))
            at.append(place)
        return Differentiable(replace(expression, terms=tuple(terms)), tuple(at))
