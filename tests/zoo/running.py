"""Run a loss of the zoo as written and decorated, side by side, and say how it was captured."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from rewriter import NestedGradientWarning, OptimizedLoss, optimize_nested
from tests.oracle import relative_error
from tests.zoo.row import AS_WRITTEN, BY_LAYER, GRAPH, PARTLY, RECORDED, Loss
from tests.zoo.world import reachable

CALLS = 3
SEED = 5
RATE = 1e-3
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Left:
    """What a call leaves behind.

    Attributes:
        value: What the loss returned, its tensors detached.
        grads: The gradient of each leaf that can be reached, by path.
        state: Tensors, their flags, and plain values that can be reached, by path.
        streams: Where PyTorch's, NumPy's and Python's generators stand.
        printed: What was written to standard output.
    """

    value: Any
    grads: dict[str, Tensor | None]
    state: dict[str, Any]
    streams: tuple[Any, ...]
    printed: str


@dataclass
class Side:
    """A loss with networks and caches of its own.

    Attributes:
        loss: What is called.
        batch: Returns the arguments of the next call.
        written: The loss as written.
        said: Warnings, about calls that are not captured or about the loss.
    """

    loss: Callable[..., Any]
    batch: Callable[[], tuple[Any, ...]]
    written: Callable[..., Any]
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Capture:
    """How a loss was captured.

    Attributes:
        way: One of `tests.zoo.row.WAYS`.
        graphs: How many there are.
        reason: Why it is not one graph; empty if it is.
    """

    way: str
    graphs: int
    reason: str = ""


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        # Fused attention has no second derivative in eager.
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_default_dtype(before)


def make_side(row: Loss, **options: Any) -> Side:
    """Build a loss; decorate it if there are options."""
    _seed(0)
    written, batch = row.build()
    loss = optimize_nested(written, **options) if options else written
    return Side(loss, batch, written)


def call(side: Side, number: int, row: Loss) -> Left:
    """Call a loss on its batch of that number, and ``backward()``."""
    _seed(number)
    args = side.batch()
    roots = [side.written, *args]
    for _, item in reachable(roots):
        if isinstance(item, Tensor) and item.is_leaf:
            item.grad = None
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        value = side.loss(*args)
        if not row.is_whole_step:
            end = next(x for x in pytree.tree_leaves(value) if is_end(x))
            end.backward()
    side.said += [str(w.message) for w in caught if w.category is NestedGradientWarning]
    found = dict(reachable(roots))
    leaves = {name: x for name, x in found.items() if isinstance(x, Tensor) and x.is_leaf}
    left = Left(
        value=pytree.tree_map_only(Tensor, _kept, value),
        grads={name: _kept(x.grad) for name, x in leaves.items()},
        state={name: _state_of(item) for name, item in found.items()},
        streams=(torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
        printed=printed.getvalue(),
    )
    if not row.is_whole_step:
        _train(leaves.values())
    return left


def is_end(item: Any) -> bool:
    return isinstance(item, Tensor) and item.requires_grad and item.numel() == 1


def _train(leaves: Any) -> None:
    """Take a step: a cache that outlives it would be seen."""
    with torch.no_grad():
        for leaf in leaves:
            if isinstance(leaf, nn.Parameter) and leaf.grad is not None:
                leaf -= RATE * leaf.grad


def _kept(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().as_subclass(Tensor).clone()


def _state_of(item: Any) -> Any:
    if isinstance(item, Tensor):
        return _kept(item), item.requires_grad, type(item).__name__
    return copy.copy(item)


def _seed(number: int) -> None:
    torch.manual_seed(SEED + number)
    np.random.seed(SEED + number)
    random.seed(SEED + number)


def differences(mine: Left, reference: Left) -> list[str]:
    """Return what a call left otherwise than the loss as written did: nothing, or it is wrong."""
    found = _differs("value", mine.value, reference.value)
    sizes = [g.abs().max().item() for g in reference.grads.values() if _has_size(g)]
    floor = 1e-5 * max(sizes, default=0.0)
    if mine.grads.keys() != reference.grads.keys():
        found.append(f"leaves: {sorted(mine.grads.keys() ^ reference.grads.keys())}")
    for name in mine.grads.keys() & reference.grads.keys():
        found += _differs(f"gradient of {name}", mine.grads[name], reference.grads[name], floor)
    if mine.state.keys() != reference.state.keys():
        found.append(f"state: {sorted(mine.state.keys() ^ reference.state.keys())}")
    for name in mine.state.keys() & reference.state.keys():
        found += _differs(f"state {name}", mine.state[name], reference.state[name])
    for name, here, there in zip(
        ("torch", "numpy", "random"), mine.streams, reference.streams, strict=True
    ):
        same = torch.equal(here, there) if isinstance(here, Tensor) else here == there
        found += [] if same else [f"random stream of {name}"]
    if mine.printed != reference.printed:
        found.append(f"printed {mine.printed!r}, as written {reference.printed!r}")
    return found


def _has_size(g: Tensor | None) -> bool:
    return g is not None and g.numel() > 0 and bool(torch.isfinite(g).all())


def _differs(name: str, mine: Any, reference: Any, floor: float = 0.0) -> list[str]:
    here, there = pytree.tree_leaves([mine]), pytree.tree_leaves([reference])
    if len(here) != len(there):
        return [f"{name}: {mine!r}, as written {reference!r}"]
    return [
        f"{name}: {one!r}, as written {other!r}"
        for one, other in zip(here, there, strict=True)
        if not _are_same(one, other, floor)
    ]


def _are_same(one: Any, other: Any, floor: float) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if not (one.is_floating_point() or one.is_complex()):
            return torch.equal(one, other)
        return relative_error(one, other, floor) <= TOLERANCE
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= TOLERANCE * max(abs(other), 1e-6) or one != one != other
    return type(one) is type(other) and one == other


def compare(row: Loss, calls: int = CALLS, **options: Any) -> tuple[list[str], Side]:
    """Call a loss as written and decorated, several times; return what differs, and the decorated
    side."""
    with in_float64():
        reference, mine = make_side(row), make_side(row, **({"backend": "eager"} | options))
        found = []
        for number in range(1, calls + 1):
            expected = call(reference, number, row)
            found += [f"call {number}: {x}" for x in differences(call(mine, number, row), expected)]
    return found, mine


def capture_of(side: Side) -> Capture:
    """Return how the calls so far were captured."""
    loss: Any = side.loss
    assert isinstance(loss, OptimizedLoss)
    reasons = list(dict.fromkeys(str(refusal) for refusal in loss.refusals))
    reason = "; ".join(reasons)
    if loss.steps and not reason:
        return Capture(RECORDED if _is_recorded(loss) else GRAPH, len(loss.steps))
    if loss.steps:
        return Capture(PARTLY, len(loss.steps), reason)
    layers = [line for line in loss.layers.reports() if ": captured" in line]
    return Capture(BY_LAYER if layers else AS_WRITTEN, 0, reason)


def _is_recorded(loss: Any) -> bool:
    return getattr(loss, "way", loss.options.capture) == "trace"
