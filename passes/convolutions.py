"""The second derivative of a convolution of open sizes, which PyTorch takes since 2.13 only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

from passes.versions import IS_BEFORE_2_13

aten = torch.ops.aten


@contextlib.contextmanager
def any_size_differentiable() -> Iterator[None]:
    """Let autograd differentiate convolutions of fake tensors twice in the block, whatever their
    sizes are."""
    take_any_size()
    with enable_python_dispatcher() if IS_BEFORE_2_13 else contextlib.nullcontext():
        yield


def needs_any_size(error: RuntimeError) -> bool:
    """Whether PyTorch has failed because a size is open, where `any_size_differentiable` helps.

    It is no rule to have that on: under the Python dispatcher PyTorch takes other operators apart
    too, and not all of its formulas are theirs (`multilabel_margin_loss`).
    """
    return IS_BEFORE_2_13 and "on tensor with symbolic sizes" in str(error)


@functools.cache
def take_any_size() -> None:
    """Give PyTorch, where it needs it, our formula. It asks for that under its Python dispatcher
    alone, which is on in traces."""
    if not IS_BEFORE_2_13:
        return
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    operator: Any = aten._convolution_double_backward.default

    def double_backward(*args: Any) -> Any:
        if any(isinstance(n, torch.SymInt) for x in args[3:6] for n in x.shape):
            return convolution_double_backward(*args)
        return operator._op_dk(key, *args)

    operator.py_impl(key)(double_backward)


def convolution_double_backward(
    to_input: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None,
    cotangent: Tensor, weight: Tensor, x: Tensor, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the derivatives in ``cotangent``, ``x`` and ``weight`` of
    ``⟨cotangent, convolution(to_input, weight) + convolution(x, to_weight) + to_bias⟩``, which is
    what three cotangents make of the results of `convolution_backward`; None where none comes
    from these, as in PyTorch."""
    how = (stride, padding, dilation, transposed, output_padding, groups)
    terms: list[Tensor] = []
    in_x = in_weight = None
    if to_input is not None:
        terms.append(aten.convolution(to_input, weight, None, *how))
        if wanted[2]:
            only = [False, True, False]
            in_weight = aten.convolution_backward(cotangent, to_input, weight, None, *how, only)[1]
    if to_weight is not None:
        terms.append(aten.convolution(x, to_weight, None, *how))
        if wanted[1]:
            only = [True, False, False]
            in_x = aten.convolution_backward(cotangent, x, to_weight, None, *how, only)[0]
    if to_bias is not None:
        terms.append(to_bias.view(-1, *[1] * (x.dim() - 2)).expand(cotangent.shape))
    total = functools.reduce(torch.add, terms) if terms and wanted[0] else None
    return total, in_x, in_weight
