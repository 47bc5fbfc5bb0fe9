"""The states of PyTorch's random generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

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
