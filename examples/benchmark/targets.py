"""What the measurements should reach, and by how much they miss it."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from examples.benchmark.results import Row, Section

MOST_TIME = 1.03  # of the best form in stock PyTorch
LEAST_MEAN = 2.0  # times as fast as eager
MOST_WARM = 0.25  # of a cold first step
MOST_TIERED = 2.0  # seconds
NOISE = 1.0005  # FLOPs of a few values more are no miss


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        text: What is asked.
        cases: How many cases it asks it of.
        misses: A line for each that misses it, by how much.
    """

    text: str
    cases: int
    misses: tuple[str, ...]

    def __str__(self) -> str:
        if not self.cases:
            return f"{self.text}: not measured."
        if not self.misses:
            return f"{self.text}: met."
        of = f" by {len(self.misses)} of {self.cases}" if self.cases > 1 else ""
        return f"{self.text}: missed{of}: {'; '.join(self.misses)}."


def targets_of(section: Section) -> list[Target]:
    """Return every target, for what a machine has measured."""
    rows = {name: row for name, row in section.rows.items() if not row.ours.refusal}
    refused = [name for name, row in section.rows.items() if row.ours.refusal]
    return [
        Target("Every case runs", len(section.rows), tuple(refused)),
        _time(rows),
        _mean(rows.values()),
        _flops(rows),
        _memory(rows),
        *_first_steps(section),
    ]


def mean_over_eager(rows: Iterable[Row]) -> float:
    """Return the geometric mean of how many times as fast as eager we are."""
    return statistics.geometric_mean(row.ours.over_eager for row in rows)


def _time(rows: dict[str, Row]) -> Target:
    found = []
    for name, row in rows.items():
        best, timing = row.best_of("ECF")
        if 1 / timing.over_ours > MOST_TIME:
            found.append(f"{name} takes {1 / timing.over_ours:.2f} × {best}")
    return Target(f"At most {MOST_TIME} × the time of the best of E, C, F", len(rows), tuple(found))


def _mean(rows: Iterable[Row]) -> Target:
    listed = list(rows)
    text = f"Geometric mean over eager at least {LEAST_MEAN:g} ×"
    mean = mean_over_eager(listed) if listed else 0.0
    missed = (f"{mean:.2f} ×",) if mean < LEAST_MEAN else ()
    return Target(text if missed else f"{text} ({mean:.2f} ×)", min(len(listed), 1), missed)


def _flops(rows: dict[str, Row]) -> Target:
    asked = {name: row for name, row in rows.items() if row.figure is not None and row.flops}
    found = [
        f"{name} {row.flops['O']:.2f} F, figure {row.figure:g}"
        for name, row in asked.items()
        if row.figure is not None and row.flops["O"] > row.figure * NOISE
    ]
    return Target("FLOPs at the figure", len(asked), tuple(found))


def _memory(rows: dict[str, Row]) -> Target:
    found, asked = [], 0
    for name, row in rows.items():
        ours, compiled = row.ours.peak_bytes, row.forms["C"].peak_bytes
        if ours is None or compiled is None:
            continue
        asked += 1
        if ours > compiled:
            found.append(f"{name} {ours / 2**20:.2f} MiB, C {compiled / 2**20:.2f}")
    return Target("Peak memory at most that of C", asked, tuple(found))


def _first_steps(section: Section) -> list[Target]:
    cold, warm = [], []
    pairs = {
        name: (steps["C"], steps["O"])
        for name, steps in section.first_steps.items()
        if not steps["O"].refusal
    }
    beside = {name: pair for name, pair in pairs.items() if not pair[0].refusal}
    for name, (compiled, ours) in beside.items():
        if ours.cold > compiled.cold:
            cold.append(f"{name} {ours.cold:.1f} s, C {compiled.cold:.1f} s")
    for name, (_, ours) in pairs.items():
        if ours.warm > MOST_WARM * ours.cold:
            warm.append(f"{name} {ours.warm:.1f} s of {ours.cold:.1f} s")
    tiered = {
        name: steps["T"].cold
        for name, steps in section.first_steps.items()
        if "T" in steps and not steps["T"].refusal
    }
    late = [f"{name} {seconds:.1f} s" for name, seconds in tiered.items() if seconds > MOST_TIERED]
    return [
        Target("First step, nothing compiled before, never above C", len(beside), tuple(cold)),
        Target(
            "First step of a second process under a quarter of the first's", len(pairs), tuple(warm)
        ),
        Target('First step within 2 s with `start="tiered"`', len(tiered), tuple(late)),
    ]
