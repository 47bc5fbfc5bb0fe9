"""Time one loss evaluated in several ways, side by side; shared by the examples.

A step is the loss and its backward pass, without the optimizer. The ways take turns (A B C, A B C,
...) in one run, so that a machine that slows down or speeds up does so for all of them alike.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from unittest.mock import patch

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rewriter import OptimizedLoss, Report

Loss = Callable[..., torch.Tensor]
console = Console()


class Contender:
    """Hold one way to evaluate a loss, what its first step cost and what its later steps take.

    `inputs` are the tensors whose gradients a step fills, the same for every contender.
    """

    def __init__(self, name: str, loss: Loss, inputs: Iterable[torch.Tensor]):
        self.name = name
        self.loss = loss
        self.inputs = list(inputs)
        self.flops: float | None = None
        self.first_seconds = float("nan")
        self.gradients = torch.empty(0)
        self.refusal = ""
        self.seconds: list[float] = []

    def step(self, arguments: tuple[object, ...]) -> float:
        """Evaluate loss and backward pass from cleared gradients; return the seconds it took."""
        for tensor in self.inputs:
            tensor.grad = None
        start = time.perf_counter()
        self.loss(*arguments).backward()
        return time.perf_counter() - start

    def first_step(self, *arguments: object) -> None:
        """Take the step that compiles; keep its time and gradients, or the compiler's refusal."""
        try:
            with console.status(f"first step: {self.name}"):
                self.first_seconds = self.step(arguments)
            grads = [tensor.grad.flatten() for tensor in self.inputs if tensor.grad is not None]
            self.gradients = torch.cat(grads)
        # Whatever a compiler raises is a result: the table has the reason in place of the time.
        except Exception as error:
            reason = str(error).strip() or "no reason given"
            self.refusal = f"{type(error).__name__}: {reason.splitlines()[0]}"


def as_written(loss: Loss, inputs: Iterable[torch.Tensor]) -> Contender:
    """Enter the loss as the user wrote it, run by PyTorch op by op."""
    return Contender("as written (eager)", loss, inputs)


def compiled_as_written(loss: Loss, inputs: Iterable[torch.Tensor], backend: str) -> Contender:
    """Enter the loss as written under torch.compile, allowed to trace autograd.grad.

    The flag is off by default and is read when the loss is compiled, so it is set around each call.
    """
    compiled = torch.compile(loss, fullgraph=True, backend=backend)

    def call(*arguments: object) -> torch.Tensor:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(*arguments)

    return Contender("torch.compile\n(trace_autograd_ops)", call, inputs)


def optimized(loss: Loss, inputs: Iterable[torch.Tensor]) -> Contender:
    """Enter the loss that optimize_nested made."""
    return Contender("optimize_nested", loss, inputs)


def take_first_steps(contenders: list[Contender], *arguments: object, backend: str) -> None:
    """Let each contender take its first step with nothing compiled before, as on a new machine.

    PyTorch keeps compiled code on disk, so the cache is an empty folder meanwhile. A function of no
    interest is compiled first: imports and compiler processes are not any contender's time.
    """
    empty = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with empty as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        with console.status("starting the compiler"):
            torch.compile(lambda x: (x @ x).sin(), backend=backend)(torch.ones(4, 4))
        for contender in contenders:
            contender.first_step(*arguments)


def measure(contenders: list[Contender], *arguments: object, rounds: int, warm_up: int = 3) -> None:
    """Let the contenders take turns: `rounds` timed steps each, after `warm_up` untimed ones."""
    racing = [contender for contender in contenders if not contender.refusal]
    for turn in range(warm_up + rounds):
        for contender in racing:
            seconds = contender.step(arguments)
            if turn >= warm_up:
                contender.seconds.append(seconds)


def print_comparison(title: str, contenders: list[Contender]) -> None:
    """Print the measured contenders beside the first one, and the reason of each that failed.

    The last column is the relative distance of the gradients of the first step from eager's.
    """
    caption = "A step is loss + backward, no optimizer. FLOPs: matmul and convolution."
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    headings = ("min\nms", "median\nms", "speed\nup", "first\ns", "\nGFLOPs", "gradient\ndiffers")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    reference = contenders[0]
    for contender in contenders:
        if contender.refusal:
            table.add_row(contender.name, *("–",) * len(headings))
            continue
        median = statistics.median(contender.seconds)
        distance = (contender.gradients - reference.gradients).norm() / reference.gradients.norm()
        table.add_row(
            contender.name,
            f"{min(contender.seconds) * 1e3:.2f}",
            f"{median * 1e3:.2f}",
            f"{statistics.median(reference.seconds) / median:.2f} ×",
            f"{contender.first_seconds:.1f}",
            "" if contender.flops is None else f"{contender.flops / 1e9:.3f}",
            "" if contender is reference else f"{distance:.0e}",
        )
    console.print(table)
    for contender in contenders:
        if contender.refusal:
            name = contender.name.replace("\n", " ")
            console.print(f"{name} did not compile: {contender.refusal}", markup=False)


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
    inputs = list(inputs)
    eager, ours = as_written(loss.as_written, inputs), optimized(loss, inputs)
    contenders = [eager, ours]
    if stock:
        contenders.insert(1, compiled_as_written(loss.as_written, inputs, options.backend))
    take_first_steps(contenders, *arguments, backend=options.backend)
    report = loss.explain(*arguments)
    print(report)
    eager.flops, ours.flops = report.flops_as_written, report.flops
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
