"""The pipeline: from a captured graph to the joint graph, with a record of every stage and choice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch.fx import Graph, GraphModule, Node

from passes.graph import is_float, placeholders, print_graph, results
from passes.joint import Roles, trace_joint, trace_value
from passes.nest import NotNested, Site, active_nodes, nest, sites
from passes.price import Price, price
from passes.share import share
from passes.strategies import STRATEGIES, Refused
from passes.verify import verify
from rewriter.as_written import AsWritten, measure
from rewriter.errors import CaptureError, NotRewritten
from rewriter.flatten import Flat, flatten
from rewriter.options import Options


@dataclass(frozen=True)
class Stage:
    """A graph after one pass.

    Attributes:
        name: The pass.
        module: The graph; it can be run.
        changes: How many changes the pass made.
        seconds: How long it took.
    """

    name: str
    module: GraphModule
    changes: int
    seconds: float

    @property
    def text(self) -> str:
        """The printed graph."""
        return print_graph(self.module)


@dataclass(frozen=True)
class Candidate:
    """A form the step could take.

    Attributes:
        strategies: Site name → strategy.
        price: Of the whole joint graph.
    """

    strategies: dict[str, str]
    price: Price


@dataclass
class Rewritten:
    """A specialisation of a loss, rewritten.

    Attributes:
        captured: What Dynamo captured; run under autograd it is the loss as written.
        as_written: What one step of that costs, and which gradients it leaves.
        flat: Inputs, outputs and state of the flat graph.
        derivative: The derivative graph, every site as `passes.derivative.gradient`.
        sites: The nested derivatives.
        chosen: Site name → strategy.
        refusals: (site name, strategy) → reason.
        candidates: Every form that was priced.
        joint: Loss, state updates and gradients as one graph.
        roles: What its inputs and outputs are.
        seeded: Whether the joint graph takes the outputs' cotangents as inputs.
        stages: The graph after each pass.
    """

    captured: GraphModule
    as_written: AsWritten
    flat: Flat
    derivative: GraphModule
    sites: list[Site]
    roles: Roles
    seeded: bool
    chosen: dict[str, str] = field(default_factory=dict)
    refusals: dict[tuple[str, str], str] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    joint: GraphModule | None = None
    in_chosen_form: GraphModule | None = None
    stages: list[Stage] = field(default_factory=list)

    def value_graph(self) -> GraphModule:
        """Trace the loss's value and state updates alone."""
        return trace_value(self.derivative)


def rewrite(captured: GraphModule, options: Options) -> Rewritten:
    """Run the pipeline on a captured graph.

    Raises:
        CaptureError: The graph holds something whose meaning would be lost.
        NotRewritten: With ``strict``, a site that accepts no rewriting strategy.
    """
    stages: list[Stage] = []

    def stage(name: str, run: Callable[[], tuple[GraphModule, int]]) -> GraphModule:
        start = time.perf_counter()
        module, changes = run()
        stages.append(Stage(name, copy_graph(module), changes, time.perf_counter() - start))
        verify(module)
        return module

    flat = flatten(captured)
    as_written = measure(captured, flat.promoted)
    module = stage("flatten", lambda: (flat.module, 0))
    inputs = placeholders(module.graph)
    requiring = {inputs[i] for i in as_written.wanted}
    stage("share", lambda: (module, share(module, active_nodes(module.graph, requiring))))
    try:
        stage("nest", lambda: (module, nest(module)))
    except NotNested as error:
        raise CaptureError(str(error)) from error
    roles = Roles(
        wanted=as_written.wanted,
        unreached=as_written.unreached,
        n_outputs=flat.n_outputs,
        differentiable=as_written.differentiable,
        updated=flat.updated,
    )
    active = active_nodes(module.graph, requiring)
    _check_differentiability(module, roles, active)
    done = Rewritten(
        captured=captured,
        as_written=as_written,
        flat=flat,
        derivative=module,
        sites=[node.meta["site"] for node in sites(module)],
        roles=roles,
        seeded=not _is_one_scalar(module, roles),
        stages=stages,
    )
    _choose(done, requiring, options, stage)
    return done


