"""Time one loss evaluated in several ways, side by side.

A step is the loss and its backward pass, or the loss alone; never the optimizer. The ways take
turns (A B C, A B C, …) in one run, so that a machine that slows down or speeds up does so for all
of them alike.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from rewriter.peak_memory import peak_bytes

Loss = Callable[..., Tensor]


class Contender:
    """One way to evaluate a loss, and what its steps take.

    Attributes:
        name: What it is called in a table.
        loss: The way.
        inputs: Tensors whose gradients a step fills, in the same order for every contender.
        backward: Whether a step has a backward pass.
        flops: Matmul and convolution FLOPs of a step, if they are known.
        first_seconds: The first step, which compiles.
        seconds: The timed steps.
        value: The loss of the first step.
        gradients: Those of the first step, one after the other.
        peak_bytes: The most memory that a step had allocated at once, gradients included; None
            where it was not measured.
        refusal: The error of the first step, if it failed; then nothing else is there.
    """

    def __init__(
        self, name: str, loss: Loss, inputs: Iterable[Tensor], *, backward: bool = True
    ) -> None:
        self.name, self.loss, self.inputs, self.backward = name, loss, list(inputs), backward
        self.flops: float | None = None
        self.first_seconds = float("nan")
        self.seconds: list[float] = []
        self.value = self.gradients = torch.empty(0)
        self.peak_bytes: int | None = None
        self.refusal = ""

    @property
    def minimum(self) -> float:
        """Seconds, the shortest of the timed steps."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Seconds, the median of the timed steps."""
        return statistics.median(self.seconds)

    def speedup(self, reference: Contender) -> float:
        """Return how many of its steps take as long as one of the reference's: the median over the
        rounds."""
        pairs = zip(reference.seconds, self.seconds, strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)

    def distance(self, reference: Contender) -> float:
        """Return the relative distance of the value or of the gradients from the reference's,
        whichever is larger."""
        return max(
            _distance(self.value, reference.value), _distance(self.gradients, reference.gradients)
        )

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take a step from cleared gradients; return the seconds it took."""
        self._clear()
        on_gpu = torch.cuda.is_initialized()
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        self._run(args, kwargs)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def first_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step that compiles; keep its time, value and gradients, or its refusal."""
        self._clear()
        start = time.perf_counter()
        try:
            self.value = self._run(args, kwargs).detach().clone()
        # Whatever a compiler raises is a result: the table has the reason in place of the time.
        except Exception as error:
            reason = str(error).strip() or "no reason given"
            self.refusal = f"{type(error).__name__}: {reason.splitlines()[0]}"
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.first_seconds = time.perf_counter() - start
        if self.inputs and self.backward:
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.inputs]
            self.gradients = torch.cat([g.detach().flatten() for g in grads])

    def measure_memory(self, *args: Any, **kwargs: Any) -> None:
        """Take one more step, and keep how much memory it had allocated at once."""
        self._clear()
        self.peak_bytes = peak_bytes(lambda: self._run(args, kwargs))

    def _clear(self) -> None:
        for x in self.inputs:
            x.grad = None

    def _run(self, args: Any, kwargs: Any) -> Tensor:
        value = self.loss(*args, **kwargs)
        if self.backward:
            value.backward()
        return value


def _distance(found: Tensor, expected: Tensor) -> float:
    difference, size = (found - expected).norm(), expected.norm()
    return float(difference / size if size else difference)


def compiled_as_written(loss: Loss, backend: str = "inductor", mode: str = "default") -> Loss:
    """Return the loss under `torch.compile`, allowed to trace `torch.autograd.grad`.

    The flag is off by default and is read when a loss is compiled, so it is set around each call.
    """
    chosen = mode if backend == "inductor" else None  # other backends take none
    compiled = torch.compile(loss, fullgraph=True, backend=backend, mode=chosen)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(*args, **kwargs)

    return call


@contextlib.contextmanager
def nothing_compiled_before(backend: str = "inductor") -> Iterator[None]:
    """Compile as on a new machine.

    PyTorch keeps compiled code on disk, so the cache is an empty folder meanwhile. A function of no
    interest is compiled first: imports and compiler processes are not any contender's time.
    """
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        torch.compile(lambda x: (x @ x).sin(), backend=backend)(torch.ones(4, 4))
        yield


def measure(
    contenders: Sequence[Contender],
    *args: Any,
    rounds: int,
    warm_up: int = 3,
    on_step: Callable[[str], object] = lambda name: None,
    **kwargs: Any,
) -> None:
    """Let the contenders take turns, then measure the memory of each.

    Args:
        contenders: Those whose first step was refused do not take part.
        *args: The loss's arguments.
        rounds: Timed steps of each.
        warm_up: Untimed steps before them.
        on_step: Is told the contender's name before each step.
        **kwargs: The loss's keyword arguments.
    """
    racing = [contender for contender in contenders if not contender.refusal]
    for turn in range(warm_up + rounds):
        for contender in racing:
            on_step(contender.name)
            seconds = contender.step(*args, **kwargs)
            if turn >= warm_up:
                contender.seconds.append(seconds)
    for contender in racing:
        on_step(contender.name)
        contender.measure_memory(*args, **kwargs)


def comparison(title: str, contenders: Sequence[Contender]) -> Table:
    """Return the measured contenders beside the first one, as a table."""
    caption = (
        "A step is loss + backward, no optimizer. Speed-up: median over the rounds.\n"
        "FLOPs: matmul and convolution. Peak: the most that a step has allocated at\n"
        "once. Differs: value or gradients of the first step, relative."
    )
    table = Table(
        title=title, caption=caption, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    table.add_column("", no_wrap=True)
    headings = ["min\nms", "median\nms", "speed\nup", "first\ns", "\nMFLOP", "peak\nMiB"]
    for heading in (*headings, "\ndiffers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for contender in contenders:
        cells = ["–"] * 7 if contender.refusal else _cells(contender, contenders[0])
        table.add_row(contender.name, *cells)
    return table


def _cells(contender: Contender, reference: Contender) -> list[str]:
    peak = contender.peak_bytes
    return [
        f"{contender.minimum * 1e3:.3f}",
        f"{contender.median * 1e3:.3f}",
        f"{contender.speedup(reference):.2f} ×",
        f"{contender.first_seconds:.1f}",
        "" if contender.flops is None else f"{contender.flops / 1e6:.3f}",
        "" if peak is None else f"{peak / 2**20:.2f}",
        "" if contender is reference else f"{contender.distance(reference):.0e}",
    ]


def refusals(contenders: Iterable[Contender]) -> list[str]:
    """Return a line for each contender that did not run."""
    found = [(c.name.replace("\n", " "), c.refusal) for c in contenders if c.refusal]
    return [f"{name} did not run: {refusal}" for name, refusal in found]
