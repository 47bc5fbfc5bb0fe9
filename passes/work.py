"""What a tower can save on a call, beside what it costs.

A level of a tower is a call of compiled code through Python: dear where eager's own operators are
few and small. What it saves are eager's pointwise operators, at every order; matrix products cost
the same in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from passes.graph import hint, is_random, value_of
from passes.levels import CHEAP, Level

aten = torch.ops.aten

# Microseconds on a CPU core, over the levels 0 to 2 of a gradient penalty: fitted to perceptrons of
# 2 to 6 layers, 10 to 10 000 points, and to the fields of continuous flows, which are called often.
_PER_OPERATOR = 16.0
_PER_ELEMENT = 3.6e-3
_PER_CALL = 350.0

_SAME_IN_BOTH = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
    aten.matmul.default, aten.linear.default, aten.sum.default, aten.sum.dim_IntList,
    aten.mean.default, aten.mean.dim,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """The pointwise work of one call.

    Attributes:
        operators: Pointwise operators.
        elements: What they compute, in all.
        is_known: Whether beside them there is nothing but products and sums, on a CPU.
        is_one: Whether there is one operator at most, and it is one of these, on any device: there
            is nothing to put together.
    """

    operators: int
    elements: int
    is_known: bool
    is_one: bool = False

    @property
    def is_too_little(self) -> bool:
        """Whether a tower would save less than its calls cost."""
        if self.is_one:
            return True
        saved = self.operators * _PER_OPERATOR + self.elements * _PER_ELEMENT
        return self.is_known and saved < _PER_CALL

    def __str__(self) -> str:
        if self.is_one:
            return "one operator is quicker as written"
        return (
            f"{self.operators} pointwise operators with {self.elements} elements are quicker as "
            "written"
        )


def work_of(level: Level) -> Work:
    """Return the work of a level, by the sizes at hand."""
    operators = elements = calls = 0
    is_known = is_plain = True
    for node in level.graph.graph.nodes:
        value = value_of(node)
        if isinstance(value, Tensor) and value.device.type != "cpu":
            is_known = False
        if node.op != "call_function" or node.target in CHEAP:
            continue
        calls += 1
        if node.target in _SAME_IN_BOTH:
            continue
        if not isinstance(value, Tensor) or not _is_pointwise(node):
            is_known = is_known and isinstance(value, torch.SymInt)
            is_plain = is_plain and isinstance(value, torch.SymInt)
            continue
        operators += 1
        elements += math.prod(hint(n) for n in value.shape)
    return Work(operators, elements, is_known, is_plain and calls <= 1)


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and not is_random(node)