def copy_graph(module: GraphModule) -> GraphModule:
    """Copy a graph; attributes are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return GraphModule(module, graph)


def _is_one_scalar(module: GraphModule, roles: Roles) -> bool:
    """Whether gradients can be computed before a cotangent is known: one scalar loss, they are linear in its cotangent."""
    if len(roles.differentiable) != 1:
        return False
    loss = results(module.graph)[roles.differentiable[0]]
    return isinstance(loss, Node) and all(size == 1 for size in loss.meta["val"].shape)


def _check_differentiability(module: GraphModule, roles: Roles, active: set[Node]) -> None:
    """Check that what carries gradients in our graph is what does in the loss as written."""
    for position, result in enumerate(results(module.graph)[: roles.n_outputs]):
        ours = isinstance(result, Node) and result in active and is_float(result)
        if position in roles.differentiable and not ours:
            raise CaptureError(f"output {position} requires grad as written and not when captured")
    for result in results(module.graph)[roles.n_outputs :]:
        if isinstance(result, Node) and result in active:
            raise CaptureError("the loss writes a value that carries a gradient to one of its inputs")


def _choose(
    done: Rewritten, requiring: set[Node], options: Options, stage: Callable[..., GraphModule]
) -> None:
    """Build each candidate, price the whole step, keep the cheapest; earlier ones win ties."""
    names = [site.name for site in done.sites]
    for name in options.strategy if isinstance(options.strategy, dict) else ():
        if name not in names:
            raise ValueError(f"strategy: no site is called {name!r}; the sites are {names}")
    wishes: list[dict[str, str]] = []
    for strategy in STRATEGIES:
        asked = {name: _asked(options, name) for name in names}
        wish = {name: asked[name] or strategy.name for name in names}
        if wish not in wishes:
            wishes.append(wish)
    best: tuple[int, int, GraphModule, GraphModule, dict[str, str]] | None = None
    for wish in wishes:
        form, taken = _built(done, requiring, wish)
        if any(candidate.strategies == taken for candidate in done.candidates):
            continue
        joint = trace_joint(form, done.roles, seeded=done.seeded)
        cost = price(joint)
        done.candidates.append(Candidate(taken, cost))
        flops, moved = cost.at(size_hints(joint))
        if best is None or flops < best[0]:
            best = (flops, moved, form, joint, taken)
    assert best is not None, "every loss has a candidate"
    _, _, form, joint, taken = best
    stage("choose", lambda: (form, sum(s != "reverse" for s in taken.values())))
    stage("joint", lambda: (joint, 0))
    done.joint, done.chosen, done.in_chosen_form = joint, taken, form
    if options.strict:
        for site in done.sites:
            reason = done.refusals.get((site.name, "jvp_over_gradient"))
            if taken[site.name] == "reverse" and reason and _asked(options, site.name) is None:
                raise NotRewritten(f"{site.name} at {site.where} would stay as written: {reason}")


def _asked(options: Options, site: str) -> str | None:
    """Return the strategy the user names for a site; the reverse form is what is written."""
    name = options.strategy_for(site)
    return None if name == "auto" else "reverse" if name == "as written" else name


def _built(
    done: Rewritten, requiring: set[Node], wish: dict[str, str]
) -> tuple[GraphModule, dict[str, str]]:
    """Return the derivative graph with each site in the form wished for, or reverse where that is refused."""
    inputs = placeholders(done.derivative.graph)
    wanted = [index for index, node in enumerate(inputs) if node in requiring]
    form = copy_graph(done.derivative)
    own = placeholders(form.graph)
    active = active_nodes(form.graph, {own[i] for i in wanted})
    by_name = {strategy.name: strategy for strategy in STRATEGIES}
    taken: dict[str, str] = {}
    for node in sites(form):
        name = node.meta["site"].name
        try:
            by_name[wish[name]].build(form, node, active)
            taken[name] = wish[name]
        except Refused as refusal:
            done.refusals[name, wish[name]] = str(refusal)
            taken[name] = "reverse"
    form.recompile()
    return form, taken


def size_hints(module: GraphModule) -> dict[sympy.Symbol, int]:
    """Return the sizes a graph with symbolic sizes was captured at."""
    hints: dict[sympy.Symbol, int] = {}
    for node in placeholders(module.graph):
        value: Any = node.meta["val"]
        sizes = [value] if not hasattr(value, "shape") else [*value.shape, *value.stride()]
        for size in sizes:
            symbolic = getattr(size, "node", None)
            if symbolic is not None:
                for symbol in symbolic.expr.free_symbols:
                    hints[symbol] = int(symbolic.shape_env.size_hint(symbol))
    return hints
