"""Build every form the step could take, price it, keep the cheapest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from passes.graph import copy_graph, placeholders, results, value_of, where
from passes.joint import Roles, trace_joint, trace_step
from passes.nest import Site, active_nodes, all_sites, sites
from passes.origin import mark_of, note
from passes.price import Price, evaluated, node_flops, price, size_hints
from passes.strategies import STRATEGIES, Refused
from passes.tracing import example_inputs
from passes.tracking import Tracked
from rewriter.as_written import AsWritten
from rewriter.capture import DERIVATIVES
from rewriter.errors import NotRewritten, OptionError
from rewriter.options import Options
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
        nodes: How many operators it has.
        site_flops: Site name → the FLOPs of its value and its pullback, as far as told apart.
    """

    strategies: dict[str, str]
    price: Price
    flops: int
    bytes_moved: int
    nodes: int
    site_flops: Mapping[str, sympy.Expr]


@dataclass(frozen=True)
class Choice:
    """The form taken.

    Attributes:
        taken: The candidate.
        candidates: Every candidate that was priced.
        asked: Site name → the strategy that the user asked for.
        refusals: (site name, strategy) → reason.
        form: The derivative graph with each site in its form.
        joint: Loss, state updates and gradients as one graph.
        build_seconds: Time to build ``form``.
        trace_seconds: Time to trace and simplify ``joint``.
    """

    taken: Candidate
    candidates: tuple[Candidate, ...]
    asked: Mapping[str, str]
    refusals: Mapping[tuple[str, str], str]
    form: GraphModule
    joint: GraphModule
    build_seconds: float
    trace_seconds: float

    @property
    def rewritten(self) -> list[str]:
        """The sites that are not as written."""
        names = self.taken.strategies.items()
        return [name for name, strategy in names if strategy not in (AS_WRITTEN, REVERSE)]


@dataclass(frozen=True)
class _Built:
    candidate: Candidate
    form: GraphModule
    joint: GraphModule
    build_seconds: float
    trace_seconds: float


def choose(
    module: GraphModule,
    roles: Roles,
    seeded: bool,
    captured: GraphModule,
    as_written: AsWritten,
    promoted: Sequence[int],
    options: Options,
) -> Choice:
    """Price each form on the joint graph; the one with the fewest FLOPs wins, on a tie the earlier
    strategy.

    The loss as written is a candidate too. Its FLOPs are known without tracing it, so it is traced
    only if it wins.

    Args:
        module: The derivative graph.
        roles: What its inputs and outputs are.
        seeded: Whether the outputs' cotangents are inputs of the joint graph.
        captured: The loss as written.
        as_written: What it costs.
        promoted: Inputs that the loss itself makes require grad.
        options: The user's wishes.
    """
    found = all_sites(module, sites(module))
    asked = _asked(found, options)
    refusals: dict[tuple[str, str], str] = {}
    built: list[_Built] = []
    wishes = [{s.name: asked.get(s.name, strategy.name) for s in found} for strategy in STRATEGIES]
    if asked and set(asked.values()) == {AS_WRITTEN} and len(asked) == len(found):
        wishes = []
    for wish in wishes:
        start = time.perf_counter()
        form, taken = _in_form(module, roles, wish, refusals)
        if any(other.candidate.strategies == taken for other in built):
            continue
        traced = time.perf_counter()
        joint = trace_joint(form, roles, seeded=seeded)
        candidate = _priced(taken, joint)
        built.append(_Built(candidate, form, joint, traced - start, time.perf_counter() - traced))
    written = evaluated(as_written.flops, size_hints(module))
    is_free = len(asked) < len(found) or AS_WRITTEN in asked.values()
    if not built or (is_free and min(b.candidate.flops for b in built) > written):
        built.append(_as_written(module, roles, seeded, captured, promoted, found))
    best = min(built, key=lambda b: b.candidate.flops)
    _refuse_if_asked(found, asked, refusals, best.candidate, options)
    return Choice(
        best.candidate,
        tuple(b.candidate for b in built),
        asked,
        refusals,
        best.form,
        best.joint,
        best.build_seconds,
        best.trace_seconds,
    )


