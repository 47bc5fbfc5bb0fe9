"""What PyTorch's functions of autograd iterate over, as tuples.

``torch.autograd.grad(loss, net.parameters())`` takes any iterable: PyTorch makes a tuple of it
first. So must a trace, whose nodes hold tuples: a generator, ``filter``, ``map``, ``reversed``, the
views of a dict. A generator is consumed by that, as it is in eager.
"""

from __future__ import annotations

from typing import Any

from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.lists import ListVariable, TupleVariable
from torch._dynamo.variables.tensor import TensorVariable

ITERATED = ("outputs", "inputs", "grad_outputs")
"""The first arguments of `torch.autograd.grad`, in their order."""


def as_tuple(tx: Any, value: Any) -> Any:
    """Return Dynamo's variable for what an argument iterates over; a tensor, None, a tuple, and
    what is no iterable, as they are."""
    value = value.realize()
    if isinstance(value, (TensorVariable, TupleVariable, ListVariable, ConstantVariable)):
        return value
    return VariableTracker.build(tx, tuple).call_function(tx, [value], {})


def with_tuples(tx: Any, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments of `torch.autograd.grad` with tuples in place of what it would iterate
    over."""
    own = [as_tuple(tx, x) if i < len(ITERATED) else x for i, x in enumerate(args)]
    named = {name: as_tuple(tx, x) if name in ITERATED else x for name, x in kwargs.items()}
    return own, named
