"""The forms a step can take: each is built, traced, simplified and priced once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import sympy
import torch
from torch.fx import GraphModule

from passes.bodies import Labels, Linearizations, identity_of
from passes.decompositions import weight_norm
from passes.factorised import DETERMINANT, METHODS
from passes.graph import copy_graph, graphs_in, placeholders, print_graph, results, value_of, where
from passes.joint import Roles, trace_joint, trace_step
from passes.nest import Site, active_nodes, all_sites, body_of, points_of, sites
from passes.origin import mark_of, note
from passes.price import Price, evaluated, node_flops, price, size_hints
from passes.strategies import NAMES, put_in_form
from passes.tracing import example_inputs
from passes.tracking import run
from rewriter.capture import DERIVATIVES
from rewriter.recurrent import KINDS, layer_by_layer
from rewriter.stateful import WRITTEN_OUT, levels_restored

AS_WRITTEN = "as written"
REVERSE = "reverse"


@dataclass(frozen=True)
class Candidate:
    """A form the step could take.

    Attributes:
        strategies: Site name → strategy.
        price: Of the whole joint graph.
        flops: Its FLOPs at the sizes at hand.
        bytes_moved: Its bytes at the sizes at hand.
        bytes_kept: The most bytes alive at once, at the sizes at hand.
        kernels: Groups of pointwise operators.
        nodes: How many operators it has.
        site_flops: Site name → the FLOPs of its value and its pullback, as far as told apart.
        site_costs: The same at the sizes at hand.
        seconds: Of one step on the caller's arguments, the median; None if it was not timed.
    """

    strategies: Mapping[str, str]
    price: Price
    flops: int
    bytes_moved: int
    bytes_kept: int
    kernels: int
    nodes: int
    site_flops: Mapping[str, sympy.Expr]
    site_costs: Mapping[str, int]
    seconds: float | None = None

    @property
    def preference(self) -> tuple[int, int, int, int]:
        """What is compared, the least first: FLOPs, how far down the strategies stand in the order
        of preference, bytes kept, bytes moved."""
        return self.flops, rank(self.strategies), self.bytes_kept, self.bytes_moved


def rank(strategies: Mapping[str, str]) -> int:
    """Return how far down strategies stand in the order of preference, all sites together."""
    order = [*NAMES, AS_WRITTEN]
    return sum(order.index(strategy) for strategy in strategies.values() if strategy in order)


@dataclass(frozen=True)
class Form:
    """A candidate with its graphs.

    Attributes:
        candidate: Its strategies and its price.
        module: The derivative graph with each site in its form.
        joint: Loss, state updates and gradients as one graph.
        build_seconds: Time to build ``module``.
        trace_seconds: Time to trace and simplify ``joint``.
    """

    candidate: Candidate
    module: GraphModule
    joint: GraphModule
    build_seconds: float
    trace_seconds: float


class Forms:
    """Builds forms of one derivative graph; one that comes out again is not traced again.

    Attributes:
        sites: The nested derivatives, inner ones first.
        refusals: (site name, strategy) → reason, for strategies that were refused in some form.
        linearizations: Of the bodies; shared by all forms.
    """

    def __init__(self, module: GraphModule, roles: Roles, *, seeded: bool) -> None:
        self.module, self.roles, self.seeded = module, roles, seeded
        self.sites = all_sites(module, sites(module))
        self.refusals: dict[tuple[str, str], str] = {}
        self.linearizations = Linearizations()
        self._by_wish: dict[frozenset[tuple[str, str]], Form] = {}
        self._untraced: dict[frozenset[tuple[str, str]], tuple[GraphModule, dict[str, str]]] = {}
        self._by_text: dict[tuple[str, ...], Form] = {}

    def build(self, wish: Mapping[str, str]) -> Form:
        """Return the form with each site in the strategy wished for, or in reverse mode where that
        is refused."""
        key = frozenset(wish.items())
        if key not in self._by_wish:
            self._by_wish[key] = self._built(wish)
        return self._by_wish[key]

    def parts(self) -> list[frozenset[str]]:
        """Return the names of the sites, derivatives inside of one another together."""
        graph: networkx.Graph[str] = networkx.Graph()
        for node in sites(self.module):
            inside = all_sites(self.module, [node])
            graph.add_edges_from((node.meta["site"].name, site.name) for site in inside)
        return [frozenset(part) for part in networkx.connected_components(graph)]

    def alike(self) -> list[list[frozenset[str]]]:
        """Return the same, those together that compute the same at different points: what is best
        for one of them is for all, but for where their results go."""
        nodes = {node.meta["site"].name: node for node in sites(self.module)}
        found: dict[Hashable, list[frozenset[str]]] = {}
        seen: Counter[Hashable] = Counter()
        for part in self.parts():
            outer = [node for name, node in nodes.items() if name in part]
            bodies = tuple(identity_of(body_of(self.module, node), Labels()) for node in outer)
            # Those at one point share work, and are told apart by their number.
            at = bodies, tuple(tuple(points_of(node)) for node in outer)
            found.setdefault((bodies, seen[at]), []).append(part)
            seen[at] += 1
        return list(found.values())

    def accepted(self, name: str, wish: Mapping[str, str]) -> list[str]:
        """Return the strategies that a site accepts while the others are as wished for."""
        return [s for s in NAMES if self._in_form({**wish, name: s})[1][name] == s]

    def taken(self, wish: Mapping[str, str]) -> dict[str, str]:
        """Return what `build` would take at each site; nothing is traced for it."""
        key = frozenset(wish.items())
        if key in self._by_wish:
            return dict(self._by_wish[key].candidate.strategies)
        if key not in self._untraced:
            self._untraced[key] = self._in_form(wish)
        return self._untraced[key][1]

    def _built(self, wish: Mapping[str, str]) -> Form:
        start = time.perf_counter()
        known = self._untraced.pop(frozenset(wish.items()), None)
        module, taken = known or self._in_form(wish)
        text = tuple(map(print_graph, graphs_in(module)))
        if text not in self._by_text:
            traced = time.perf_counter()
            joint = trace_joint(module, self.roles, seeded=self.seeded)
            seconds = traced - start, time.perf_counter() - traced
            self._by_text[text] = Form(_priced(taken, joint), module, joint, *seconds)
        return self._by_text[text]

    def _in_form(self, wish: Mapping[str, str]) -> tuple[GraphModule, dict[str, str]]:
        module = copy_graph(self.module)
        inputs = placeholders(module.graph)
        active = active_nodes(module, {inputs[i] for i in self.roles.wanted})
        taken = put_in_form(module, active, wish, self.refusals, self.linearizations)
        module.recompile()
        self._note_what_is_inside(wish, taken)
        return module, taken

    def _note_what_is_inside(self, wish: Mapping[str, str], taken: Mapping[str, str]) -> None:
        """Say why a site has not the strategy wished for where nobody was asked: reverse mode
        differentiates a body as a whole."""
        for name, strategy in taken.items():
            wanted = wish.get(name, REVERSE)
            if strategy == REVERSE and wanted not in (REVERSE, AS_WRITTEN):
                reason = "the derivative around it is in reverse mode, with all that is inside it"
                self.refusals.setdefault((name, wanted), reason)

    def build_as_written(self, captured: GraphModule, promoted: Sequence[int]) -> Form:
        """Trace the captured graph itself, derivatives and all, under autograd: never dearer than
        as written.

        Args:
            captured: The loss as written.
            promoted: Inputs that the loss itself makes require grad.
        """
        roles = self.roles
        like = [value_of(results(self.module.graph)[i]) for i in roles.differentiable]
        start = time.perf_counter()
        joint = trace_step(
            as_written(captured, self.sites, roles),
            example_inputs(self.module),
            roles,
            leaves=[i for i in roles.wanted if i not in promoted],
            cotangents=[torch.empty_like(value) for value in like] if self.seeded else [],
        )
        candidate = _priced({site.name: AS_WRITTEN for site in self.sites}, joint)
        return Form(candidate, self.module, joint, 0.0, time.perf_counter() - start)


def as_written(
    captured: GraphModule, found: Sequence[Site], roles: Roles
) -> Callable[[list[Any]], list[Any]]:
    """Return ``inputs → (*outputs, *updates)``, the captured graph itself.

    Args:
        captured: The loss as written.
        found: Its nested derivatives.
        roles: What its inputs and outputs are.
    """
    module = written_out(captured, found)

    def compute(inputs: list[Any]) -> list[Any]:
        for i in roles.updated:
            inputs[i] = inputs[i].clone()
        with levels_restored():
            outputs = run(module, inputs, DERIVATIVES)
        return [*outputs, *(inputs[i] for i in roles.updated)]

    return compute


def written_out(captured: GraphModule, found: Sequence[Site] = ()) -> GraphModule:
    """Return a copy that can be traced, its derivatives named as the sites that they are: those of
    ``found``."""
    # PyTorch's own higher derivatives of these are wrong; their formulas' are not.
    written_out = {**WRITTEN_OUT, **METHODS, **DETERMINANT, torch._weight_norm: weight_norm}
    captured = copy_graph(captured)
    left = list(found)
    for node in captured.graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in written_out:
            node.op, node.target = "call_function", written_out[node.target]
        note(node, role="primal", stage="flatten")
        here = [site for site in left if site.where == where(node)]
        if node.target in DERIVATIVES and here:
            note(node, site=here[0].name)
            left.remove(here[0])
        if node.target in KINDS:
            node.target, node.args = layer_by_layer, (KINDS[node.target], *node.args)
    captured.recompile()
    return captured


def _priced(taken: Mapping[str, str], joint: GraphModule) -> Candidate:
    cost, hints = price(joint), size_hints(joint)
    calls = [node for node in joint.graph.nodes if node.op == "call_function"]
    by_site: dict[str, sympy.Expr] = dict.fromkeys(taken, sympy.Integer(0))
    for node in calls:
        site = mark_of(node).site
        if site in by_site:
            by_site[site] += node_flops(node)
    at_hand = {name: evaluated(flops, hints) for name, flops in by_site.items()}
    return Candidate(taken, cost, *cost.at(hints), len(calls), by_site, at_hand)
