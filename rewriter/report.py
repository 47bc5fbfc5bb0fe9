"""The record of what was done to a loss."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from rich.console import Console
from rich.text import Text
from torch.fx import GraphModule

from passes.price import size_hints
from rewriter.budget import Spent
from rewriter.diff import StageDiff, diff_stages
from rewriter.files import write_whole
from rewriter.forms import Candidate
from rewriter.page import render_html, render_svg
from rewriter.report_html import table_of
from rewriter.report_nodes import nodes_of
from rewriter.report_text import text_of
from rewriter.rewrite import Stage
from rewriter.sources import Source, place_of, shown
from rewriter.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class Considered:
    """A strategy that a site could take.

    Attributes:
        strategy: Its name.
        accepted: Whether it applies.
        reason: Why it does not, or why it was not taken.
        candidate: The best form of the whole step that has it at this site; None if there is none.
    """

    strategy: str
    accepted: bool
    reason: str
    candidate: Candidate | None = None


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
        candidates: Every strategy that was considered.
        flops: FLOPs of its value and its pullback; 0 where the site is as written and cannot be
            told apart.
        flops_formula: The same in the symbolic sizes.
    """

    name: str
    where: str
    operator: str
    order: int
    status: str
    strategy: str
    reason: str
    candidates: tuple[Considered, ...] = ()
    flops: int = 0
    flops_formula: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))


