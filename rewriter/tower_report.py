"""The record of what a module's calls have built."""

from __future__ import annotations

from dataclasses import dataclass, field

from passes.price import evaluated, price, size_hints
from rewriter.budget import Spent
from rewriter.report_text import si
from rewriter.tower import CompiledLevel


@dataclass(frozen=True)
class LevelReport:
    """One graph of a tower.

    Attributes:
        order: 0 for the module's own value, 1 for a derivative of it, …
        what: ``"value"``, ``"pullback"``, ``"pushforward"``; ``"…, continued"`` where a result is
            computed from another, ``"… of a batch"`` under a vmap.
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
        spent: How often the module was captured, and what changed.
    """

    name: str
    levels: tuple[LevelReport, ...] = ()
    reasons: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    spent: Spent = field(default_factory=Spent)

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {sum(level.what == 'value' for level in self.levels)} specialisation(s)"
        ]
        for level in self.levels:
            work = f"{si(level.flops)}FLOP, {level.nodes} operators" if level.nodes else "not run"
            lines.append(f"  {'  ' * level.order}level {level.order}, {level.what}: {work}")
        lines += [f"  runs as written: {reason}" for reason in self.reasons]
        lines += [f"    {line}" for line in self.layers]
        if self.spent.captures > 1:
            lines.append(f"  {self.spent}")
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
