"""Put planned contractions of Jacobians into a derivative graph, as derivative nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes import derivative
from passes.contraction.directions import NotPlanned
from passes.contraction.first_order import Held, Planned, Push
from passes.contraction.operands import up_to
from passes.contraction.terms import Computed, Factor, Index, Term, example_of
from passes.graph import placeholders, results, value_of
from passes.nest import Site
from passes.origin import note
from passes.tangent_rules import NoRule
from passes.tracing import fake_mode_of, trace

# Operands of one product have letters for indices.
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# PyTorch's derivatives of them at a kink are another one in each mode.
_AMBIGUOUS = {torch.ops.aten._prelu_kernel.default}


class Emitter:
    """Adds nodes to a derivative graph, where the graph inserts.

    Attributes:
        replaced: Nodes of the graph, and tensors to be computed → the nodes that stand for them.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.replaced: dict[Any, Node] = {}
        self._pushed: dict[Any, Node] = {}
        self._like: Node | None = None

    def value(
        self, plans: Sequence[Planned], values: Sequence[Term], dims: Sequence[Index | None],
        asked: Node, like: Node,
    ) -> Node:  # fmt: skip
        """Add a sum of terms.

        Args:
            plans: The terms that are derivatives.
            values: Those that are not; of bodies that derivatives in ``plans`` have.
            dims: The index of each dimension of the sum.
            asked: The node that computes it so far.
            like: The derivative node that it is computed from.
        """
        self._like = like
        outs = {plan.push.base: self._push(plan.push) for plan in plans}
        sums: list[tuple[float, list[tuple[Node, Sequence[Index | None]]]]] = []
        for plan in plans:
            pushed = self._unfolded(self._item(self._push(plan.push), 0), plan.push)
            factors = [(self._now(f.node), f.indices) for f in plan.left]
            sums.append((plan.term.scale, [(pushed, plan.result), *factors]))
        for term in values:
            value = self._item(outs[term.base], 1)
            row = () if term.row is None else (term.row,)
            factors = [(self._now(f.node), f.indices) for f in term.factors]
            sums.append((term.scale, [(value, (*row, *term.outs)), *factors]))
        nodes = list(dict.fromkeys(node for _, operands in sums for node, _ in operands))

        def total(*tensors: Tensor) -> Tensor:
            given = dict(zip(nodes, tensors, strict=True))
            parts = []
            for scale, operands in sums:
                pairs = [(given[node], indices) for node, indices in operands]
                part = _multiplied(pairs, dims)
                parts.append(part if scale == 1 else part * scale)
            return sum(parts[1:], parts[0])

        found = self._inlined(total, nodes)
        assert value_of(found).shape == value_of(asked).shape, (found.meta["val"], asked)
        return found

    def constant(self, held: Held, point: Node, like: Node) -> Factor:
        """Add a constant tensor; return it as a factor.

        Args:
            held: What it is.
            point: A tensor of its type.
            like: A derivative node that it is for.

        Raises:
            NotPlanned: Its sizes are not known.
        """
        if not all(isinstance(index.size, int) for index in held.indices):
            raise NotPlanned("rows of a Jacobian are used whose number is not known")
        self._like = like
        node = self._inlined(lambda x: _dense(held, x.new_ones(())), [point])
        return Factor(node, held.indices)

    def _now(self, item: Any) -> Any:
        """Return the node of an explicit tensor.

        Raises:
            NotPlanned: It is computed of constants that are its own.
        """
        if not isinstance(item, Computed):
            return self.replaced.get(item, item)
        if item not in self.replaced:
            self.replaced[item] = self._copied(item)
        return self.replaced[item]

    def _copied(self, item: Computed) -> Node:
        if item.body.graph.find_nodes(op="get_attr"):
            raise NotPlanned("a factor is computed of constants inside a body")
        copies = dict(zip(placeholders(item.body.graph), map(self._now, item.inputs), strict=True))
        for node in item.body.graph.find_nodes(op="call_function"):
            copies[node] = self.graph.node_copy(node, copies.__getitem__)
            self._note(copies[node])
        return copies[results(item.body.graph)[0]]

    def _push(self, push: Push) -> Node:
        """Return the derivative node of vectors, which is added if it is new.

        Raises:
            NotPlanned: An operator of the body has no rule.
        """
        if push.key not in self._pushed:
            self._pushed[push.key] = self._derivative(push)
        return self._pushed[push.key]

    def _derivative(self, push: Push) -> Node:
        base, like = push.base, self._like
        assert like is not None
        for node in base.body.graph.nodes:
            if node.target in _AMBIGUOUS:
                raise NotPlanned(f"{node.target}: its forward and reverse mode differ at a kink")
        order = [push.point, *(at for at in range(len(base.inputs)) if at != push.point)]
        body = _reordered(base.body, order)
        inputs = [self._now(base.inputs[at]) for at in order]
        target = derivative.tangent if push.forward else derivative.gradient
        through = value_of(inputs[0] if push.forward else results(body.graph)[0])
        vectors = self._inlined(
            lambda point, *tensors: _vectors(push, through, point, tensors),
            [inputs[0], *(self._now(factor.node) for factor in push.factors)],
        )
        arguments = (1, 1, int(bool(push.enumerated)), *inputs, vectors)
        examples = [example_of(item) for item in arguments]
        with fake_mode_of(examples):
            try:
                found = target(body, *examples)
            except NoRule as reason:
                raise NotPlanned(f"no forward-mode rule for {reason}") from reason
        name = _unused(self.module, "contracted")
        self.module.register_module(name, body)
        node = self.graph.call_function(target, (self.graph.get_attr(name), *arguments))
        site: Site = like.meta["site"]
        kept = {
            key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta
        }
        node.meta = {
            **kept,
            "val": tuple(x.detach() for x in found),
            "site": site,
            "draws": False,
            "whole": body,
        }
        role = "tangent" if push.forward else "cotangent"
        note(node, site=site.name, stage="choose", role=role, source=f"{name}.{node.name}")
        return node

    def _unfolded(self, node: Node, push: Push) -> Node:
        """Give each index of a batch of vectors a dimension of its own.

        Raises:
            NotPlanned: Several of their sizes are not known.
        """
        if len(push.enumerated) < 2:
            return node
        sizes = [i.size if isinstance(i.size, int) else -1 for i in push.enumerated]
        if sizes.count(-1) > 1:
            raise NotPlanned("an enumerated index has a size that is not known")
        return self._inlined(lambda x: x.reshape(*sizes, *x.shape[1:]), [node])

    def _item(self, node: Node, position: int) -> Node:
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == position:
                return user
        with self.graph.inserting_after(node):
            item = self.graph.call_function(operator.getitem, (node, position))
        item.meta = {"val": value_of(node)[position], "stack_trace": node.meta.get("stack_trace")}
        self._note(item)
        return item

    def _inlined(self, function: Callable[..., Tensor], inputs: Sequence[Node]) -> Node:
        """Add the operators of a function."""
        examples = [example_of(node) for node in inputs]
        traced = trace(lambda *x: (function(*x),), examples, fake_mode_of(examples)).graph
        given = iter(inputs)
        copies: dict[Node, Node] = {}
        for node in traced.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op != "output":
                assert node.op == "call_function", f"{node} is a constant"
                copies[node] = self.graph.node_copy(node, copies.__getitem__)
                self._note(copies[node])
        return copies[results(traced)[0]]

    def _note(self, node: Node) -> None:
        like = self._like
        assert like is not None
        node.meta.setdefault("stack_trace", like.meta.get("stack_trace"))
        site = like.meta["site"].name
        note(node, site=site, stage="choose", role="tangent", source=f"contraction.{node.name}")


