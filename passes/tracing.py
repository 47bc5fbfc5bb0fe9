"""Trace a function of fake tensors into a functional ATen graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch.vmap import restore_vmap
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.traceback import preserve_node_meta
from torch.nn.attention import SDPBackend, sdpa_kernel

from passes.convolutions import any_size_differentiable
from passes.decompositions import before_autograd, decompositions
from passes.graph import value_of
from passes.inlining import inline_calls

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


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


@contextlib.contextmanager
def values_unknown() -> Iterator[None]:
    """Keep a trace from computing with the value of a tensor of one element that it knows: what a
    loss differentiates at is no constant, and a mark cannot run."""
    with (
        patch.object(proxy_tensor, "CONSTANT_NUMEL_LIMIT", -1),
        patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1),
    ):
        yield


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
    """Record a graph once more if decompositions wrote in place after functionalization, unless
    the writes are plain enough to be read out of the graph."""
    if drop_writes(module):
        return module
    detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]

    def again(*values: Any) -> Any:
        with torch.no_grad():
            return Interpreter(module).run(*values)

    return _record(_without_writes(again), detached, mode, table())


def drop_writes(module: GraphModule) -> bool:
    """Let what a graph reads after ``a.copy_(b)`` read ``b``; return whether no write is left.

    Only where ``a`` is a value that the graph computes, with the layout of ``b``, shares its memory
    with nothing that was made before, and ``b`` is not written to.
    """
    order = {node: number for number, node in enumerate(module.graph.nodes)}
    writes = [node for node in order if _writes(node)]
    written = {node.args[0] for node in writes}
    if len(written) < len(writes) or not all(_is_plain(node, written, order) for node in writes):
        return False
    for node in writes:
        target, source = node.args[:2]
        later = [user for user in target.users if order[user] > order[node]]
        target.replace_all_uses_with(source, delete_user_cb=later.__contains__)
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    if writes:
        module.recompile()
    return True


def _is_plain(write: Node, written: set[Any], order: dict[Node, int]) -> bool:
    """Whether a write is a copy of a whole tensor to another one that nothing else looks at."""
    if write.target is not torch.ops.aten.copy_.default:
        return False
    target, source = write.args[:2]
    if not isinstance(source, Node) or source in written or not isinstance(target, Node):
        return False
    a, b = value_of(target), value_of(source)
    # A copy carries out a conjugation, without which nothing can be viewed as real.
    layouts = [
        (x.dtype, x.device, str(x.shape), str(x.stride()), x.is_conj(), x.is_neg()) for x in (a, b)
    ]
    before = [user for user in target.users if order[user] < order[write]]
    return layouts[0] == layouts[1] and all(map(_is_fresh, [target, *before]))


def _is_fresh(node: Node) -> bool:
    """Whether a node's value has memory of its own."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    return all(value.alias_info is None for value in node.target._schema.returns)


def _without_writes(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.func.functionalize(function, remove="mutations")


_OF_A_DIMENSION = {
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("sum", "dim_IntList"),
        ("mean", "dim"),
        ("squeeze", "dim"),
        ("squeeze", "dims"),
        ("transpose", "int"),
        ("cumsum", "default"),
        ("flip", "default"),
    )
}


def _is_of_a_number(node: Node) -> bool:
    """Whether an operator is called for a dimension of a tensor of shape (), where PyTorch takes 0
    and -1 for one: it does nothing, and no rule need know of such a dimension."""
    if node.kwargs or not isinstance(node.args[0], Node):
        return False
    source, value = value_of(node.args[0]), value_of(node)
    return source.dim() == value.dim() == 0 and source.dtype == value.dtype


def _record(
    function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode, table: Any
) -> GraphModule:
    with (
        mode,
        enable_python_dispatcher(),
        any_size_differentiable(),
        preserve_node_meta(),
        without_fused_kernels(),
    ):
        module = make_fx(function, decomposition_table=table)(*inputs)
    inline_calls(module)
    # A view is right for the strides seen here; what runs later on the graph may bring others.
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    for node in module.graph.find_nodes(op="get_attr"):
        _keep_in(mode, node)
    for node in module.graph.nodes:
        node.meta.pop("from_node", None)  # a chain that each trace would copy, one link longer
        if node.target in _OF_A_DIMENSION and _is_of_a_number(node):
            node.target, node.args = torch.ops.aten.alias.default, node.args[:1]
    module.recompile()
    return module


