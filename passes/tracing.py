"""Trace a function of fake tensors into a functional ATen graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch.vmap import restore_vmap
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.fx.traceback import preserve_node_meta
from torch.nn.attention import SDPBackend, sdpa_kernel

from passes.decompositions import before_autograd, decompositions
from passes.graph import value_of


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """Return the mode the fake tensors among ``values`` belong to; a new one if there are none."""
    for value in values:
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def without_fused_kernels() -> Iterator[None]:
    """Let attention and recurrent layers be made of operators that have a second derivative."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # oneDNN's LSTM
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def trace(function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode) -> GraphModule:
    """Record what ``function(*inputs)`` computes, as ATen operators without in-place writes.

    Args:
        function: Takes and returns tensors and symbolic sizes.
        inputs: Fake tensors and symbolic sizes, the graph's inputs; they are not changed.
        mode: The mode of the fake tensors.
    """
    with torch._C._DisableAutocast():  # casts are in the graph since it was flat
        module = _record(function, inputs, mode, decompositions())
        return _functional(module, inputs, mode, decompositions)


def trace_before_autograd(
    function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode
) -> GraphModule:
    """Record what ``function(*inputs)`` computes, to be differentiated later: operators stay whole.

    The function may write in place; writes to inputs become ``copy_`` at the graph's end.
    """
    module = _record(_without_writes(function), inputs, mode, before_autograd())
    return _functional(module, inputs, mode, before_autograd)


def trace_differentiable(
    function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode
) -> GraphModule:
    """Record what ``function(*inputs)`` computes, derivatives included, to be differentiated once
    more: operators stay whole, those of PyTorch's derivative formulas too."""
    with torch._C._DisableAutocast():
        module = _record(function, inputs, mode, before_autograd())
        return _functional(module, inputs, mode, before_autograd)


def _functional(
    module: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode, table: Callable[[], Any]
) -> GraphModule:
    """Record a graph once more if decompositions wrote in place after functionalization."""
    if not any(_writes(node) for node in module.graph.nodes):
        return module
    detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]

    def again(*values: Any) -> Any:
        with torch.no_grad():
            return Interpreter(module).run(*values)

    return _record(_without_writes(again), detached, mode, table())


def _without_writes(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.func.functionalize(function, remove="mutations")


def _record(
    function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode, table: Any
) -> GraphModule:
    with mode, enable_python_dispatcher(), preserve_node_meta(), without_fused_kernels():
        module = make_fx(function, decomposition_table=table)(*inputs)
    # A view is right for the strides seen here; what runs later on the graph may bring others.
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    module.recompile()
    return module


def _writes(node: Node) -> bool:
    """Whether the node writes to a value that the graph computes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    return any(isinstance(read, Node) and read.op != "placeholder" for read in node.args[:1])


def example_inputs(module: GraphModule) -> list[Any]:
    """Return the example values of a graph's inputs, as constants of autograd."""
    values = [value_of(node) for node in module.graph.find_nodes(op="placeholder")]
    return [v.detach() if isinstance(v, Tensor) else v for v in values]


class AnySize:
    """A size that a trace does not fix, except as far as what it traces asks for it.

    Attributes:
        size: The size, to make fake tensors with.
    """

    def __init__(self, mode: FakeTensorMode, example: int) -> None:
        env = mode.shape_env
        assert env is not None
        source = ConstantSource("batch")
        self._symbol = env.create_symbol(
            example, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        self.size = env.create_symintnode(self._symbol, hint=example, source=source)
        self._env, self._seen, self._admitted = env, 0, {example}

    def admits(self, size: int) -> bool:
        """Whether everything that the traces so far have taken for granted holds for a size."""
        if self._seen != len(self._env.guards):
            self._seen = len(self._env.guards)
            self._admitted = set()
        if size < 2 or self._symbol in self._env.replacements:
            return False
        if size not in self._admitted:
            expressions = [guard.expr for guard in self._env.guards]
            mine = [e for e in expressions if e.free_symbols == {self._symbol}]
            mixed = [e for e in expressions if self._symbol in e.free_symbols and e not in mine]
            if mixed or any(e.subs(self._symbol, size) != sympy.true for e in mine):
                return False
            self._admitted.add(size)
        return True


def over_batch(
    function: Callable[..., Any], in_dims: tuple[int | None, ...], size: int | torch.SymInt
) -> Callable[..., tuple[Any, Any]]:
    """Return the vmap of a function, which also returns where each output is batched: `torch.vmap`
    expands those that are not."""
    return restore_vmap(function, in_dims, size, "error")  # pyright: ignore[reportArgumentType]