@dataclass(frozen=True, repr=False)
class Report:
    """What was captured, chosen and built for one specialisation of a loss.

    Attributes:
        sites: One record per nested derivative.
        stages: The graph after each pass.
        candidates: Every form that was priced.
        taken: The one of them that runs.
        untried: Changes of strategies that looked worth a trial when there were enough forms, or
            when those that there were had enough operators.
        not_traced: Names of sites, those together that depend on one another → the FLOPs that every
            strategy but theirs costs there at least, for which no form with another was traced.
        flops: Matmul and convolution FLOPs of the whole step (loss and gradients) as rewritten.
        flops_as_written: The same for the loss as written.
        flops_formula: ``flops`` in the symbolic sizes.
        flops_as_written_formula: ``flops_as_written`` in the symbolic sizes.
        bytes_moved: Bytes that the rewritten graph's operators read and write, each on its own.
        kernels: Groups of its pointwise operators that one kernel each can compute.
        bytes_kept: The most bytes that computed values fill at one moment, when the joint graph
            runs in its own order and each value is freed after its last use; inputs do not count.
        bytes_kept_as_written: The same for the loss as written, run by eager.
        matmuls: Matrix products and convolutions of the step as rewritten.
        matmuls_as_written: The same for the loss as written.
        kernels_as_written: Kernels that eager launches, matrix products among them.
        graph: The joint graph; runnable.
        captured: Whether the loss was captured; if not, ``reason`` says why, ``layers`` what became
            of the modules it has called so far, and the graphs are absent.
        remedy: What would make one graph of a loss that was not captured, as far as it was tried.
        raced: What the clock has decided between two exact forms, with the time of each.
        way: How calls are captured: ``"dynamo"``, ``"trace"`` (a recording), ``"layers"``
            or ``"as written"``.
        refused_before: Why the loss is not captured by Dynamo, if it is by a recording.
        function: The loss's name.
        inputs: What the graph takes, by name: ``{"net.0.weight": "f32[32, 2]"}``.
        sources: The user's functions that nodes come from.
        breaks: Why calls of the loss were not captured, each kind of call once.
        recompiles: What each specialisation of the loss so far holds for.
        spent: How often the loss was captured so far, how long that took, and which values that
            keep changing were made inputs or given up.
        verified: What came of comparing the specialisation with the loss as written; empty before
            its first call.
        tiers: With ``start="tiered"``, a line for each graph: whether it runs op by op or compiled,
            and when the switch came.
    """

    sites: tuple[SiteReport, ...] = ()
    stages: tuple[Stage, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    taken: Candidate | None = None
    untried: int = 0
    not_traced: Mapping[frozenset[str], int] = field(default_factory=dict)
    flops: int = 0
    flops_as_written: int = 0
    flops_formula: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    flops_as_written_formula: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    bytes_moved: int = 0
    kernels: int = 0
    bytes_kept: int = 0
    bytes_kept_as_written: int = 0
    matmuls: int = 0
    matmuls_as_written: int = 0
    kernels_as_written: int = 0
    graph: GraphModule | None = None
    captured: bool = True
    reason: str = ""
    layers: tuple[str, ...] = ()
    remedy: str = ""
    raced: tuple[str, ...] = ()
    way: str = "dynamo"
    refused_before: str = ""
    function: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    breaks: tuple[str, ...] = ()
    recompiles: tuple[str, ...] = ()
    spent: Spent = field(default_factory=Spent)
    tiers: tuple[str, ...] = ()
    verified: str = ""

    def stage(self, name: str) -> Stage:
        """Return a stage by name.

        Raises:
            KeyError: There is no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages) or "none: the loss was not captured"
        raise KeyError(f"no stage {name!r}; the stages are {names}")

    def diff(self, first: str, second: str) -> StageDiff:
        """Return what changed between two stages, by name; it prints.

        Raises:
            KeyError: There is no such stage.
        """
        return diff_stages(*(self._stage_record(self.stage(name)) for name in (first, second)))

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as plain data: numbers, strings, lists and dicts.

        ``format`` changes when the meaning of a key does. Beside what `summary` returns, each of
        ``stages`` has its ``nodes``:

        - ``id``: what the computation is called in every stage, and ``name`` in this one's graph;
        - ``op``, ``kind`` (``input``, ``call``, ``site`` or ``output``) and ``inputs`` (ids);
        - ``role``, ``module``, ``site`` and ``stage``: `passes.origin.Origin`;
        - ``where`` (``file:line: code``), ``path`` and ``line``;
        - ``tensor``, ``flops``, ``flops_formula`` and ``bytes`` (read and written);
        - ``body``: the nodes of a derivative that is still one node.
        """
        return {**self.summary(), "stages": [self._stage_record(s) for s in self.stages]}

    def _stage_record(self, stage: Stage) -> dict[str, Any]:
        hints = size_hints(self.graph) if self.graph is not None else {}
        by_line = {site.where: site.name for site in reversed(self.sites)}
        return {**_stage_summary(stage), "nodes": nodes_of(stage.module, hints, by_line)}

    def summary(self) -> dict[str, Any]:
        """Return what `to_dict` does, without the nodes of the stages."""
        return {
            "format": FORMAT,
            "function": self.function,
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "optimize_nested": __version__,
            },
            "captured": self.captured,
            "reason": self.reason,
            "layers": list(self.layers),
            "remedy": self.remedy,
            "raced": list(self.raced),
            "way": self.way,
            "refused_before": self.refused_before,
            "inputs": [{"name": name, "tensor": tensor} for name, tensor in self.inputs.items()],
            "sources": [
                {"path": s.path, "first_line": s.first_line, "lines": list(s.lines)}
                for s in self.sources
            ],
            "sites": [_site_record(site) for site in self.sites],
            "candidates": [
                {
                    "name": name,
                    "strategies": dict(c.strategies),
                    **_price_record(c),
                    "taken": c is self.taken,
                }
                for name, c in zip(_names(self.candidates), self.candidates, strict=True)
            ],
            "untried": self.untried,
            "not_traced": [
                {
                    "sites": [site.name for site in self.sites if site.name in part],
                    "flops_at_least": least,
                }
                for part, least in self.not_traced.items()
            ],
            "stages": [_stage_summary(stage) for stage in self.stages],
            "totals": {
                "flops": self.flops,
                "flops_as_written": self.flops_as_written,
                "flops_formula": str(self.flops_formula),
                "flops_as_written_formula": str(self.flops_as_written_formula),
                "bytes_moved": self.bytes_moved,
                "bytes_kept": self.bytes_kept,
                "bytes_kept_as_written": self.bytes_kept_as_written,
                "kernels": self.kernels,
                "matmuls": self.matmuls,
                "matmuls_as_written": self.matmuls_as_written,
                "kernels_as_written": self.kernels_as_written,
                "nodes": _operators(self.graph),
            },
            "breaks": list(self.breaks),
            "recompiles": list(self.recompiles),
            "captures": {**self.spent.to_dict(), "text": str(self.spent)},
            "tiers": list(self.tiers),
            "verified": self.verified,
        }

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a file, whole or not at all.

        Raises:
            OSError: The file cannot be written; one that was there is as it was.
        """
        write_whole(path, json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page of HTML to look around in: source, graphs, choices and FLOPs; it needs no
        network.

        Raises:
            OSError: The file cannot be written; one that was there is as it was.
        """
        write_whole(path, render_html(self.to_dict()))

    def to_svg(self, path: str | os.PathLike[str], stage: str = "") -> None:
        """Write a picture of a stage's graph, by name; of the last one if left out.

        Raises:
            ValueError: The loss was not captured, or has no such stage.
            OSError: The file cannot be written; one that was there is as it was.
        """
        write_whole(path, render_svg(self.to_dict(), stage))

    def __str__(self) -> str:
        return text_of(self.summary()).plain

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> Text:
        return text_of(self.summary())

    def _repr_html_(self) -> str:
        return table_of(self.summary())

    def print(self) -> None:
        """Print the report: in colours on a terminal, as plain text where the output is piped.

        ``print(report)`` and ``str(report)`` are always plain.
        """
        Console().print(self, soft_wrap=True)