def _keep_in(mode: FakeTensorMode, node: Node) -> None:
    """Give a constant's example value to the mode of the others: make_fx makes one for it alone."""
    value = value_of(node)
    if isinstance(value, Tensor) and getattr(value, "fake_mode", None) is not mode:
        with mode:
            options = {"dtype": value.dtype, "device": value.device}
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), **options)


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


class AnySizes:
    """Sizes that a trace does not fix, except as far as what it traces asks for them.

    Args:
        env: Where the trace's symbols live.

    Attributes:
        symbols: The symbols of the sizes, in the order in which they were made.
    """

    def __init__(self, env: ShapeEnv) -> None:
        self.symbols: list[Any] = []
        self._env, self._seen = env, 0
        self._admitted: set[tuple[int, ...]] = set()

    def new(self, example: int) -> torch.SymInt:
        """Return one more size, to make fake tensors with."""
        source = ConstantSource(f"size_{len(self.symbols)}")
        symbol = self._env.create_symbol(
            example, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
        )
        self.symbols.append(symbol)
        return self._env.create_symintnode(symbol, hint=example, source=source)  # pyright: ignore[reportReturnType]

    def is_fixed(self, symbol: Any) -> bool:
        """Whether what was traced holds for one size only."""
        return not sympy.sympify(self._env.replacements.get(symbol, symbol)).free_symbols

    def moved(self, sizes: Sequence[int], factor: int, step: int) -> list[int]:
        """Return other sizes, each that is not bound another one: ``factor · size + n · step`` for
        the n-th of them, counted from 1."""
        values: dict[Any, Any] = dict(zip(self.symbols, sizes, strict=True))
        n = 0
        for symbol in self.symbols:
            if symbol not in self._env.replacements:
                n += 1
                values[symbol] = factor * values[symbol] + n * step
        bound: list[Any] = [self._env.replacements.get(symbol, symbol) for symbol in self.symbols]
        return [int(expression.subs(values)) for expression in bound]

    def admits(self, sizes: Sequence[int]) -> bool:
        """Whether everything that the traces so far have taken for granted holds for sizes."""
        if self._seen != len(self._env.guards):
            self._seen = len(self._env.guards)
            self._admitted = set()
        key = tuple(sizes)
        if key not in self._admitted:
            if min(key, default=2) < 2 or not self._hold(key):
                return False
            self._admitted.add(key)
        return True

    def _hold(self, sizes: Sequence[int]) -> bool:
        values: dict[Any, Any] = dict(zip(self.symbols, sizes, strict=True))
        for symbol, size in values.items():
            stands_for = self._env.replacements.get(symbol, symbol)
            if sympy.sympify(stands_for).subs(values) != size:
                return False
        # One with another's symbol in it cannot be answered.
        expressions = [guard.expr for guard in self._env.guards]
        mine = [e for e in expressions if not e.free_symbols.isdisjoint(values)]
        return all(e.subs(values) == sympy.true for e in mine)


class AnySize:
    """One size that a trace does not fix: see `AnySizes`.

    Attributes:
        size: The size, to make fake tensors with.
    """

    def __init__(self, mode: FakeTensorMode, example: int) -> None:
        env = mode.shape_env
        assert env is not None
        self._sizes = AnySizes(env)
        self.size = self._sizes.new(example)

    def admits(self, size: int) -> bool:
        """Whether everything that the traces so far have taken for granted holds for a size."""
        return self._sizes.admits([size])


def wrapped_by(x: Any) -> Iterator[Any]:
    """Yield a tensor, and what the transforms that are open around it have wrapped."""
    yield x
    while isinstance(x, Tensor) and _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def over_batch(
    function: Callable[..., Any], in_dims: tuple[int | None, ...], size: int | torch.SymInt
) -> Callable[..., tuple[Any, Any]]:
    """Return the vmap of a function, which also returns where each output is batched: `torch.vmap`
    expands those that are not."""
    return restore_vmap(function, in_dims, size, "error")  # pyright: ignore[reportArgumentType]
