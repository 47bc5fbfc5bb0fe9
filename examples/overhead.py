"""What a call of a decorated loss costs beyond the code that it runs.

    python -m examples.overhead                    MLP 2-32-32-32-1, batch 128, gradient penalty
    python -m examples.overhead --rounds 3000      the same, steadier
    python -m examples.overhead --as-written       a loss that is not captured, beside eager

The ways take turns in one process (A B A B). The bare graph is the compiled joint graph as Inductor
returns it, loss and gradients in one call, without autograd; the code is the same past the wrapper
that AOTAutograd puts around it, as ours calls it; the least is an `autograd.Function` that runs the
code and hands its gradients to `backward()` as they are, unguarded: no step that has a `backward()`
costs less.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.bench import compiled_as_written
from rewriter.codegen import Unwrapped, compile_graph
from rewriter.options import BACKENDS


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    """WGAN-GP's penalty on the norm of the gradient; ``x`` requires grad, shape (batch, 2)."""
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean()


def network(width: int = 32) -> nn.Sequential:
    """An MLP 2-32-32-32-1 with tanh."""
    hidden = [nn.Linear(2, width), nn.Tanh()]
    for _ in range(2):
        hidden += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


class HandedOut(torch.autograd.Function):
    """Run a graph that returns one loss and its gradients; hand these out."""

    @staticmethod
    def forward(ctx: Any, graph: Callable[..., Any], inputs: list[Tensor], *wanted: Tensor) -> Any:
        value, *gradients = graph(*inputs)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return (None, None, *ctx.saved_tensors)


def without_autograd(code: Callable[..., object], inputs: list[Tensor]) -> object:
    with torch.no_grad():
        return code(*inputs)


def ways(net: nn.Module, x: Tensor, backend: str) -> dict[str, Callable[[], object]]:
    """Return the ways to take a step, and parts of ours; each is compiled."""
    ours, compiled = (
        optimize_nested(penalty, backend=backend),
        compiled_as_written(penalty, backend),
    )
    inputs = ours.inputs_of(net, x)
    ours(net, x).backward()
    (step,) = ours.steps
    code = compile_graph(step.rewritten.joint, backend, "default", strict=True)
    graph = code.wrapped if isinstance(code, Unwrapped) else code
    wanted = [inputs[i] for i in step.roles.wanted]

    found: dict[str, Callable[[], object]] = {
        "bare graph": lambda: without_autograd(graph, inputs),
        "its code": lambda: without_autograd(code, inputs),
        "least": lambda: HandedOut.apply(code, inputs, *wanted).backward(),
        "ours": lambda: ours(net, x).backward(),
        "eager": lambda: penalty(net, x).backward(),
        "torch.compile, with the flag": lambda: compiled(net, x).backward(),
        "step": lambda: step(*inputs),
        "call": lambda: ours(net, x),
    }
    for way in found.values():
        way()
    return found


def measured(
    found: dict[str, Callable[[], object]], net: nn.Module, x: Tensor, rounds: int
) -> dict[str, Any]:
    """Return the microseconds of each way in each round; what it returns lives as long as the
    gradients of a training loop do."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, way in found.items():
            for _ in range(3):  # the first finds the other ways' code and data in the caches
                net.zero_grad()
                x.grad = None
                start = time.perf_counter_ns()
                result = way()
                microseconds = (time.perf_counter_ns() - start) / 1e3
                del result
            times[name].append(microseconds)
    return times


def report(times: dict[str, Any]) -> list[Table]:
    """Return the ways as a table, and what ours consists of as another."""
    least = {name: min(found) for name, found in times.items()}
    middle = {name: statistics.median(found) for name, found in times.items()}
    steps = Table(title="A step, µs", box=SIMPLE_HEAD)
    pieces = Table(title="What ours consists of, µs", box=SIMPLE_HEAD)
    for table, headings in (
        (steps, ("", "min", "median", "beyond the bare graph")),
        (pieces, ("", "min", "median")),
    ):
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in list(times)[:6]:
        beyond = "" if name == "bare graph" else f"{least[name] - least['bare graph']:+.0f}"
        steps.add_row(name, f"{least[name]:.0f}", f"{middle[name]:.0f}", beyond)
    for piece, whole, part in (
        ("compiled code", "its code", None),
        ("autograd node, gradients kept", "step", "its code"),
        ("guards and call", "call", "step"),
        ("backward()", "ours", "call"),
    ):
        cells = (by[whole] - (by[part] if part else 0) for by in (least, middle))
        pieces.add_row(piece, *(f"{cell:.0f}" for cell in cells))
    return [steps, pieces]


def refused(net: nn.Module, x: Tensor) -> Tensor:
    """The penalty with a line that no graph can hold."""
    open(os.devnull).close()
    return penalty(net, x)


def sum_of(x: Tensor, y: Tensor) -> Tensor:
    """A loss of two operators, with such a line."""
    open(os.devnull).close()
    return (x * y).sum()


def as_written(rounds: int) -> Table:
    """Return what a call costs of a loss that runs as written: processor time, in turns."""
    x = torch.randn(128, 2, requires_grad=True)
    cases = {
        "two operators": (sum_of, (x, torch.randn(128, 2)), 200),
        "penalty, MLP": (refused, (network(), x), 20),
    }
    table = Table("", "eager", "ours", "beyond", title="A step as written, µs", box=SIMPLE_HEAD)
    for name, (loss, given, calls) in cases.items():
        ours = optimize_nested(loss, capture="dynamo")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(20):  # the first are captured, refused, raced
                ours(*given).backward()
        times: dict[Any, list[float]] = {loss: [], ours: []}
        for _ in range(max(1, rounds // calls)):
            for way, found in times.items():
                start = time.process_time_ns()
                for _ in range(calls):
                    way(*given).backward()
                found.append((time.process_time_ns() - start) / 1e3 / calls)
        eager, mine = (min(found) for found in times.values())
        table.add_row(name, f"{eager:.1f}", f"{mine:.1f}", f"{mine - eager:+.1f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="inductor", choices=BACKENDS)
    parser.add_argument("--as-written", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.as_written:
        Console().print(as_written(given.rounds))
        return
    net, x = network(), torch.randn(128, 2, requires_grad=True)
    for table in report(measured(ways(net, x, given.backend), net, x, given.rounds)):
        Console().print(table)


if __name__ == "__main__":
    main()