def _operators(graph: GraphModule | None) -> int:
    nodes = graph.graph.nodes if graph is not None else ()
    return sum(node.op == "call_function" for node in nodes)


def _stage_summary(stage: Stage) -> dict[str, Any]:
    return {
        "name": stage.name,
        "seconds": round(stage.seconds, 4),
        "changes": stage.changes,
        "maker": stage.maker,
        "operators": _operators(stage.module),
    }


def _site_record(site: SiteReport) -> dict[str, Any]:
    path, line, code = place_of(site.where)
    return {
        "name": site.name,
        "path": shown(path) if path else "",
        "line": line,
        "code": code,
        "operator": site.operator,
        "order": site.order,
        "status": site.status,
        "strategy": site.strategy,
        "reason": site.reason,
        "flops": site.flops,
        "flops_formula": str(site.flops_formula) if site.flops_formula != 0 else "",
        "candidates": [
            {
                "strategy": c.strategy,
                "accepted": c.accepted,
                "reason": c.reason,
                "step": None if c.candidate is None else _price_record(c.candidate),
            }
            for c in site.candidates
        ],
    }


def _names(candidates: Sequence[Candidate]) -> list[str]:
    """Name each form by the strategies that tell it from the others: the one most sites have, then
    the sites that have another."""
    forms = [c.strategies for c in candidates]
    sites = forms[0] if forms else {}
    telling = [n for n in sites if len({form[n] for form in forms}) > 1] or list(sites)
    names = []
    for form in forms:
        (usual, _), *_ = Counter(form[n] for n in telling).most_common(1) or [("no site", 0)]
        others = [f"{n} {form[n]}" for n in telling if form[n] != usual]
        names.append(", ".join([usual, *others]))
    return names


def _price_record(candidate: Candidate) -> dict[str, Any]:
    price = candidate.price
    return {
        "flops": candidate.flops,
        "flops_formula": str(price.flops),
        "bytes_moved": candidate.bytes_moved,
        "bytes_moved_formula": str(price.bytes_moved),
        "bytes_kept": candidate.bytes_kept,
        "bytes_kept_formula": str(price.bytes_kept),
        "kernels": candidate.kernels,
        "nodes": candidate.nodes,
        "seconds": candidate.seconds,
    }
