"""Time the training of networks by other libraries, as written and with one line more.

Run `python examples/clients.py --quick` (about six minutes on two cores; `make clients` installs
the libraries). Each library trains its network by its own code, once as written and once after
`net = optimize_nested(net)`. The two take turns in one run. A step is everything the library does
for it: values, derivatives, gradients, optimizer. Libraries that are absent are left out.
"""

import argparse
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from client import Client, as_written
from rich.box import SIMPLE_HEAD
from rich.table import Table
from side_by_side import console, progress_bar
from torch import nn

from rewriter import optimize_nested


@dataclass(frozen=True)
class Case:
    """Name a client, the function of a module that makes it, and its size."""

    name: str
    module: str
    function: str
    sizes: dict[str, Any]


CASES = [
    Case("DeepXDE Burgers 20×3", "client_deepxde", "burgers", {}),
    Case("DeepXDE Burgers 64×4", "client_deepxde", "burgers", {"width": 64, "depth": 4}),
    Case("DeepXDE beam 20×3", "client_deepxde", "beam", {}),
    Case("DeepXDE beam 64×3", "client_deepxde", "beam", {"points": 1000, "width": 64}),
    Case("SchNetPack PaiNN", "client_schnetpack", "painn", {}),
    Case("zuko, exact trace", "client_zuko", "flow", {}),
    Case("zuko, estimate", "client_zuko", "flow", {"exact": False}),
    Case("torchdiffeq", "client_torchdiffeq", "flow", {}),
    Case("torchdiffeq, trace", "client_torchdiffeq", "flow", {"whole": True}),
    Case("adjoint", "client_torchdiffeq", "flow", {"adjoint": True}),
    Case("adjoint, trace", "client_torchdiffeq", "flow", {"adjoint": True, "whole": True}),
]


@dataclass
class Times:
    """Hold the seconds of one client's steps, and what became of its parameters."""

    first: float
    steps: list[float]
    parameters: torch.Tensor


def measure(case: Case, backend: str, rounds: int, warm_up: int = 3) -> tuple[Times, Times]:
    """Let a client take turns with itself with the line: A B A B."""

    def line(net: nn.Module) -> nn.Module:
        return optimize_nested(net, backend=backend)

    make: Callable[..., Client] = getattr(importlib.import_module(case.module), case.function)
    racing = [make(way, torch.float32, **case.sizes) for way in (as_written, line)]
    # PyTorch keeps compiled code on disk; the first step is that of a new machine.
    empty = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with empty as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        times = [Times(_seconds(client), [], torch.empty(0)) for client in racing]
    for turn in range(warm_up + rounds):
        for client, found in zip(racing, times, strict=True):
            seconds = _seconds(client)
            if turn >= warm_up:
                found.steps.append(seconds)
    for client, found in zip(racing, times, strict=True):
        with torch.no_grad():
            found.parameters = torch.cat([p.flatten() for p in client.model.parameters()])
    return times[0], times[1]


def _seconds(client: Client) -> float:
    torch.manual_seed(0)
    start = time.perf_counter()
    client.step()
    return time.perf_counter() - start


def make_table() -> Table:
    """Make the table of results, without rows."""
    caption = "float32; speed up by the minima; differ: the parameters after all steps"
    title = "milliseconds per training step, as written and with the line"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    headings = (
        "eager\nmin",
        "\nmedian",
        "ours\nmin",
        "\nmedian",
        "speed\nup",
        "first\ns",
        "\ndiffers",
    )
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def row(case: Case, eager: Times, ours: Times) -> list[str]:
    """Write what was measured as the cells of a row."""
    medians = [statistics.median(found.steps) for found in (eager, ours)]
    distance = (ours.parameters - eager.parameters).norm() / eager.parameters.norm()
    shown = (min(eager.steps), medians[0], min(ours.steps), medians[1])
    return [
        case.name,
        *(f"{seconds * 1e3:#.3g}" for seconds in shown),
        f"{min(eager.steps) / min(ours.steps):.2f}×",
        f"{ours.first:.1f}",
        f"{distance:.0e}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the clients that are installed, and print a table."""
    parser = argparse.ArgumentParser(description="time per training step in other libraries")
    parser.add_argument("--quick", action="store_true", help="20 timed steps in place of 100")
    parser.add_argument("--rounds", type=int, help="timed steps (default: by --quick)")
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--only", default="", help="the clients whose name or module contains this")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (20 if options.quick else 100)
    cases = [case for case in CASES if options.only.lower() in f"{case.module} {case.name}".lower()]
    table = make_table()
    absent = {}
    with progress_bar() as progress:
        task = progress.add_task("clients", total=len(cases), status="")
        for case in cases:
            progress.update(task, status=case.name)
            try:
                importlib.import_module(case.module)
            except ModuleNotFoundError as error:
                absent[case.name] = error.name
            else:
                torch._dynamo.reset()
                table.add_row(*row(case, *measure(case, options.backend, rounds)))
            progress.update(task, advance=1)
    console.print(table)
    for name, library in absent.items():
        console.print(f"{name}: left out, {library} is not installed (make clients)", markup=False)


if __name__ == "__main__":
    main()
