"""Writes are read out of a traced graph where that is plainly right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from passes.graph import print_graph
from passes.tracing import drop_writes


def read_after(x: Tensor) -> Tensor:
    """A value read before and after it is written to, and through a view made after."""
    a, b = x * 2, x + 1
    before = a.sin()
    a.copy_(b)
    return before + a + a.reshape(-1).reshape(2, 3)


def written_twice_over(x: Tensor) -> Tensor:
    a, b = x * 2, x + 1
    a.copy_(b)
    b.copy_(x)
    return a + b


def seen_through_a_view(x: Tensor) -> Tensor:
    a, b = x * 2, x + 1
    view = a[0]
    a.copy_(b)
    return view


def of_other_strides(x: Tensor) -> Tensor:
    a, b = x * 2, x.t().contiguous().t()
    a.copy_(b)
    return a


def of_a_number_of_rows(x: Tensor) -> Tensor:
    a = x * 2
    a.copy_(x[0])
    return a


def to_an_input(x: Tensor) -> Tensor:
    x.copy_(x * 2)
    return x + 1


def with_a_view_written(x: Tensor) -> Tensor:
    a = x * 2
    a[0].copy_(x[0])
    return a


@pytest.mark.parametrize(
    ("function", "is_plain"),
    [
        (read_after, True),
        (to_an_input, True),
        (written_twice_over, False),
        (seen_through_a_view, False),
        (of_other_strides, False),
        (of_a_number_of_rows, False),
        (with_a_view_written, False),
    ],
)
def test_drop_writes(function: Callable[[Tensor], Tensor], is_plain: bool) -> None:
    """Same value; no write is left, or nothing is changed."""
    x = torch.randn(2, 3, dtype=torch.float64)
    module = make_fx(function, tracing_mode="fake")(x)
    before = print_graph(module)
    assert "copy_" in before
    assert drop_writes(module) is is_plain
    after = print_graph(module)
    if function is not to_an_input:  # writes to inputs are for others to see
        assert ("copy_" in after) is not is_plain
    if not is_plain or function is to_an_input:
        assert after == before
    assert torch.equal(module(x.clone()), function(x.clone()))
    assert drop_writes(module) is is_plain and print_graph(module) == after
