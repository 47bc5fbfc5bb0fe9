"""What the examples share: the comparison of times, the progress bar, the options."""

import argparse
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rewriter import OptimizedLoss, Report
from rewriter.bench import (
    Contender,
    comparison,
    compiled_as_written,
    measure,
    nothing_compiled_before,
    refusals,
)

console = Console()


def print_comparison(title: str, contenders: list[Contender]) -> None:
    """Print the measured contenders beside the first one, and the reason of each that failed."""
    console.print(comparison(title, contenders))
    for line in refusals(contenders):
        console.print(line, markup=False)


def take_first_steps(contenders: list[Contender], *arguments: object, backend: str) -> None:
    """Let each contender take its first step with nothing compiled before."""
    with console.status("starting the compiler") as status, nothing_compiled_before(backend):
        for contender in contenders:
            status.update(f"first step: {contender.name}")
            contender.first_step(*arguments)


def compare(
    title: str,
    loss: OptimizedLoss,
    inputs: Iterable[torch.Tensor],
    *arguments: object,
    options: argparse.Namespace,
    stock: bool = True,
) -> Report:
    """Print the report on a decorated loss, and its time per step beside the loss as written.

    `stock` says whether torch.compile of the loss as written takes part too.
    """
    inputs, stocks = list(inputs), {}
    if stock:
        form = compiled_as_written(loss.as_written, options.backend)
        stocks = {"torch.compile\n(trace_autograd_ops)": form}
    forms = {"as written (eager)": loss.as_written, **stocks, "optimize_nested": loss}
    contenders = [Contender(name, form, inputs) for name, form in forms.items()]
    take_first_steps(contenders, *arguments, backend=options.backend)
    report = loss.explain(*arguments)
    print(report)
    contenders[0].flops, contenders[-1].flops = report.flops_as_written, report.flops
    measure(contenders, *arguments, rounds=options.rounds)
    print_comparison(title, contenders)
    return report


def progress_bar() -> Progress:
    """Make a progress bar: description, steps done, time, and the task's text `status`."""
    counts = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    description, status = TextColumn("{task.description}"), TextColumn("{task.fields[status]}")
    return Progress(description, *counts, status, console=console)


def option_parser(description: str, out: str) -> argparse.ArgumentParser:
    """Make the parser with the options that every example has; `out` is the picture's default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="about two minutes on two cores")
    parser.add_argument("--steps", type=int, help="training steps (default: by --quick)")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=out, help="where the picture goes (default: %(default)s)")
    return parser
