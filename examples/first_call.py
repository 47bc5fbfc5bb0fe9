"""What it costs to compare a loss with itself as written at its first call (`verify=True`).

    python -m examples.first_call                           some of the benchmark's workloads
    python -m examples.first_call burgers gp_mlp            those named
    python -m examples.first_call --backend inductor        compiled first: minutes

The comparison is timed alone, after a call that has compiled what it runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from examples.workloads import WORKLOADS, Case
from rewriter import OptimizedLoss, optimize_nested
from rewriter.options import BACKENDS
from rewriter.verifying import verify_step

SOME = ("gp_mlp", "burgers", "lennard_jones", "laplacian_step", "hutchinson_full", "deeponet")


def seconds(way: Callable[[], object], rounds: int) -> float:
    """Return the median of several runs."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        way()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured(case: Case, backend: str, rounds: int) -> tuple[float, float, float]:
    """Return the seconds of a step as written, of a first call that is not compared, and of the
    comparison."""

    def as_written() -> None:
        value = case.loss(*case.args)
        if case.backward:
            value.backward()

    loss = optimize_nested(case.loss, **{**case.options, "backend": backend, "verify": False})
    assert isinstance(loss, OptimizedLoss)
    first = seconds(lambda: loss(*case.args), 1)
    (step,) = loss.steps
    inputs = loss.inputs_of(*case.args)

    def compared() -> None:
        verdict = verify_step(step.rewritten, step._run, inputs, value_only=not case.backward)
        assert not verdict.is_wrong, verdict.said

    compared()
    return seconds(as_written, rounds), first, seconds(compared, rounds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = {workload.name: workload for workload in WORKLOADS}
    parser.add_argument("names", nargs="*", default=SOME, metavar="workload")
    parser.add_argument("--backend", default="eager", choices=BACKENDS)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in known]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(known)}")
    table = Table(title="Comparing at the first call, milliseconds", box=SIMPLE_HEAD)
    for heading in ("", "step as written", "first call, not compared", "comparing", "in steps"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in track(given.names, description="measuring"):
        torch.manual_seed(0)
        written, first, compared = measured(
            known[name].cases(False)[0], given.backend, given.rounds
        )
        cells = (f"{1e3 * s:.1f}" for s in (written, first, compared))
        table.add_row(name, *cells, f"{compared / written:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
