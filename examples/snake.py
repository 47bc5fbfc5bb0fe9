"""An activation as an operator of one's own, and what optimize_nested has to be told of it.

`snake` is x + sin²(ax)/a (Ziyin, Hartwig, Ueda, "Neural networks fail to learn periodic functions
and how to fix it", 2020). With its gradient it runs in reverse mode. Once its formula is known, it
runs in forward mode and in Taylor mode, to any order; sympy derives the rules.
"""

from typing import Any

import sympy
import torch
from torch import Tensor

from rewriter import register_elementwise


@torch.library.custom_op("examples::snake", mutates_args=())
def snake(x: Tensor, a: float) -> Tensor:
    """Return x + sin²(ax)/a."""
    return x + torch.sin(a * x) ** 2 / a


@snake.register_fake
def _(x: Tensor, a: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, ctx.a = inputs
    ctx.save_for_backward(x)


def _pull_back(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return cotangent * (1 + torch.sin(2 * ctx.a * x)), None


snake.register_autograd(_pull_back, setup_context=_save)
register_elementwise(
    snake, lambda x, a: x + sympy.sin(a * x) ** 2 / a, example=[torch.linspace(-2, 2, 9), 0.7]
)
