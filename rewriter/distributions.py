"""`torch.distributions` as they are written, validation included.

PyTorch switches the validation of arguments off with the first compilation of a program, for all of
it; what a loss would raise as written it is to raise. A constraint is a branch on values, which is
looked at after each call (`rewriter.speculating`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from rewriter.stateful import is_inside_level

_Dependent: Any = type(constraints.dependent)


@contextlib.contextmanager
def validation_kept() -> Iterator[None]:
    """Leave it to the user whether distributions validate their arguments."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def is_lazy(kind: type, name: str) -> bool:
    """Whether a parameter of a distribution is computed when it is asked for."""
    return isinstance(getattr(kind, name), lazy_property)


def can_look() -> bool:
    """Whether values can be looked at: inside of a transform they are wrapped, and nothing is
    validated there."""
    return not is_inside_level()


def make(
    self: Any,
    batch_shape: torch.Size = torch.Size(),  # noqa: B008
    event_shape: torch.Size = torch.Size(),  # noqa: B008
    validate_args: bool | None = None,
) -> None:
    """Do what ``Distribution.__init__`` does, by names that Dynamo can trace.

    Raises:
        ValueError: An argument is outside of what the distribution is defined for.
    """
    self._batch_shape = batch_shape
    self._event_shape = event_shape
    if validate_args is not None:
        self._validate_args = validate_args
    if self._validate_args and can_look():
        try:
            arg_constraints = self.arg_constraints
        except NotImplementedError:
            arg_constraints = {}
            warnings.warn(f"{self.__class__} does not define `arg_constraints`.", stacklevel=2)
        for param, constraint in arg_constraints.items():
            if isinstance(constraint, _Dependent):
                continue
            if param not in self.__dict__ and is_lazy(type(self), param):
                continue
            value = getattr(self, param)
            if not torch._is_all_true(constraint.check(value)):
                raise ValueError(f"Expected parameter {param} to satisfy its constraint")


def infer_size(one: torch.Size, other: torch.Size) -> torch.Size:
    """Do what ``torch._C._infer_size`` does, which a graph cannot call."""
    return torch.broadcast_shapes(one, other)


BODIES = {Distribution.__init__: make}
"""What is traced in place of what."""

ASKED: dict[Any, Callable[..., bool]] = {is_lazy: is_lazy, can_look: can_look}
"""Functions of constants, which are called while a loss is traced."""

INFER_SIZE: Any = getattr(torch._C, "_infer_size", None)
"""It is given shapes that are no tuples."""

SAMPLE = Distribution._validate_sample
"""It validates what a density is asked for."""
