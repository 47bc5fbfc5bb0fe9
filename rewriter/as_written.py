"""The loss as written: the captured graph under plain autograd. The reference for numbers, price and absent gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from passes.graph import placeholders
from passes.price import FlopCounter
from passes.tracing import fake_mode_of
from rewriter.capture import example_of


@dataclass(frozen=True)
class AsWritten:
    """What one step of the loss as written does.

    Attributes:
        flops: Matmul and convolution FLOPs of loss and gradients, in the symbolic sizes.
        wanted: Positions of the inputs that require grad.
        unreached: Those of ``wanted`` whose gradient is None.
        differentiable: Positions of the outputs that require grad.
    """

    flops: sympy.Expr
    wanted: tuple[int, ...]
    unreached: frozenset[int]
    differentiable: tuple[int, ...]


def run_as_written(
    captured: GraphModule, inputs: Sequence[Any], wanted: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    """Run the captured graph on leaves made of ``inputs``; return its outputs and the leaves.

    Args:
        captured: What Dynamo captured.
        inputs: Tensors and numbers, one per graph input; they are not changed.
        wanted: Positions of the inputs to differentiate with respect to.
    """
    own = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for position in wanted:
            own[position].requires_grad_()
        return list(captured(*own)), own


def gradients_of(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of the sum of ``outputs``; None where eager leaves ``.grad`` alone."""
    ends = [u for u in outputs if isinstance(u, Tensor) and u.requires_grad]
    if not ends or not inputs:
        return [None] * len(inputs)
    seeds = [torch.ones_like(u) for u in ends]
    return list(torch.autograd.grad(ends, inputs, seeds, allow_unused=True))


def measure(captured: GraphModule, promoted: Sequence[int]) -> AsWritten:
    """Run the loss as written on fake tensors: exact FLOPs, and which gradients exist at all.

    Args:
        captured: What Dynamo captured.
        promoted: Inputs that the loss itself makes require grad.
    """
    nodes = placeholders(captured.graph)
    examples = [example_of(node) for node in nodes]
    wanted = tuple(
        i
        for i, example in enumerate(examples)
        if isinstance(example, Tensor) and _is_wanted(nodes[i], i in promoted)
    )
    start = [i for i in wanted if i not in promoted]
    with fake_mode_of(examples), FlopCounter() as counter:
        outputs, own = run_as_written(captured, examples, start)
        grads = gradients_of(outputs, [own[i] for i in wanted])
    return AsWritten(
        flops=counter.total,
        wanted=wanted,
        unreached=frozenset(
            i for i, grad in zip(wanted, grads, strict=True) if grad is None
        ),
        differentiable=tuple(
            i for i, u in enumerate(outputs) if isinstance(u, Tensor) and u.requires_grad
        ),
    )


def _is_wanted(node: Node, promoted: bool) -> bool:
    example = example_of(node)
    return promoted or (example.requires_grad and example.dtype.is_floating_point)

