"""What a graph keeps in memory, counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.kept import bytes_kept
from passes.price import evaluated
from passes.tracing import fake_mode_of, trace

ROW = 8 * 4  # bytes of eight float32


def chain(x: Tensor) -> tuple[Tensor]:
    return (x.sin().cos().exp(),)  # each and the next


def kept_for_later(x: Tensor) -> tuple[Tensor]:
    early = x.sin()
    return (x.cos().exp() * early,)


def looked_at(x: Tensor) -> tuple[Tensor]:
    view = x.sin().reshape(2, 4)  # keeps the sine
    return (x.cos().exp().reshape(2, 4) + view,)


def reduced(x: Tensor) -> tuple[Tensor]:
    return (x.sum(),)


def returned(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sin(), x.cos()


@pytest.mark.parametrize(
    ("function", "expected"),
    [(chain, 2 * ROW), (kept_for_later, 3 * ROW), (looked_at, 3 * ROW), (reduced, 4),
     (returned, 2 * ROW)],
    ids=lambda item: getattr(item, "__name__", ""),
)  # fmt: skip
def test_bytes_kept(function: Callable[..., object], expected: int) -> None:
    mode = fake_mode_of([])
    with mode:
        x = torch.empty(8)
    module = trace(function, [x], mode)
    assert evaluated(bytes_kept(module), {}) == expected