def _asked(found: Sequence[Site], options: Options) -> dict[str, str]:
    """Return the strategies the user names, by site."""
    if isinstance(options.strategy, str):
        asked = {site.name: options.strategy for site in found}
    else:
        asked = dict(options.strategy)
    names = [site.name for site in found]
    for name in asked:
        if name not in names:
            raise OptionError(
                f"strategy: there is no site {name!r}; the sites are {', '.join(names) or 'none'}"
            )
    return {name: strategy for name, strategy in asked.items() if strategy != "auto"}


def _refuse_if_asked(
    found: Sequence[Site],
    asked: Mapping[str, str],
    refusals: Mapping[tuple[str, str], str],
    taken: Candidate,
    options: Options,
) -> None:
    for site in found:
        wish = asked.get(site.name)
        if wish is not None and (site.name, wish) in refusals:
            accepted = [s.name for s in STRATEGIES if (site.name, s.name) not in refusals]
            raise OptionError(
                f"strategy: {site.name} at {site.where} does not accept {wish!r}: "
                f"{refusals[site.name, wish]}. It accepts {', '.join([*accepted, AS_WRITTEN])}"
            )
        reasons = [reason for (name, _), reason in refusals.items() if name == site.name]
        if options.strict and wish is None and reasons and taken.strategies[site.name] == REVERSE:
            raise NotRewritten(
                f"strict=True: {site.name} at {site.where} would stay as written: {reasons[0]}"
            )


def _in_form(
    module: GraphModule,
    roles: Roles,
    wish: Mapping[str, str],
    refusals: dict[tuple[str, str], str],
) -> tuple[GraphModule, dict[str, str]]:
    """Return the derivative graph with each site in the form wished for, or reverse where that is
    refused."""
    form = copy_graph(module)
    inputs = placeholders(form.graph)
    active = active_nodes(form, {inputs[i] for i in roles.wanted})
    by_name = {strategy.name: strategy for strategy in STRATEGIES}
    by_name[AS_WRITTEN] = by_name[REVERSE]
    taken: dict[str, str] = {}
    for node in sites(form):
        name = node.meta["site"].name
        try:
            taken |= by_name[wish[name]].build(form, node, active, wish)
        except Refused as refusal:
            refusals[name, wish[name]] = str(refusal)
            taken |= by_name[REVERSE].build(form, node, active, wish)
    form.recompile()
    return form, taken


def _priced(taken: dict[str, str], joint: GraphModule) -> Candidate:
    cost = price(joint)
    calls = [node for node in joint.graph.nodes if node.op == "call_function"]
    by_site: dict[str, sympy.Expr] = dict.fromkeys(taken, sympy.Integer(0))
    for node in calls:
        site = mark_of(node).site
        if site in by_site:
            by_site[site] += node_flops(node)
    return Candidate(taken, cost, *cost.at(size_hints(joint)), len(calls), by_site)


def _as_written(
    module: GraphModule,
    roles: Roles,
    seeded: bool,
    captured: GraphModule,
    promoted: Sequence[int],
    found: Sequence[Site],
) -> _Built:
    """Trace the captured graph itself, derivatives and all, under autograd: never dearer than as
    written."""
    like = [value_of(results(module.graph)[i]) for i in roles.differentiable]
    # PyTorch's own higher derivatives of norm layers are wrong; their formulas' are not.
    captured = copy_graph(captured)
    left = list(found)
    for node in captured.graph.nodes:
        node.target = WRITTEN_OUT.get(node.target, node.target)
        note(node, role="primal", stage="flatten")
        here = [site for site in left if site.where == where(node)]
        if node.target in DERIVATIVES and here:
            note(node, site=here[0].name)
            left.remove(here[0])
        if node.target in KINDS:
            node.target, node.args = layer_by_layer, (KINDS[node.target], *node.args)
    captured.recompile()

    def run(inputs: list[Any]) -> list[Any]:
        for i in roles.updated:
            inputs[i] = inputs[i].clone()
        with levels_restored():
            outputs = Tracked(captured, derivatives=DERIVATIVES).run(*inputs)
        return [*outputs, *(inputs[i] for i in roles.updated)]

    start = time.perf_counter()
    joint = trace_step(
        run,
        example_inputs(module),
        roles,
        leaves=[i for i in roles.wanted if i not in promoted],
        cotangents=[torch.empty_like(value) for value in like] if seeded else [],
    )
    candidate = _priced({site.name: AS_WRITTEN for site in found}, joint)
    return _Built(candidate, module, joint, 0.0, time.perf_counter() - start)
