"""Time several forms of one loss side by side."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from rewriter.naming import named_tensors

Loss = Callable[..., Tensor]


@dataclass
class Timing:
    """What the steps of one form took. A step is the loss and its backward pass, no optimizer.

    Attributes:
        name: The form.
        first_seconds: The first step, which compiles.
        seconds: The later ones.
        gradients: Those of the first step, by name.
        peak_bytes: The most memory that a step had allocated at once on the GPU; None without one.
        refusal: The error of the first step, if it failed: then there is nothing else.
    """

    name: str
    first_seconds: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    peak_bytes: int | None = None
    refusal: str = ""

    @property
    def median(self) -> float:
        """Seconds, the median of the later steps."""
        return statistics.median(self.seconds)

    def speedup(self, reference: Timing) -> float:
        """Return how often a step fits in one of the reference's: the median over the rounds."""
        pairs = zip(reference.seconds, self.seconds, strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)

    def distance(self, reference: Timing) -> float:
        """Return the relative distance of the gradients from the reference's."""
        pairs = [(g, self.gradients.get(name)) for name, g in reference.gradients.items()]
        difference = sum(float((g if h is None else g - h).norm() ** 2) for g, h in pairs)
        size = sum(float(g.norm() ** 2) for g, _ in pairs)
        return (difference / size) ** 0.5 if size else difference**0.5


def compiled_as_written(loss: Loss, backend: str = "inductor") -> Loss:
    """Return the loss under `torch.compile`, allowed to trace `torch.autograd.grad`.

    The flag is off by default and is read when a loss is compiled, so it is set around each call.
    """
    compiled = torch.compile(loss, fullgraph=True, backend=backend)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(*args, **kwargs)

    return call


def race(
    forms: Mapping[str, Loss],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    rounds: int,
    warm_up: int = 3,
    cold: bool = True,
    on_step: Callable[[str], object] = lambda name: None,
) -> list[Timing]:
    """Let forms of a loss take turns (A B C, A B C, …) on the same arguments, so that a machine
    that slows down or speeds up does so for all alike.

    Gradients of the arguments are left at None.

    Args:
        forms: The forms, by name; the first one is the reference.
        args: Arguments of each.
        kwargs: Keyword arguments of each.
        rounds: Timed steps of each.
        warm_up: Untimed steps before them.
        cold: Whether first steps find nothing compiled before, as on a new machine.
        on_step: Is told the form before each step.
    """
    reference = next(iter(forms.values()))
    tensors = named_tensors(getattr(reference, "as_written", reference), tuple(args), dict(kwargs))
    tensors = {name: x for name, x in tensors.items() if x.requires_grad}
    timings = [Timing(name) for name in forms]

    def step(timing: Timing) -> float:
        on_step(timing.name)
        for x in tensors.values():
            x.grad = None
        _synchronize()
        start = time.perf_counter()
        forms[timing.name](*args, **kwargs).backward()
        _synchronize()
        return time.perf_counter() - start

    with _empty_cache() if cold else contextlib.nullcontext():
        for timing in timings:
            try:
                timing.first_seconds = step(timing)
            # Whatever a compiler raises is a result: the table has the reason in place of the time.
            except Exception as error:
                if timing is timings[0]:
                    raise
                text = (str(error).strip() or "no reason given").splitlines()[0]
                timing.refusal = f"{type(error).__name__}: {text}"
            else:
                found = {name: x.grad for name, x in tensors.items()}
                timing.gradients = {n: g.clone() for n, g in found.items() if g is not None}
    racing = [timing for timing in timings if not timing.refusal]
    for turn in range(warm_up + rounds):
        for timing in racing:
            if torch.cuda.is_initialized():
                torch.cuda.reset_peak_memory_stats()
            seconds = step(timing)
            if turn >= warm_up:
                timing.seconds.append(seconds)
            if torch.cuda.is_initialized():
                timing.peak_bytes = torch.cuda.max_memory_allocated()
    for x in tensors.values():
        x.grad = None
    return timings


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """Compile as on a new machine. PyTorch keeps compiled code on disk; imports and compiler
    processes are no form's time."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        torch.compile(lambda x: (x @ x).sin())(torch.ones(4, 4))
        yield
