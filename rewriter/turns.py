"""Two exact forms of a call take turns on calls that the user makes anyway; the clock decides.

Each call runs once, by one of the forms, so that what it draws and writes is what the loss as
written draws and writes. Timed is the call and its backward pass, from where the pass comes to the
call's results to its end.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ROUNDS = 5
NOISE = 0.03
# By pairs: where a step calls twice, each form comes first as often as second.
_ORDER = (0, 1, 1, 0)

clock: Callable[[], float] = time.perf_counter
"""What tells the seconds."""


@dataclass(slots=True)
class Sample:
    """One timed call.

    Attributes:
        forward: Seconds of the call.
        backward: Seconds of its backward pass; None if there was none.
    """

    forward: float = 0.0
    backward: float | None = None
    _began: float | None = None
    _is_on_device: bool = False

    def begin(self, cotangents: Any) -> None:
        """Be told that a backward pass comes to the call's results."""
        if torch.compiler.is_compiling():  # compiled autograd: Dynamo traces this
            return
        if self._began is None:
            self._began = clock()
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # pyright: ignore[reportAttributeAccessIssue]

    def _end(self) -> None:
        assert self._began is not None
        wait(self._is_on_device)
        self.backward = clock() - self._began


class Turns:
    """A race between two forms of a call.

    Attributes:
        names: What they are called; the first is kept where noise does not part them.
        rounds: How many calls of each are timed.
        sure: How many times as long the second has to take for one call of each to be enough.
        near: What the second has to be quicker by, as a part of the first, to be kept for that
            alone; where it is not, and the first is not either, ``is_leaner`` is asked.
        is_leaner: Whether the second keeps so much less memory that it is to be taken.
    """

    def __init__(
        self,
        names: tuple[str, str],
        rounds: int = ROUNDS,
        *,
        sure: float = math.inf,
        near: float = NOISE,
        is_leaner: Callable[[], bool] = lambda: False,
    ) -> None:
        self.names, self.rounds, self.sure = names, rounds, sure
        self.near, self._is_leaner = near, is_leaner
        self._samples: tuple[list[Sample], list[Sample]] = ([], [])
        self._calls = 0

    @property
    def turn(self) -> int:
        """Whose turn it is."""
        return _ORDER[self._calls % len(_ORDER)]

    @property
    def is_over(self) -> bool:
        """Whether each form has had its calls."""
        if all(len(samples) >= self.rounds for samples in self._samples):
            return True
        if self.sure == math.inf or not all(self._samples):
            return False
        seconds = self._quickest()
        return seconds is not None and self.sure * seconds[0] < seconds[1]

    def run(self, form: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call the form whose turn it is, and time it; one that raises is not counted."""
        sample = Sample()
        sample._is_on_device = is_on_device(pytree.tree_leaves((args, kwargs)))
        wait(sample._is_on_device)
        start = clock()
        value = form(*args, **kwargs)
        wait(sample._is_on_device)
        sample.forward = clock() - start
        for node in _ends(value):
            node.register_prehook(sample.begin)
        self._samples[self.turn].append(sample)
        self._calls += 1
        return value

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The quickest call of each form; None before all have been timed."""
        return self._quickest() if self.is_over else None

    def _quickest(self) -> tuple[float, float] | None:
        whole = [[s for s in each if s.backward is not None] for each in self._samples]
        if any(whole) and not all(whole):
            return None
        one, other = (
            min(s.forward + (s.backward or 0.0) for s in each)
            for each in (whole if all(whole) else self._samples)
        )
        return one, other

    @functools.cached_property
    def winner(self) -> int:
        """The form that is kept, once the race is over."""
        seconds = self.seconds
        if seconds is None:
            return 0
        one, other = seconds
        if other < (1 - self.near) * one:
            return 1
        return int(other < (1 + self.near) * one and self._is_leaner())

    def __str__(self) -> str:
        seconds = self.seconds
        if seconds is None:
            return f"{self.names[0]} and {self.names[1]} are taking turns"
        figures = (f"{n} {s * 1e6:.4g} µs" for n, s in zip(self.names, seconds, strict=True))
        return f"{', '.join(figures)} a call, in turns: {self.names[self.winner]} is kept"


def _ends(value: Any) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            yield leaf.grad_fn


def is_on_device(values: Any) -> bool:
    """Whether one of these works on a device that has to be waited for."""
    for value in values:
        if isinstance(value, torch.nn.Module):
            value = next(value.parameters(), None)
        if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta"):
            return True
    return False


def wait(is_needed: bool) -> None:
    """Wait for what a device still computes."""
    if is_needed:
        torch.accelerator.synchronize()
