"""Draws from NumPy's generator inside of a loss, as inputs of its graph.

Dynamo has what a loss draws by `random.random` drawn by the code in front of the graph, in the same
order, and handed in. So here what it draws by ``numpy.random``: numbers, and arrays, which are
tensors to the graph. A sequence of draws from one generator is the same before the graph as in the
middle of it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._dynamo import mark_static
from torch._dynamo.source import RandomValueSource
from torch._dynamo.variables import user_defined
from torch._dynamo.variables.builder import (
    GraphArg,
    wrap_fx_proxy_cls,
    wrap_to_fake_tensor_and_record,
)
from torch._dynamo.variables.tensor import NumpyNdarrayVariable

from rewriter.generators import NUMPYS, noted

NUMBERS = (bool, int, float, numpy.number)


def drawn_before(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let Dynamo take draws from NumPy's generator into the graph, as inputs of it; what is no draw
    of numbers, or draws by what only the graph computes, stays refused."""

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        draw: Any = self.value
        is_draw = getattr(draw, "__self__", None) is NUMPYS
        if not is_draw or not all(x.is_python_constant() for x in [*args, *kwargs.values()]):
            return original(self, tx, args, kwargs)
        given = [x.as_python_constant() for x in args]
        named = {name: x.as_python_constant() for name, x in kwargs.items()}
        with _after_those_before(tx):
            example = draw(*given, **named)
        if isinstance(example, numpy.ndarray) and example.dtype.kind in "biufc":
            return _array(tx, draw, given, named, torch.as_tensor(example))
        if not isinstance(example, NUMBERS):
            return original(self, tx, args, kwargs)
        with _after_those_before(tx):
            return user_defined.call_random_fn(tx, draw, args, kwargs)

    return call


@contextlib.contextmanager
def _after_those_before(tx: Any) -> Iterator[None]:
    """Let the generator be, inside of the ``with`` block, where what the loss has drawn so far will
    leave it."""
    state = NUMPYS.get_state()
    try:
        for draw, args, kwargs in tx.output.random_calls:
            draw = inspect.unwrap(draw)
            if getattr(draw, "__self__", None) is NUMPYS:
                draw(*args, **kwargs)
        yield
    finally:
        NUMPYS.set_state(state)


def _array(tx: Any, draw: Any, args: list[Any], kwargs: dict[str, Any], example: Tensor) -> Any:
    """Return Dynamo's variable for an array that is drawn before the graph and handed in."""
    source = RandomValueSource(len(tx.output.random_calls))
    tx.output.random_calls.append((noted(draw), args, kwargs))
    mark_static(example)  # its size is that of a call
    fake = wrap_to_fake_tensor_and_record(example, tx=tx, source=source, is_tensor=False)
    proxy = tx.output.root_tracer.create_graph_input(source.name, Tensor, fake, source=source)
    found = wrap_fx_proxy_cls(
        NumpyNdarrayVariable, tx=tx, proxy=proxy, example_value=fake, subclass_type=None,
        source=source,
    )  # fmt: skip
    proxy.node.meta["grapharg"] = GraphArg(
        source, example, pass_arg_as_tensor=True, fake_tensor=fake, is_tensor=False,
        example_strong_ref=example,
    )  # fmt: skip
    return found
