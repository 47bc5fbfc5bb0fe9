"""What keeps a loss from one graph: each obstacle in turn, by probing past those before it.

A probe captures the loss with a statement left out, or with the Python numbers that it had in a
run; nothing of what is found this way is ever run in the loss's place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rewriter.edits import Edit, Place, edited, host_values, is_left_out, observed, place_of
from rewriter.remedies import kind_of
from rewriter.report import Report

MOST = 12

LEFT_OUT, STOOD_IN, NOT_PASSED = "left out", "its numbers stood in for it", "not looked past"


@dataclass(frozen=True)
class Obstacle:
    """Something that keeps a loss from one graph.

    Attributes:
        path: The user's file; empty if it is not known.
        line: The line in it; 0 if it is not known.
        code: What it says.
        reason: Why it is in the way.
        kind: The kind of that, from the table of `rewriter.remedies`.
        remedy: What to do; empty where the table does not know.
        passed: How it was looked past.
    """

    path: str
    line: int
    code: str
    reason: str
    kind: str
    remedy: str
    passed: str

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.path else "?"
        lines = [f"{where}: {self.code}" if self.code else where, f"    {self.reason}"]
        lines += [f"    remedy ({self.kind}): {self.remedy}"] if self.remedy else []
        lines += [] if self.passed != NOT_PASSED else ["    what comes after it is not known"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Findings:
    """What keeps a loss from one graph, and what that graph would gain.

    Attributes:
        function: The loss's name.
        obstacles: In the order in which they are met.
        is_all: Whether the loss is one graph without them.
        flops: Matmul and convolution FLOPs of that graph, loss and gradients.
        flops_as_written: Those of the loss as written.
        kernels: Its kernels, before a compiler fuses more.
        kernels_as_written: Those that eager launches.
    """

    function: str
    obstacles: tuple[Obstacle, ...]
    is_all: bool
    flops: int = 0
    flops_as_written: int = 0
    kernels: int = 0
    kernels_as_written: int = 0

    @property
    def gain(self) -> str:
        """What one graph would gain, in words; empty where it is not known."""
        if not (self.is_all and self.kernels):
            return ""
        words = [f"{self.kernels_as_written / self.kernels:.2g} × fewer kernels"]
        if self.flops and self.flops_as_written > 1.05 * self.flops:
            words.append(f"{self.flops_as_written / self.flops:.2g} × fewer FLOPs")
        return " and ".join(words)

    @property
    def advice(self) -> str:
        """What would help, in one line; empty where nothing is known."""
        if not self.obstacles:
            return ""
        first = self.obstacles[0]
        file = first.path.replace("\\", "/").rpartition("/")[2]
        names = [f"`{_cut(first.code)}` at {file}:{first.line}" if first.path else first.reason]
        if len(self.obstacles) > 1:
            more = len(self.obstacles) - 1
            names.append(f"{more} more obstacle{'s' if more > 1 else ''}")
        verb = "keeps" if len(names) == 1 else "keep"
        text = f"{' and '.join(names)} {verb} this loss from one graph"
        text += f"; without {'it' if len(names) == 1 else 'them'} {self.gain}" if self.gain else ""
        text += "" if self.is_all else ", and perhaps others"
        return text + (f"; {first.remedy}" if first.remedy else "")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        found = asdict(self)
        return {**found, "obstacles": list(found["obstacles"]), "gain": self.gain}

    def __str__(self) -> str:
        if not self.obstacles:
            return f"{self.function} is one graph: {self.gain}"
        number = len(self.obstacles)
        head = f"{self.function}: {number} obstacle{'s' if number > 1 else ''} to one graph"
        lines = [head, *(f"{i}. {o}" for i, o in enumerate(self.obstacles, start=1))]
        if self.gain:
            lines.append(f"without {'them' if number > 1 else 'it'}: {self.gain}")
        return "\n".join(lines)


def _cut(code: str) -> str:
    return code if len(code) <= 60 else code[:59] + "…"


def find_obstacles(
    explain: Callable[[], Report],
    run: Callable[[], object] | None = None,
    *,
    first: Report | None = None,
    most: int = MOST,
) -> Findings:
    """Return what keeps a loss from one graph.

    Args:
        explain: Captures the loss anew and reports; runs nothing.
        run: Runs the loss as written, so that the numbers that host code reads are known; without,
            only what can be left out is looked past.
        first: What the loss as it is gives, if that is known.
        most: How many obstacles are looked for.
    """
    edits: list[Edit] = []
    found: list[Obstacle] = []
    report = first or _quietly(explain)
    while not report.captured and len(found) < most:
        place = _first_place(report)
        edit = None if place is None else _past(place, edits, run)
        is_again = place is not None and any(place == known.place for known in edits)
        if edit is None or is_again:
            if not is_again:
                found.append(_obstacle(report, place, NOT_PASSED))
            break
        obstacle = _obstacle(report, place, LEFT_OUT if edit.values is None else STOOD_IN)
        try:
            with edited([*edits, edit]):
                after = _quietly(explain)
        # Something later needed the statement, and whatever that raises says no more than this.
        except Exception:
            after = report
        if not after.captured and _first_place(after) == place:
            found.append(_obstacle(report, place, NOT_PASSED))
            break
        found.append(obstacle)
        edits.append(edit)
        report = after
    return Findings(
        report.function,
        tuple(found),
        report.captured,
        report.flops,
        report.flops_as_written,
        report.kernels + report.matmuls,
        report.kernels_as_written,
    )


def _quietly(explain: Callable[[], Report]) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explain()


def _first_place(report: Report) -> Place | None:
    """Return the statement that the refusal names."""
    _, at, where = report.reason.rpartition(" (at ")
    return place_of(where.removesuffix(")")) if at else None


def _past(place: Place, edits: list[Edit], run: Callable[[], object] | None) -> Edit | None:
    if is_left_out(place):
        return Edit(place)
    wanted = host_values(place)
    if run is None or not wanted:
        return None
    with observed(place, edits) as values, torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
    return Edit(place, values) if set(values) == set(wanted) else None


def _obstacle(report: Report, place: Place | None, passed: str) -> Obstacle:
    reason, _, _ = report.reason.partition(" (at ")
    code = "" if place is None else place.text
    kind = kind_of(reason, code)
    path, line = ("", 0) if place is None else (place.path, place.line)
    return Obstacle(path, line, code, reason, kind.name, kind.remedy, passed)
