"""How many kernels pointwise work takes, counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passes.kernels import count_kernels
from passes.tracing import fake_mode_of, trace


def chain(x: Tensor) -> tuple[Tensor, ...]:
    return (x.sin().cos().sum(),)


def apart(x: Tensor) -> tuple[Tensor, ...]:
    return x.sin(), x.cos()


def product_between(x: Tensor) -> tuple[Tensor, ...]:
    return ((x.sin() @ x).cos(),)


def around_a_product(x: Tensor) -> tuple[Tensor, ...]:
    """The sum reads the sine, and waits for the product."""
    early = x.sin()
    return (early + early @ x,)


def two_products(x: Tensor) -> tuple[Tensor, ...]:
    """One kernel after both; none of the views takes one."""
    return (x @ x).t() + (x.t() @ x).t().sin(), x.t()


def constants(x: Tensor) -> tuple[Tensor, ...]:
    return x + torch.ones_like(x), torch.zeros(3)


def draws(x: Tensor) -> tuple[Tensor, ...]:
    return x @ torch.rand(8, 8), x @ x


def parts_of_one(x: Tensor) -> tuple[Tensor, ...]:
    largest, where = x.max(1)
    return largest.sin() + where, x @ x


@pytest.mark.parametrize(
    ("function", "expected"),
    [(chain, 1), (apart, 2), (product_between, 2), (around_a_product, 2), (two_products, 1),
     (constants, 1), (draws, 1), (parts_of_one, 1)],
    ids=lambda item: getattr(item, "__name__", ""),
)  # fmt: skip
def test_count_kernels(function: Callable[..., object], expected: int) -> None:
    mode = fake_mode_of([])
    with mode:
        x = torch.empty(8, 8)
    assert count_kernels(trace(function, [x], mode)) == expected
