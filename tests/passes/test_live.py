"""What running code keeps in memory, counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from passes.live import LiveBytes

ROW = 8 * 4  # bytes of eight float32


def chain(x: Tensor) -> Tensor:
    return x.sin().cos().exp()  # each and the next


def saved(x: Tensor) -> Tensor:
    """The tangent is saved for a backward pass, and the sine for another."""
    return x.detach().requires_grad_().tanh().sin().cos()


def looked_at(x: Tensor) -> Tensor:
    return x.view(2, 4).t()


def in_place(x: Tensor) -> Tensor:
    return x.sin().add_(1).mul_(x)


def zero_tangents(x: Tensor) -> Tensor:
    """Forward mode has zeros without memory."""
    return torch.func.jvp(lambda y: y * x.sin(), (x,), (x,))[1]


@pytest.mark.parametrize(
    ("function", "most", "now"),
    [(chain, 2 * ROW, ROW), (saved, 3 * ROW, 3 * ROW), (looked_at, 0, 0), (in_place, ROW, ROW)],
    ids=lambda item: getattr(item, "__name__", ""),
)
@pytest.mark.parametrize("kind", ["real", "fake", "symbolic"])
def test_live_bytes(function: Callable[[Tensor], Tensor], most: int, now: int, kind: str) -> None:
    shapes = ShapeEnv() if kind == "symbolic" else None
    mode = FakeTensorMode(shape_env=shapes, static_shapes=False if shapes else None)
    x = torch.ones(8)
    if kind != "real":
        x = mode.from_tensor(x)
    with LiveBytes() as live:
        kept = function(x)
    assert (live.most, live.now) == (most, now)
    del kept
    assert live.now == 0


def test_zeros_without_memory() -> None:
    with LiveBytes() as live:
        zero_tangents(torch.ones(8))
    assert live.most >= ROW
