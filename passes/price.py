"""What a graph costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from passes.bytes import as_expression, node_bytes
from passes.graph import placeholders, value_of
from passes.kept import bytes_kept
from passes.kernels import count_kernels, is_product


@dataclass(frozen=True)
class Price:
    """What a graph costs, as expressions in the symbolic sizes.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions, two per multiply-add,
            by the formulas of `torch.utils.flop_counter.flop_registry`.
        bytes_moved: Bytes that operators read and write if each ran alone (views are free).
        bytes_kept: The most bytes that computed values fill at one moment: `passes.kept`.
        kernels: Groups of pointwise operators that one kernel each can compute: `passes.kernels`.
    """

    flops: sympy.Expr
    bytes_moved: sympy.Expr
    bytes_kept: sympy.Expr
    kernels: int

    def at(self, hints: dict[sympy.Symbol, int]) -> Cost:
        """Return the numbers for given sizes."""
        return Cost(
            evaluated(self.flops, hints),
            evaluated(self.bytes_moved, hints),
            evaluated(self.bytes_kept, hints),
            self.kernels,
        )


class Cost(NamedTuple):
    """A `Price` at given sizes."""

    flops: int
    bytes_moved: int
    bytes_kept: int
    kernels: int


UNKNOWN = 64


def evaluated(expression: sympy.Expr, hints: dict[sympy.Symbol, int]) -> int:
    """Return the number an expression has at given sizes; `UNKNOWN` stands in for a size that
    depends on values."""
    sizes: Any = hints
    known = expression.subs(sizes)
    return int(known.subs(dict.fromkeys(known.free_symbols, UNKNOWN)))


def node_flops(node: Node) -> sympy.Expr:
    """Return the matmul and convolution FLOPs of one node."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return sympy.Integer(0)
    args = torch.fx.map_arg(node.args, value_of)
    kwargs = torch.fx.map_arg(node.kwargs, value_of)
    return as_expression(formula(*args, **kwargs, out_val=value_of(node)))  # pyright: ignore


def price(module: GraphModule) -> Price:
    """Price a functional ATen graph."""
    flops, moved = sympy.Integer(0), sympy.Integer(0)
    for node in module.graph.nodes:
        if node.op == "call_function":
            flops += node_flops(node)
            moved += node_bytes(node)
    return Price(flops, moved, bytes_kept(module), count_kernels(module))


def count_matmuls(module: GraphModule) -> int:
    """Return how many matrix products and convolutions a graph holds."""
    return sum(is_product(node) for node in module.graph.nodes)


def size_hints(module: GraphModule) -> dict[sympy.Symbol, int]:
    """Return the sizes a graph with symbolic sizes was captured at.

    A symbol that was found equal to another, or to a number, since an expression was made counts
    as well.
    """
    hints: dict[sympy.Symbol, int] = {}
    for node in placeholders(module.graph):
        value: Any = value_of(node)
        sizes = [*value.shape, *value.stride()] if isinstance(value, Tensor) else [value]
        for size in sizes:
            shapes = getattr(getattr(size, "node", None), "shape_env", None)
            if shapes is not None:
                hints |= known_sizes(shapes)
    return hints


def known_sizes(shapes: Any) -> dict[sympy.Symbol, int]:
    """Return what the symbols of a `ShapeEnv` stand for."""
    # The table was renamed between torch 2.11 and 2.13.
    known = getattr(shapes, "backed_var_to_val", None)
    table = shapes.var_to_val if known is None else known
    return {symbol: int(number) for symbol, number in table.items()}


# What a tensor subclass is asked about itself: nothing runs.
_QUESTIONS = {
    torch.ops.aten.size, torch.ops.aten.sym_size, torch.ops.aten.stride, torch.ops.aten.sym_stride,
    torch.ops.aten.storage_offset, torch.ops.aten.sym_storage_offset, torch.ops.aten.numel,
    torch.ops.aten.sym_numel, torch.ops.aten.dim, torch.ops.aten.is_contiguous,
    torch.ops.aten.is_strides_like_format, torch.ops.aten.is_non_overlapping_and_dense,
}  # fmt: skip


_ALLOCATIONS = {
    torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided,
}  # fmt: skip


class FlopCounter(TorchDispatchMode):
    """Count the matmul and convolution FLOPs of everything that runs inside, fake tensors included,
    and the operators that are a kernel of eager's.

    >>> with FlopCounter() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> counter.flops
    48
    """

    def __init__(self) -> None:
        super().__init__()
        self.total: sympy.Expr = sympy.Integer(0)
        self.calls = 0
        self.kernels = 0

    @property
    def flops(self) -> int:
        """FLOPs so far, for sizes that are numbers."""
        return int(self.total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim" or func._overloadpacket in _QUESTIONS:
            return NotImplemented
        if func is torch.ops.aten._efficientzerotensor.default:
            # A zero tangent without storage; on fake tensors it loses its device.
            return torch.zeros(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self.kernels += not (func.is_view or func._overloadpacket in _ALLOCATIONS)
        if formula is not None:
            self.total += as_expression(formula(*args, **kwargs, out_val=out))
            self.calls += 1
        return out
