"""The record of what was done to a loss, and its one-screen text."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sympy
from torch.fx import GraphModule

from passes.graph import describe, placeholders, value_of
from passes.nest import Site
from passes.price import evaluated, price, size_hints
from rewriter.choose import AS_WRITTEN, REVERSE, Candidate
from rewriter.rewrite import Rewritten, Stage

if TYPE_CHECKING:
    from rewriter.tower import CompiledLevel


@dataclass(frozen=True)
class SiteReport:
    """What became of one nested derivative.

    Attributes:
        name: The site's name, to be used in ``strategy={name: …}``.
        where: ``file:line: code``.
        operator: ``gradient`` or ``jacobian``.
        order: 1 for a first derivative, 2 for a derivative of one, …
        status: ``"rewritten"`` or ``"as written"``.
        strategy: The strategy taken.
        reason: Why, in words.
    """

    name: str
    where: str
    operator: str
    order: int
    status: str
    strategy: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What was captured, chosen and built for one specialisation of a loss.

    Attributes:
        sites: One record per nested derivative.
        stages: The graph after each pass; each can be run.
        candidates: Every form that was priced.
        flops: Matmul and convolution FLOPs of the whole step (loss and gradients) as rewritten.
        flops_as_written: The same for the loss as written.
        flops_formula: ``flops`` in the symbolic sizes.
        bytes_moved: Bytes that the rewritten graph's operators read and write, each on its own.
        graph: The joint graph; runnable.
        captured: Whether the loss was captured; if not, ``reason`` says why, ``layers`` what became
            of the modules it has called so far, and the rest is empty.
    """

    sites: tuple[SiteReport, ...] = ()
    stages: tuple[Stage, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    flops: int = 0
    flops_as_written: int = 0
    flops_formula: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    bytes_moved: int = 0
    graph: GraphModule | None = None
    captured: bool = True
    reason: str = ""
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.captured:
            how = "captured by layer" if self.layers else "runs as written"
            return "\n  ".join([f"{how}: {self.reason}", *self.layers])
        assert self.graph is not None
        inputs = ", ".join(describe(value_of(n)) for n in placeholders(self.graph.graph))
        lines = [f"{len(self.sites)} nested derivative(s), inputs {_shortened(inputs, 80)}"]
        for site in self.sites:
            lines.append(
                f"  {site.name}: {site.operator}, order {site.order}, {site.status} "
                f"({site.strategy})"
            )
            lines.append(f"    at {_short_path(site.where)}")
            lines.append(f"    {site.reason}")
        if self.candidates:
            lines.append("candidates")
            for candidate in self.candidates:
                names = ", ".join(sorted(set(candidate.strategies.values()))) or "no site"
                lines.append(
                    f"  {names}: {_si(candidate.flops)}FLOP, {_si(candidate.bytes_moved)}B moved"
                )
        lines.append("stages")
        for stage in self.stages:
            nodes = len(stage.module.graph.nodes)
            lines.append(
                f"  {stage.name}: {nodes} nodes, {stage.changes} changes, {stage.seconds:.2f} s"
            )
        ratio = self.flops / self.flops_as_written if self.flops_as_written else 1.0
        lines.append(
            f"step: {_si(self.flops)}FLOP, as written {_si(self.flops_as_written)}FLOP "
            f"(x{ratio:.2f}), {_si(self.bytes_moved)}B moved"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class LevelReport:
    """One graph of a tower.

    Attributes:
        order: 0 for the module's own value, 1 for a derivative of it, …
        what: ``"value"``, ``"pullback"``, ``"pushforward"`` or ``"batch"``.
        flops: Matmul and convolution FLOPs of the graph that has run; 0 if none has.
        nodes: Its operators.
    """

    order: int
    what: str
    flops: int
    nodes: int


@dataclass(frozen=True)
class TowerReport:
    """What a module's calls have built so far.

    Attributes:
        name: The module's class.
        levels: The levels of each specialisation, each before those made from it.
        reasons: Why calls run as written.
        layers: What became of the modules inside of one that runs as written.
    """

    name: str
    levels: tuple[LevelReport, ...] = ()
    reasons: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {sum(level.order == 0 for level in self.levels)} specialisation(s)"]
        for level in self.levels:
            work = f"{_si(level.flops)}FLOP, {level.nodes} operators" if level.nodes else "not run"
            lines.append(f"  {'  ' * level.order}level {level.order}, {level.what}: {work}")
        lines += [f"  runs as written: {reason}" for reason in self.reasons]
        lines += [f"    {line}" for line in self.layers]
        return "\n".join(lines)


def level_reports(base: CompiledLevel) -> list[LevelReport]:
    """Return a level and all that were made from it."""
    found = []
    for order, what, compiled in base.walk():
        flops = nodes = 0
        for graph in compiled.graphs():
            flops += evaluated(price(graph).flops, size_hints(graph))
            nodes += sum(node.op == "call_function" for node in graph.graph.nodes)
        found.append(LevelReport(order, what, flops, nodes))
    return found


def make_report(rewritten: Rewritten) -> Report:
    """Build the report of a rewritten loss."""
    taken = rewritten.choice.taken
    hints = size_hints(rewritten.joint)
    return Report(
        sites=tuple(_site_report(rewritten, site) for site in rewritten.sites),
        stages=rewritten.stages,
        candidates=rewritten.choice.candidates,
        flops=taken.flops,
        flops_as_written=evaluated(rewritten.as_written.flops, hints),
        flops_formula=taken.price.flops,
        bytes_moved=taken.bytes_moved,
        graph=rewritten.joint,
    )


def _site_report(rewritten: Rewritten, site: Site) -> SiteReport:
    choice = rewritten.choice
    strategy = choice.taken.strategies[site.name]
    refused = [f"{s} refused: {r}" for (name, s), r in choice.refusals.items() if name == site.name]
    if strategy == AS_WRITTEN:
        reason = "every rewritten form costs more FLOPs than what is written"
    elif refused:
        reason = "; ".join(refused)
    elif len(choice.candidates) == 1:
        reason = "asked for"
    else:
        reason = "fewest FLOPs, or first among equals"
    return SiteReport(
        name=site.name,
        where=site.where,
        operator=site.operator,
        order=site.order,
        status="as written" if strategy in (REVERSE, AS_WRITTEN) else "rewritten",
        strategy=strategy,
        reason=reason,
    )


def _si(number: float) -> str:
    """Print with an SI prefix: ``12.3 M``."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} P"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _short_path(where: str) -> str:
    path, colon, rest = where.partition(":")
    return f"{os.path.basename(path)}{colon}{rest}"
