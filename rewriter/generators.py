"""The states of random generators: PyTorch's, Python's and NumPy's."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from rewriter import stateful


@dataclass(frozen=True)
class Generators:
    """The states of PyTorch's random generators."""

    cpu: Tensor
    cuda: tuple[Tensor, ...]

    @staticmethod
    def now() -> Generators:
        """Return the states they are in."""
        on = torch.cuda.is_initialized()
        return Generators(
            torch.get_rng_state(), tuple(torch.cuda.get_rng_state_all() if on else ())
        )

    def set(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Generators):
            return NotImplemented
        pairs = zip((self.cpu, *self.cuda), (other.cpu, *other.cuda), strict=False)
        with stateful.outside_transforms():
            return all(torch.equal(a, b) for a, b in pairs)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@contextlib.contextmanager
def generators_restored(start: Generators | None = None) -> Iterator[Generators]:
    """Leave PyTorch's random generators as they are; begin at ``start``, if given."""
    before = Generators.now()
    try:
        if start is not None:
            start.set()
        yield start or before
    finally:
        before.set()


_HOST_KINDS = (random.Random, numpy.random.RandomState, numpy.random.Generator)


class HostGenerators:
    """The random generators of Python and NumPy that are alive; a ``with`` block leaves them in the
    states that they are in.

    Attributes:
        have_moved: Whether one was in another state at the end of the block.
    """

    def __init__(self) -> None:
        # Whoever holds one need not be known: a global, an attribute, a closure of a closure. Those
        # of the modules are not among what is collected after `gc.freeze`.
        alive = [x for x in gc.get_objects() if issubclass(type(x), _HOST_KINDS)]
        found = {id(x): x for x in [_PYTHONS, NUMPYS, *alive]}.values()
        self._states = [(x, _state_of(x)) for x in found if type(x) is not random.SystemRandom]
        self.have_moved = False

    def __enter__(self) -> HostGenerators:
        return self

    def __exit__(self, *_: object) -> None:
        for generator, state in self._moved():
            self.have_moved = True
            _set_state(generator, state)

    def are_moved(self) -> bool:
        """Whether one is in another state now."""
        return any(True for _ in self._moved())

    def _moved(self) -> Iterator[tuple[Any, Any]]:
        for generator, state in self._states:
            if pickle.dumps(_state_of(generator)) != pickle.dumps(state):
                yield generator, state


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, numpy.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, numpy.random.RandomState):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


NUMPYS: Any = numpy.random.rand.__self__  # pyright: ignore[reportAttributeAccessIssue]
"""The generator that the functions of ``numpy.random`` draw from."""
_PYTHONS: Any = random.random.__self__  # pyright: ignore[reportAttributeAccessIssue]

_before_draws: contextvars.ContextVar[Any] = contextvars.ContextVar("before_draws", default=None)


def noted(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of the module `random`, or of ``numpy.random``, that takes note of the
    state before a call's first draw, for `undo_draws`."""
    own: Any = NUMPYS if getattr(draw, "__self__", None) is NUMPYS else _PYTHONS

    @functools.wraps(draw)
    def call(*args: Any, **kwargs: Any) -> Any:
        states = _before_draws.get()
        if states is None:
            _before_draws.set(states := [])
        if all(generator is not own for generator, _ in states):
            states.append((own, _state_of(own)))
        return draw(*args, **kwargs)

    return call


forget_draws: Callable[[], object] = functools.partial(_before_draws.set, None)
"""Begin a call: what was drawn so far stays drawn."""


def undo_draws() -> None:
    """Put the generators of the modules `random` and ``numpy.random`` back to where they were when
    the call began: Dynamo's code draws what a graph needs before the graph is run, and it was
    not."""
    for generator, state in _before_draws.get() or ():
        _set_state(generator, state)
    _before_draws.set(None)
