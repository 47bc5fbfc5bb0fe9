"""Compare what two runs of a step leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.generators import Generators
from rewriter.judge import widened

WIDE = (torch.float64, torch.complex128)
# Of the size of a tensor, in units of its last place: what is rounding for sure.
_PLACES = 16


@dataclass(frozen=True)
class Run:
    """What one run of a step leaves behind.

    Attributes:
        values: The outputs.
        grads: The gradients; None where there is none.
        state: The new values of the inputs that the loss writes to.
        end: Where the random generators end.
    """

    values: list[Any]
    grads: list[Any]
    state: list[Any]
    end: Generators | None = None

    @property
    def results(self) -> list[Any]:
        """Values, gradients and state, in this order."""
        return [*self.values, *self.grads, *self.state]


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from the loss as written, at the element that is furthest.

    Attributes:
        name: What it is.
        ours: The element here.
        reference: The element as written.
        error: Their distance.
        allowed: What may be rounding.
        of: What the reference was computed in.
    """

    name: str
    ours: Any
    reference: Any
    error: float
    allowed: float
    of: str = ""

    def __str__(self) -> str:
        return (
            f"{self.name} differs from the loss as written: {self.ours!r} here, "
            f"{self.reference!r} as written{self.of} (error {self.error:.3g}, allowed "
            f"{self.allowed:.3g})"
        )

    @property
    def excess(self) -> float:
        """The error in units of what is allowed."""
        return self.error / self.allowed if self.error == self.error else float("inf")


def worst(found: Sequence[Difference]) -> Difference | None:
    """Return the largest difference that is not allowed."""
    largest = max(found, key=lambda d: d.excess, default=None)
    return largest if largest is not None and largest.excess > 1 else None


def from_exact(names: Sequence[str], ours: Run, plain: Run, exact: Run) -> list[Difference]:
    """Return how far a run is from one in float64.

    In float64 it may differ by 1e-9 of the reference's size; in a narrower type by twice what the
    loss as written in that type differs, and by a few units in the last place.

    Args:
        names: What each result is.
        ours: The run.
        plain: The loss as written.
        exact: The loss as written in float64.
    """
    floor = _largest(exact.grads)
    found = []
    for name, mine, narrow, reference in zip(
        names, ours.results, plain.results, exact.results, strict=True
    ):
        if (mine is None) != (reference is None):
            found.append(_absent(name, mine, reference))
        elif isinstance(mine, Tensor) and mine.numel():
            # A gradient that is zero but for rounding has no size of its own: it is a sum of terms
            # of the others' size.
            least = floor if name.startswith("the gradient") else 0.0
            size = max(_size(reference), least)
            if mine.dtype in WIDE or not _is_inexact(mine):
                allowed = 1e-9 * size + 1e-14
            else:
                own = _error(narrow, reference)
                allowed = 2 * own + _PLACES * torch.finfo(mine.dtype).eps * size
            found.append(_difference(name, mine, reference, allowed, " in float64"))
    return found


def from_plain(
    names: Sequence[str], ours: Run, plain: Run, reruns: Sequence[Run] | None = None
) -> list[Difference]:
    """Return how far a run is from the loss as written in the same type.

    Args:
        names: What each result is.
        ours: The run.
        plain: The loss as written.
        reruns: The loss as written in float64, or on inputs that differ in their last places: how
            far these are from it, it may be by rounding. None to allow what is rounding for sure.
    """
    floor = _largest(plain.grads)
    found = []
    columns = [rerun.results for rerun in reruns or ()]
    for index, (name, mine, reference) in enumerate(
        zip(names, ours.results, plain.results, strict=True)
    ):
        if (mine is None) != (reference is None):
            found.append(_absent(name, mine, reference))
        elif isinstance(mine, Tensor) and mine.shape != reference.shape:
            found.append(Difference(f"the shape of {name}", mine.shape, reference.shape, 1.0, 0.1))
        elif isinstance(mine, Tensor) and mine.dtype != reference.dtype:
            found.append(Difference(f"the dtype of {name}", mine.dtype, reference.dtype, 1.0, 0.1))
        elif isinstance(mine, Tensor) and mine.numel():
            allowed = _rounding(mine.dtype, _size(reference))
            if reruns is not None:
                spread = [_error(c[index], reference) for c in columns if c[index] is not None]
                allowed += 8 * max(spread, default=0.0)
                if name.startswith("the gradient"):
                    allowed += _PLACES * _unit(mine.dtype) * floor
            found.append(_difference(name, mine, reference, allowed, ""))
    if ours.end is not None and ours.end != plain.end:
        found.append(Difference("the state of a random generator", "one", "another", 1.0, 0.1))
    return found


def _rounding(dtype: torch.dtype, size: float) -> float:
    if dtype in WIDE:
        return 1e-9 * size + 1e-14
    unit = _unit(dtype)
    return (64 if unit < 1e-5 else 4) * unit * size + 1e-30


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _is_inexact(x: Tensor) -> bool:
    return x.dtype.is_floating_point or x.dtype.is_complex


def _wide(x: Tensor) -> Tensor:
    x = widened(x)
    return x if x.is_complex() else x.double()


def _finite(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x))


def _size(x: Any) -> float:
    if not isinstance(x, Tensor) or not x.numel():
        return 0.0
    return float(_finite(_wide(x)).abs().max())


def _largest(grads: Sequence[Any]) -> float:
    return max(map(_size, grads), default=0.0)


def _distances(mine: Tensor, reference: Tensor) -> Tensor:
    """Return the distance of each element; 0 where the reference is no number: with infinities, a
    zero that is known as such counts here and not as written."""
    a, b = _wide(mine), _wide(reference)
    distance = torch.where(a == b, 0.0, (a - b).abs())
    distance = torch.where(torch.isnan(distance), torch.inf, distance)
    return torch.where(torch.isnan(b), 0.0, distance)


def _error(x: Any, reference: Tensor) -> float:
    if x is None or x.shape != reference.shape or not x.numel():
        return 0.0
    distances = _distances(x, reference)
    return float(_finite(distances).max())


def _difference(name: str, mine: Tensor, reference: Tensor, allowed: float, of: str) -> Difference:
    distances = _distances(mine, reference).flatten()
    at = int(distances.argmax())
    here, there = mine.detach().flatten()[at].item(), reference.detach().flatten()[at].item()
    return Difference(name, here, there, float(distances[at]), allowed, of)


def _absent(name: str, mine: Any, reference: Any) -> Difference:
    here, there = ("none" if x is None else "a tensor" for x in (mine, reference))
    return Difference(name, here, there, 1.0, 1e-300)