def _reordered(body: GraphModule, order: Sequence[int]) -> GraphModule:
    """Return a body with its inputs in another order."""
    inputs = placeholders(body.graph)
    return up_to(body, [inputs[at] for at in order], results(body.graph)[0])


def _unused(module: torch.nn.Module, stem: str) -> str:
    number = 0
    while hasattr(module, f"{stem}_{number}"):
        number += 1
    return f"{stem}_{number}"


def _dense(held: Held, one: Tensor) -> Tensor:
    """Return a constant as a tensor, by operators: a sum of products of unit vectors."""
    units = [
        torch.eye(_known(index.size), dtype=one.dtype, device=one.device) for index in held.indices
    ]
    letters = _LETTERS[: len(units)]
    rows = []
    for dim, unit in enumerate(units):
        scales = held.elements.values() if dim == 0 else [1.0] * len(held.elements)
        pairs = zip(held.elements, scales, strict=True)
        rows.append(torch.stack([unit[at[dim]] * scale for at, scale in pairs]))
    return torch.einsum(f"{','.join(f'Z{letter}' for letter in letters)}->{letters}", *rows)


def _vectors(push: Push, through: Tensor, point: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return ``V[enumerated, row, side]``, the enumerated indices as one dimension, if any.

    Args:
        push: The vectors.
        through: An example of what goes through the body: of the point's shape, or the result's.
        point: The point.
        tensors: The factors.
    """
    row = () if push.row is None else (push.row,)
    shape = [*row, *push.side]
    units = [index for index in push.side if index in push.enumerated]
    # A unit vector's index has two dimensions: the position in the batch, and in the vector.
    order: list[Any] = [*push.enumerated, *(("of", i) if i in units else i for i in shape)]
    total = point.new_ones(()) if not tensors else None
    if tensors:
        pairs = [(x, f.indices) for x, f in zip(tensors, push.factors, strict=True)]
        present = {i for f in push.factors for i in f.indices}
        kept = [i for i in order if i in present]
        total = _multiplied(pairs, kept)
        for at, index in enumerate(order):
            if index not in present:
                total = total.unsqueeze(at)
    else:
        total = point.new_ones((1,) * len(order))
    for index in units:
        at = order.index(index), order.index(("of", index))
        eye = torch.eye(_known(index.size), dtype=total.dtype, device=point.device)
        total = total * eye.reshape(
            [_known(index.size) if d in at else 1 for d in range(len(order))]
        )
    known = list(point.shape)
    if not push.forward:
        row_size = [] if push.row is None else known[:1]
        known = [*row_size, *map(_known, through.shape[len(row_size) :])]
    n = len(push.enumerated)
    total = total.expand(*total.shape[:n], *known)
    return total.flatten(0, n - 1) if n > 1 else total


def _known(size: Any) -> int:
    if not isinstance(size, int):
        raise NotPlanned("an enumerated index has a size that is not known")
    return size


def _multiplied(
    operands: Sequence[tuple[Tensor, Sequence[Index | None]]], dims: Sequence[Index | None]
) -> Tensor:
    """Multiply tensors with named indices, and sum over those that are not in the result.

    Raises:
        NotPlanned: The result is repeated along an index whose size is not known.
    """
    letters: dict[Index, str] = {}
    names, tensors = [], []
    for value, indices in operands:
        for dim in range(len(indices) - 1, -1, -1):
            if indices[dim] is None:
                value = value.select(dim, 0)
        held = [index for index in indices if index is not None]
        for index in held:
            letters.setdefault(index, _LETTERS[len(letters)])
        names.append("".join(letters[index] for index in held))
        tensors.append(value)
    kept = [index for index in dims if index is not None and index in letters]
    result = "".join(letters[index] for index in kept)
    total = torch.einsum(f"{','.join(names)}->{result}", *tensors)
    for at, index in enumerate(dims):
        if index not in letters:
            total = total.unsqueeze(at)
    sizes = [
        _known(index.size) if index is not None and index not in letters else -1 for index in dims
    ]
    return total if all(size == -1 for size in sizes) else total.expand(sizes)
