"""What derivatives cost at least in any form of reverse mode, known before a form is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.graph import is_float, placeholders, reaches, results, value_of
from passes.joint import Roles, trace_value_and_stops
from passes.kernels import is_product
from passes.origin import mark_of
from passes.price import evaluated, node_flops, size_hints
from passes.tangent_tables import ZERO
from rewriter.forms import Candidate

aten = torch.ops.aten

_BIASED = {aten.addmm.default, aten.baddbmm.default}
_STEPS = {
    aten.sign.default, aten.sgn.default, aten.floor.default, aten.ceil.default,
    aten.round.default, aten.trunc.default, aten.relu.default, aten.leaky_relu.default,
    aten.abs.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
    aten.hardtanh.default, aten.maximum.default, aten.minimum.default, aten.amax.default,
    aten.amin.default,
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """The least FLOPs of a step whose derivatives are computed by `autograd.grad`, over any of the
    strategies for its pullback.

    Attributes:
        flops: Of the whole step.
        site_costs: Site name → of its value and its pullback.
    """

    flops: int
    site_costs: Mapping[str, int]

    def exceeds(self, candidate: Candidate, part: frozenset[str]) -> bool:
        """Whether a form spends less on some sites than any other strategy there would.

        Args:
            candidate: The form.
            part: The names of sites that depend on one another.
        """
        # What no site is charged with may belong to any.
        charged = sum(candidate.site_costs.values())
        rest = candidate.flops - charged - (self.flops - sum(self.site_costs.values()))
        spent = sum(candidate.site_costs[name] for name in part) + max(0, rest)
        return spent < self.on(part)

    def on(self, part: frozenset[str]) -> int:
        """Return the least FLOPs that some sites cost."""
        return sum(self.site_costs[name] for name in part)


def bound_of(module: GraphModule, roles: Roles, names: list[str]) -> Bound:
    """Return what a step costs at least while no derivative in it is in Taylor mode.

    Its value is computed. A product of two factors that both carry a gradient is pulled back by two
    more; one of them is counted. The other one may be had for nothing at the ends of a network, and
    in one of straight pieces both may: its reverse passes are each other's multiples, row by row,
    and merge. So where a condition on values chooses among pieces, the value alone counts.

    Args:
        module: The derivative graph.
        roles: What its inputs and outputs are.
        names: Its sites.
    """
    value = trace_value_and_stops(module)
    pulled = set[Node]() if _has_pieces(value) else _pulled_back(value, roles)
    hints, total = size_hints(value), 0
    costs = dict.fromkeys(names, 0)
    for node in value.graph.nodes:
        if node.op != "call_function":
            continue
        flops = evaluated(node_flops(node), hints) * (2 if node in pulled else 1)
        total += flops
        site = mark_of(node).site
        if site in costs:
            costs[site] += flops
    return Bound(total, costs)


def _pulled_back(value: GraphModule, roles: Roles) -> set[Node]:
    """Return the products whose factors both carry a gradient, and whose result does to the
    loss."""
    inputs, found = placeholders(value.graph), results(value.graph)
    wanted = [inputs[i] for i in roles.wanted]
    active = reaches(wanted, through=lambda node: is_float(node) and node.target not in ZERO)
    ends = [found[i] for i in roles.differentiable]
    behind = _behind([node for node in ends if isinstance(node, Node)], active)
    return {n for n in behind if is_product(n) and active.issuperset(_factors(n))}


def _factors(product: Node) -> list[Any]:
    first = 1 if product.target in _BIASED else 0
    return list(product.args[first : first + 2])


def _has_pieces(value: GraphModule) -> bool:
    """Whether a value may be put together of pieces: computed with a mask, with places that were
    chosen, or by an operator that has steps."""
    found = pytree.tree_leaves([value_of(node) for node in value.graph.nodes])
    tensors = [x for x in found if isinstance(x, Tensor)]
    is_chosen = any(not (x.is_floating_point() or x.is_complex()) for x in tensors)
    return is_chosen or any(node.target in _STEPS for node in value.graph.nodes)


def _behind(ends: list[Node], active: set[Node]) -> set[Node]:
    """Return the active nodes that one of some nodes depends on through active nodes."""
    seen: set[Node] = set()
    stack = [node for node in ends if node in active]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(active.intersection(node.all_input_nodes))
    return seen
