"""Gather the report of a rewritten loss."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from torch.fx import GraphModule

from passes.graph import describe, placeholders, value_of
from passes.nest import Site
from passes.origin import origin_of, readable
from passes.price import count_matmuls, evaluated, size_hints
from passes.strategies import CONTRACTION, NAMES
from rewriter.as_written import bytes_kept
from rewriter.budget import Spent
from rewriter.choose import Choice
from rewriter.forms import AS_WRITTEN, REVERSE, Candidate
from rewriter.report import Considered, Report, SiteReport
from rewriter.rewrite import Rewritten
from rewriter.sources import Source, place_of, sources_of

MEASURED = "the fastest on the arguments of the first call"


def make_report(
    rewritten: Rewritten,
    *,
    specialisations: Sequence[Rewritten] = (),
    breaks: Sequence[str] = (),
    tiers: Sequence[str] = (),
    spent: Spent | None = None,
    raced: Sequence[str] = (),
    verified: str = "",
) -> Report:
    """Build the report of a rewritten loss.

    Args:
        rewritten: The specialisation to report.
        specialisations: All there are so far.
        breaks: Why calls of the loss were not captured.
        tiers: What runs its graphs at present.
        raced: What the clock has said.
        spent: What captures have come to.
        verified: What came of comparing it with the loss as written.
    """
    taken = rewritten.choice.taken
    hints = size_hints(rewritten.joint)
    sites = tuple(_site_report(rewritten, site, hints) for site in rewritten.sites)
    return Report(
        sites=sites,
        stages=rewritten.stages,
        candidates=rewritten.choice.candidates,
        taken=taken,
        untried=rewritten.choice.untried,
        not_traced=rewritten.choice.at_least,
        flops=taken.flops,
        flops_as_written=evaluated(rewritten.as_written.flops, hints),
        flops_formula=taken.price.flops,
        flops_as_written_formula=rewritten.as_written.flops,
        bytes_moved=taken.bytes_moved,
        kernels=taken.kernels,
        bytes_kept=taken.bytes_kept,
        bytes_kept_as_written=bytes_kept(rewritten.captured, rewritten.flat.promoted),
        matmuls=count_matmuls(rewritten.joint),
        matmuls_as_written=rewritten.as_written.matmuls,
        kernels_as_written=rewritten.as_written.kernels,
        graph=rewritten.joint,
        function=rewritten.function,
        inputs=_inputs(rewritten),
        sources=_sources(rewritten),
        breaks=tuple(breaks),
        recompiles=_recompiles(specialisations),
        spent=spent or Spent(),
        tiers=tuple(tiers),
        raced=tuple(raced),
        verified=verified,
    )


def _inputs(rewritten: Rewritten) -> dict[str, str]:
    """Return the inputs of the joint graph by name; those after the loss's own are cotangents."""
    nodes = placeholders(rewritten.joint.graph)
    names = [readable(name) for name in rewritten.names]
    names += [f"cotangent of output {i}" for i in rewritten.roles.differentiable]
    return {name: describe(value_of(node)) for name, node in zip(names, nodes, strict=False)}


def _sources(rewritten: Rewritten) -> tuple[Source, ...]:
    modules = [part for s in rewritten.stages for part in s.module.modules()]
    graphs = [part.graph for part in modules if isinstance(part, GraphModule)]
    found = {origin_of(node).where for graph in graphs for node in graph.nodes}
    found.update(site.where for site in rewritten.sites)
    return sources_of(place_of(where)[:2] for where in found)


def _recompiles(specialisations: Sequence[Rewritten]) -> tuple[str, ...]:
    """Say what each specialisation holds for; of a later one, in what it differs from the first."""
    lines, first = [], {}
    for number, rewritten in enumerate(specialisations, start=1):
        inputs = _inputs(rewritten)
        for position in rewritten.roles.wanted:
            inputs[readable(rewritten.names[position])] += " requires grad"
        if number == 1:
            first = inputs
            lines.append(", ".join(f"{name} {kind}" for name, kind in inputs.items()))
            continue
        changed = [
            f"{n} {inputs.get(n, 'absent')}"
            for n in {**first, **inputs}
            if inputs.get(n) != first.get(n)
        ]
        same = "the same tensors; a Python value, a module's mode or a global differs"
        lines.append(", ".join(changed) or same)
    return tuple(lines)


def _site_report(rewritten: Rewritten, site: Site, hints: dict[sympy.Symbol, int]) -> SiteReport:
    choice = rewritten.choice
    strategy = choice.taken.strategies[site.name]
    formula = choice.taken.site_flops.get(site.name, sympy.Integer(0))
    return SiteReport(
        name=site.name,
        where=site.where,
        operator=site.operator,
        order=site.order,
        status="as written" if strategy in (REVERSE, AS_WRITTEN) else "rewritten",
        strategy=strategy,
        reason=_reason(choice, site.name),
        candidates=tuple(_considered(choice, site.name)),
        flops=evaluated(formula, hints),
        flops_formula=formula,
    )


def _reason(choice: Choice, name: str) -> str:
    """Say why a site has the strategy that it has."""
    taken = choice.taken
    refused = [f"{s} refused: {r}" for (site, s), r in choice.refusals.items() if site == name]
    others = [c for c in choice.candidates if c.strategies[name] != taken.strategies[name]]
    if name in choice.asked:
        return "asked for"
    if taken.seconds is not None:
        least = min(c.seconds for c in choice.candidates if c.seconds is not None)
        is_first = taken.seconds == least
        return MEASURED if is_first else f"{MEASURED} but for noise, and cheaper"
    if taken.strategies[name] == AS_WRITTEN:
        return "every rewritten form costs more FLOPs than what is written"
    if _not_traced(choice, name):
        return "fewest FLOPs: no other strategy can cost less"
    if not others and refused:
        return "; ".join(refused)
    if not others:
        return "every other strategy gives the same form here"
    if all(other.flops > taken.flops for other in others):
        return "fewest FLOPs"
    return "fewest FLOPs, and first among equals"


def _considered(choice: Choice, name: str) -> list[Considered]:
    """Return every strategy that was built or refused at a site, in the order of trial; each with
    the best form that has it there."""
    taken = choice.taken
    found = {
        strategy: Considered(strategy, False, reason)
        for (site, strategy), reason in choice.refusals.items()
        if site == name
    }
    for strategy in dict.fromkeys(c.strategies[name] for c in choice.candidates):
        having = [c for c in choice.candidates if c.strategies[name] == strategy]
        best = min(having, key=lambda c: c.preference)
        if strategy == taken.strategies[name]:
            found[strategy] = Considered(strategy, True, "taken", taken)
        else:
            found[strategy] = Considered(strategy, True, _compared(best, taken), best)
    for least in _not_traced(choice, name):
        for strategy in (s for s in NAMES if s != CONTRACTION):  # it is not bounded
            found.setdefault(
                strategy, Considered(strategy, True, f"not traced: at least {least} FLOPs here")
            )
    return list(found.values())


def _not_traced(choice: Choice, name: str) -> list[int]:
    """Return what the strategies at a site that were not traced cost at least; nothing if all
    were."""
    return [least for part, least in choice.at_least.items() if name in part]


def _compared(other: Candidate, taken: Candidate) -> str:
    """Say why a form was not taken."""
    if other.seconds is not None and taken.seconds is not None:
        return f"{other.seconds / taken.seconds:.2f} times as long"
    more = other.flops - taken.flops
    if more:
        return f"{abs(more)} FLOPs {'more' if more > 0 else 'fewer'} in the whole step"
    return "as many FLOPs, later in the order of strategies"
