"""Capture a loss as one graph with Dynamo: the one file that knows Dynamo's private names.

Dynamo traces the user's function and guards on what it saw; we are its backend. Two of its
restrictions exist because of what usually comes after it, AOTAutograd, and are lifted while it
traces a decorated loss:

- `torch.autograd.grad` becomes one node whatever its tensors' history: parts of the graph that lie
  outside are never walked, because the gradient is computed inside the joint graph;
- ``x.requires_grad_()`` and ``x.requires_grad = True`` become one node, on inputs and intermediates
  alike.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import inspect
import itertools
import logging
import math
import os
import random
import re
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, _refs
from torch._dynamo import compiled_autograd, symbolic_convert
from torch._dynamo import config as dynamo_config
from torch._dynamo import exc as dynamo_errors
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.source import AttrSource, NumpyTensorSource
from torch._dynamo.variables import builtin as dynamo_builtins
from torch._dynamo.variables import higher_order_ops, user_defined
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.functions import (
    LocalGeneratorFunctionVariable,
    SkipFunctionVariable,
    UserFunctionVariable,
)
from torch._dynamo.variables.lists import BaseListVariable, TupleVariable
from torch._dynamo.variables.misc import (
    AutogradFunctionVariable,
    NumpyVariable,
    RandomVariable,
    SuperVariable,
)
from torch._dynamo.variables.tensor import TensorVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._functorch import eager_transforms
from torch._guards import Guard
from torch.autograd.function import once_differentiable
from torch.compiler import config as compiler_config
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.convolutions import take_any_size
from passes.factorised import METHODS
from passes.graph import placeholders, results, where
from passes.versions import IS_BEFORE_2_13
from rewriter import distributions, scaling
from rewriter.arrays import converting, told_apart
from rewriter.data import set_data
from rewriter.drawn import drawn_before
from rewriter.errors import (
    CaptureError,
    InternalError,
    NeedsNumber,
    NotRewritten,
    OptimizeNestedError,
    OptionError,
)
from rewriter.flags import set_requires_grad
from rewriter.generators import noted
from rewriter.guarded import past_the_wrapper
from rewriter.iterated import as_tuple, with_tuples
from rewriter.logs import appended_later
from rewriter.made_inside import calling_parameter, calling_variable, outlives
from rewriter.modes import is_traced_by_a_mode, is_watched
from rewriter.nesting import mend_closing
from rewriter.stateful import (
    WRITTEN_OUT,
    is_inside_forward_mode,
    is_inside_level,
    is_inside_transform,
    is_wrapped,
    levels_restored,
    write_outside,
)
from rewriter.substitutes import (
    SUBSTITUTES,
    accumulate_gradients,
    jvp_by_pullbacks,
    linearize,
    standard_bases,
    without_a_name,
)
from rewriter.telling import CLOCKS, told_later

functorch_c: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_lock = threading.RLock()
torch._dynamo.allow_in_graph(write_outside)

_capturing: contextvars.ContextVar[Trace | None] = contextvars.ContextVar("capturing", default=None)

DERIVATIVES = frozenset({torch.autograd.grad, eager_transforms._autograd_grad})
"""What a captured graph calls where a reverse pass begins."""

DYNAMO_ERRORS = (dynamo_errors.TorchDynamoException, dynamo_errors.FailOnRecompileLimitHit)
MAX_SPECIALISATIONS = 64

MATH: dict[Any, Callable[..., Any]] = {
    math.exp: torch.exp, math.expm1: torch.expm1, math.log: torch.log, math.log1p: torch.log1p,
    math.log2: torch.log2, math.log10: torch.log10, math.sqrt: torch.sqrt, math.fabs: torch.abs,
    math.sin: torch.sin, math.cos: torch.cos, math.tan: torch.tan, math.tanh: torch.tanh,
    math.sinh: torch.sinh, math.cosh: torch.cosh, math.asin: torch.asin, math.acos: torch.acos,
    math.atan: torch.atan, math.asinh: torch.asinh, math.acosh: torch.acosh,
    math.atanh: torch.atanh, math.erf: torch.erf, math.erfc: torch.erfc,
    math.lgamma: torch.lgamma, math.degrees: torch.rad2deg,
}  # fmt: skip
"""Functions of one Python float, and what does the same to a tensor."""

# What Dynamo calls in place of some of them.
MATH |= {
    getattr(torch, f"_sym_{function.__name__}"): same
    for function, same in MATH.items()
    if hasattr(torch, f"_sym_{function.__name__}")
}

TESTS: dict[Any, Callable[..., Any]] = {
    math.isnan: torch.isnan, math.isinf: torch.isinf, math.isfinite: torch.isfinite,
}  # fmt: skip
"""The same for those that say yes or no."""

FROM_DATA = frozenset(
    {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, _refs.tensor}
)
"""What makes a tensor of numbers."""

_NUMPY = (
    dynamo_utils.numpy_to_tensor_wrapper,
    dynamo_utils.numpy_method_wrapper,
    dynamo_utils.numpy_operator_wrapper,
)

_READ_FROM_A_TENSOR = (
    "an index or a number of steps is read from a tensor; index with tensors of one dimension "
    "instead, as in `g[:, dims]` or `g[:, dims[k : k + 1]]` for k in range(len(dims)), or pass "
    "Python integers"
)

OF_VALUES = "a size that depends on values (of a filter, `nonzero`, `repeat_interleave`)"


@dataclass
class Trace:
    """What is known of one capture.

    Attributes:
        by_pullbacks: Whether forward mode is written as pullbacks.
        has_forward_mode: Whether Dynamo has met forward mode.
        refused: Why the trace was ended, if we ended it.
        graphs: How many graphs Dynamo has made of the function.
    """

    by_pullbacks: bool
    has_forward_mode: bool = False
    refused: str = ""
    graphs: int = 0

    def refuse(self, reason: str) -> None:
        """End the trace; Dynamo keeps of an exception no more than its words.

        Raises:
            CaptureError: With ``reason``.
        """
        self.refused = reason
        raise CaptureError(reason)


def _proxy_arguments(args: Any, kwargs: Any) -> tuple[tuple, dict]:
    return tuple(a.as_proxy() for a in args), {k: v.as_proxy() for k, v in kwargs.items()}


def _handle_autograd_grad(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """Put `torch.autograd.grad` into the graph as one node."""
    inputs = args[1] if len(args) > 1 else kwargs.get("inputs")
    inputs = inputs and inputs.realize()
    keys = None
    if isinstance(inputs, ConstDictVariable) and inputs.python_type() is dict:
        keys = list(inputs.items)
        flat = TupleVariable(list(inputs.items.values()))
        args = (args[0], flat, *args[2:]) if len(args) > 1 else args
        kwargs = kwargs if len(args) > 1 else {**kwargs, "inputs": flat}
    given = with_tuples(tx, args, kwargs)
    proxy = tx.output.create_proxy("call_function", torch.autograd.grad, *_proxy_arguments(*given))
    # Backward operators may read numbers (`index_put` with a mask) that no traced value holds.
    with tx.fake_mode.shape_env.ignore_fresh_unbacked_symbols():
        result = wrap_fx_proxy(tx=tx, proxy=proxy)
    if keys is None:
        return result
    assert isinstance(result, BaseListVariable)
    return ConstDictVariable(dict(zip(keys, result.items, strict=True)), dict)


def _requires_grad_(self: TensorVariable, tx: Any, requires_grad: Any = True) -> TensorVariable:
    """Put a change of ``requires_grad`` into the graph as one node."""
    flag = requires_grad if isinstance(requires_grad, bool) else requires_grad.as_python_constant()
    example = self.as_proxy().node.meta["example_value"]
    if example.requires_grad != flag:
        tx.output.create_proxy("call_function", set_requires_grad, (self.as_proxy(), flag), {})
        example.requires_grad_(flag)
        self.requires_grad = flag
        if flag and not self.source:
            _leaves_of(tx).append(self)
            effects = tx.output.side_effects
            if effects.is_attribute_mutation(self):
                effects.store_attr(self, "grad", ConstantVariable.create(None))
    return self


def _leaf_made(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make a tensor, then a leaf of it: ``torch.rand(n, requires_grad=True)``."""

    def call(self: Any, tx: Any, *args: Any) -> Any:
        *given, kwargs = args
        flag = kwargs.get("requires_grad")
        if flag is None or not flag.is_python_constant() or not flag.as_python_constant():
            return original(self, tx, *args)
        made = original(self, tx, *given, {k: v for k, v in kwargs.items() if v is not flag})
        return _requires_grad_(made, tx, True)

    return call


def _leaves_of(tx: Any) -> list[TensorVariable]:
    """Return the leaves that the loss has made so far, by Dynamo's record of this trace."""
    output = tx.output
    if not hasattr(output, "optimize_nested_leaves"):
        output.optimize_nested_leaves = []
    return output.optimize_nested_leaves


def _method_backward(trace: Trace) -> Callable[..., Any]:
    def backward(self: TensorVariable, tx: Any, *args: Any, **kwargs: Any) -> Any:
        return _trace_backward(trace, tx, self, *args, **kwargs)

    return backward


def _trace_backward(
    trace: Trace,
    tx: Any,
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: Any = None,
    create_graph: Any = None,
    inputs: Any = None,
    gradient: Any = None,
) -> Any:
    """Trace `torch.autograd.backward` as `torch.autograd.grad` and an addition to each leaf's
    ``.grad``."""
    if inputs is None or inputs.is_python_constant():
        inputs = TupleVariable(_all_leaves(trace, tx))
    arguments = [
        as_tuple(tx, tensors),
        TupleVariable([inputs]) if isinstance(inputs, TensorVariable) else as_tuple(tx, inputs),
        as_tuple(tx, gradient or grad_tensors or ConstantVariable.create(None)),
        create_graph or ConstantVariable.create(False),
    ]
    substitute = VariableTracker.build(tx, accumulate_gradients)
    return tx.inline_user_function_return(substitute, arguments, {})


def _call_substitute(
    original: Callable[..., Any], attribute: str, trace: Trace
) -> Callable[..., Any]:
    """Trace our Python in place of the functions that Dynamo would skip or enter to no avail."""
    bodies: dict[Any, Any] = {torch.func.linearize: linearize, **scaling.METHODS}
    bodies |= distributions.BODIES
    if hasattr(eager_transforms, "_wraps_without_dynamo_attrs"):  # not in torch 2.11
        bodies[eager_transforms._wraps_without_dynamo_attrs] = without_a_name
    if IS_BEFORE_2_13:
        bodies[eager_transforms._chunked_standard_basis_for_] = standard_bases
    if trace.by_pullbacks:
        bodies[eager_transforms._jvp_with_argnums] = jvp_by_pullbacks

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function: Any = getattr(self, attribute, None)  # a closure has none
        if function is random.random and not args and not kwargs:
            return user_defined.call_random_fn(tx, random.random, [], {})
        if function in CLOCKS and not args and not kwargs:
            read: Any = user_defined.call_random_fn(tx, function, [], {})
            return TensorVariable.call_method(read, tx, "item", [], {})
        if function is torch.autograd.backward:
            return _trace_backward(trace, tx, *args, **kwargs)
        ask = distributions.ASKED.get(function)
        if ask is not None:
            return ConstantVariable.create(ask(*(x.as_python_constant() for x in args)))
        if function is distributions.SAMPLE and not distributions.can_look():
            return ConstantVariable.create(None)
        if function in bodies:
            substitute = VariableTracker.build(tx, bodies[function])
            own = self.self_args() if isinstance(self, UserFunctionVariable) else ()
            return tx.inline_user_function_return(substitute, [*own, *args], kwargs)
        if function is eager_transforms._jvp_with_argnums:
            trace.has_forward_mode = True
        return original(self, tx, args, kwargs)

    return call


def _noting_draws(original: Callable[..., Any]) -> Callable[..., Any]:
    """Take note of the generator's state where Dynamo's code draws the inputs of a graph, which may
    not be run then."""

    def call(tx: Any, draw: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return original(tx, noted(draw), args, kwargs)

    return call


def _method_of_random(original: Callable[..., Any], trace: Trace) -> Callable[..., Any]:
    """Trace the methods of a `random.Random` that the loss makes.

    Raises:
        CaptureError: It was there before: Dynamo would draw from its present state in every call.
    """

    def call(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if self.source is not None:
            trace.refuse("a random generator of one's own")
        return original(self, tx, name, args, kwargs)

    return call


def _is_stdlib(original: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Let Dynamo guard on globals of `os`, whose environment changes, and of a user's modules that
    bear the name of one of Python's."""

    def is_stdlib(module: Any) -> bool:
        if module is os or not original(module):
            return False
        path = getattr(module, "__file__", None)
        return path is None or path.startswith(os.path.dirname(os.__file__))

    return is_stdlib


def _all_leaves(trace: Trace, tx: Any) -> list[Any]:
    """Return every tensor that ``backward()`` could reach.

    Raises:
        CaptureError: One of them was computed outside of the loss; its graph is not known here.
    """
    found: dict[Node, Any] = {}
    for variable in [*tx.output.input_source_to_var.values(), *_leaves_of(tx)]:
        if isinstance(variable, TensorVariable) and variable.requires_grad:
            if variable.source and variable.has_grad_fn:
                trace.refuse("backward() in a loss one of whose inputs has a history of its own")
            found.setdefault(variable.as_proxy().node, variable)
    return list(found.values())


def _setattr_on_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, tx: Any, obj: Any, name: Any, value: Any) -> Any:
        if (
            isinstance(obj, TensorVariable)
            and name.is_python_constant()
            and name.as_python_constant() == "requires_grad"
            and value.is_python_constant()
        ):
            _requires_grad_(obj, tx, value)
            return ConstantVariable.create(None)
        if (
            isinstance(obj, TensorVariable)
            and name.is_python_constant()
            and name.as_python_constant() == "data"
            and _is_like(obj, value.realize())
        ):
            pair = obj.as_proxy(), value.as_proxy()
            if not _is_same_place(pair):  # what ``x.data -= y`` ends with
                tx.output.create_proxy("call_function", set_data, pair, {})
            return ConstantVariable.create(None)
        return original(self, tx, obj, name, value)

    return call


def _is_like(one: TensorVariable, other: Any) -> bool:
    """Whether two tensors differ in their values only."""
    if not isinstance(other, TensorVariable):
        return False
    a, b = (example_of(x.as_proxy().node) for x in (one, other))
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _is_same_place(proxies: Sequence[Any]) -> bool:
    """Whether tensors of one shape are the same part of one memory."""
    examples = [example_of(proxy.node) for proxy in proxies]
    places = {(x.untyped_storage()._cdata, x.storage_offset(), x.stride()) for x in examples}
    return len(places) == 1


def _run_node(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a transform's body write to tensors that the transform does not wrap; let functions of
    `math` be computed from floats that are not known; take NumPy's numbers for numbers."""

    def run(tracer: Any, node: Node, args: Any, kwargs: Any, nnmodule: Any) -> Any:
        name = str(node.target)
        writes = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
        if writes and is_inside_transform() and not any(is_wrapped(x) for x in args):
            node.op, node.target, node.args = "call_function", write_outside, (name, *node.args)
            write_outside(name, *args, **kwargs)
            return args[0]
        if node.target in TESTS and any(isinstance(x, torch.SymFloat) for x in args):
            shapes = tracer.fake_mode.shape_env
            with shapes.ignore_fresh_unbacked_symbols():
                return shapes.create_unbacked_symbool()
        if node.target in MATH and any(isinstance(x, torch.SymFloat) for x in args):
            return _unknown_float(tracer)
        numbers = [n for n in node.all_input_nodes if _is_numpy_number(n)]
        if numbers and node.target in FROM_DATA and not (node.args[1:] or node.kwargs):
            node.op, node.target = "call_method", "clone"
        elif numbers and not is_numpys(node):
            args, kwargs = _read_numbers(tracer, node, numbers, args, kwargs)
        return original(tracer, node, args, kwargs, nnmodule)

    return run


def _unknown_float(tracer: Any) -> torch.SymFloat:
    shapes = tracer.fake_mode.shape_env
    with shapes.ignore_fresh_unbacked_symbols():
        return shapes.create_unbacked_symfloat()


def _is_numpy_number(node: Node) -> bool:
    """Whether a node is a NumPy float as written: an array of shape () is one in NumPy."""
    value = example_of(node)
    if not isinstance(value, Tensor) or value.dim() or not value.dtype.is_floating_point:
        return False
    if node.op == "placeholder":
        return isinstance(getattr(node.meta.get("grapharg"), "source", None), NumpyTensorSource)
    return is_numpys(node)


def is_numpys(node: Node) -> bool:
    """Whether a node calls NumPy, as Dynamo traces it."""
    return isinstance(node.target, _NUMPY)


def _read_numbers(
    tracer: Any, node: Node, numbers: Sequence[Node], args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """Let a call of PyTorch read numbers that NumPy has computed: to PyTorch they are no tensors,
    whose type would count."""
    read: dict[int, Any] = {}
    for number in numbers:
        with node.graph.inserting_before(node):
            item = node.graph.call_method("item", (number,))
        item.meta = {**number.meta, "example_value": _unknown_float(tracer)}
        read[id(example_of(number))] = example_of(item)
        node.replace_input_with(number, item)
    return pytree.tree_map(lambda x: read.get(id(x), x), (args, kwargs))


def _speculate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Trace the backward of a user's `autograd.Function` as what it is under ``create_graph``:
    differentiable. Dynamo would put it under `no_grad`."""

    def speculate(tx: Any, f: Any, args: Any, kwargs: Any, name: str, **options: Any) -> Any:
        if name == "autograd.Function":
            options["enable_grad"] = None
        return original(tx, f, args, kwargs, name, **options)

    return speculate


def _call_apply(original: Callable[..., Any], trace: Trace) -> Callable[..., Any]:
    """Trace a user's `autograd.Function` that has a forward-mode rule by its backward.

    Raises:
        CaptureError: Inside of forward mode, where the rule itself would be needed; or the function
            is once differentiable: eager raises where it is differentiated twice, and a trace,
            which is differentiated twice by design, has a constant there.
    """

    def call_apply(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        once = getattr(self.fn_cls.backward, "__globals__", None) is once_differentiable.__globals__
        if once and torch.is_grad_enabled() and any(_requires_grad(x) for x in args):
            trace.refuse("a user-defined autograd.Function that is once_differentiable")
        args = _told_apart(tx, args)
        if self.fn_cls.jvp is torch.autograd.Function.jvp:
            return original(self, tx, args, kwargs)
        if is_inside_forward_mode() or trace.by_pullbacks:
            trace.refuse("the forward-mode rule of a user-defined autograd.Function")
        stand_in = type(self.fn_cls.__name__, (self.fn_cls,), {"jvp": torch.autograd.Function.jvp})
        return original(self.clone(fn_cls=stand_in), tx, args, kwargs)

    return call_apply


def _requires_grad(argument: Any) -> bool:
    return isinstance(argument, TensorVariable) and argument.requires_grad is True


def _told_apart(tx: Any, arguments: Any) -> list[Any]:
    """Give a tensor that is passed twice a second name: Dynamo takes each but once."""
    seen: set[Node] = set()
    own = []
    for argument in arguments:
        if isinstance(argument, TensorVariable):
            if argument.as_proxy().node in seen:
                argument = argument.call_method(tx, "view_as", [argument], {})
            seen.add(argument.as_proxy().node)
        own.append(argument)
    return own


def _resolve_super(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``super().loss()`` find the function of a decorated method: Dynamo calls what is a
    function there, and nothing else."""

    def resolve(self: Any, tx: Any, name: str) -> tuple[Any, Any]:
        value, source = original(self, tx, name)
        function = getattr(value, "__dict__", {}).get("as_written")
        if not isinstance(function, types.FunctionType):
            return value, source
        return function, source and AttrSource(source, "as_written")

    return resolve


def _setattr_of_dynamo() -> tuple[Any, str]:
    """Return where Dynamo handles `setattr`; it moved between torch 2.11 and 2.13."""
    owner = getattr(dynamo_builtins, "SetAttrBuiltinVariable", None)
    if owner is not None:
        return owner, "_call_setattr"
    return dynamo_builtins.BuiltinVariable, "call_setattr"


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the block."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


@contextlib.contextmanager
def guards_unmoved() -> Iterator[None]:
    """Leave pytree's table of types alone in the block, where nothing is added for good.

    What was captured through pytree, as transforms are, holds only until somebody writes to the
    table; PyTorch's pickler registers a type with it for as long as it runs.
    """
    table = pytree.SUPPORTED_NODES
    own = dict(table)
    try:
        with replaced(pytree, "SUPPORTED_NODES", own):
            yield
    finally:
        if new := {kind: node for kind, node in own.items() if kind not in table}:
            table.update(new)


@contextlib.contextmanager
def tensor_method(name: str, handler: Callable[..., Any]) -> Iterator[None]:
    """Handle a method of tensors in our way for the block: from torch 2.14 on Dynamo looks it up in
    a table, before by its name."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(TensorVariable, f"method_{name}", handler))
        table = getattr(TensorVariable, "tp_methods", {})
        if name in table:
            changed = {**table, name: type(table[name])(handler)}
            stack.enter_context(replaced(TensorVariable, "tp_methods", changed))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dynamo's own warnings and error logs from the user: what matters is reported in our
    words."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
            warnings.filterwarnings("ignore", message="Dynamo does not know how to trace")
            # It makes an instance of a user's `autograd.Function` to trace its methods.
            warnings.filterwarnings("ignore", message=".* should not be instantiated")
            yield
    finally:
        logger.setLevel(level)


def _inlined(
    substitute: Callable[..., Any], when: Callable[[], bool] = lambda: True
) -> Callable[..., Any]:
    """Let Dynamo trace our Python in place of a function that it does not trace well."""

    def handle(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not when():
            return None
        function = VariableTracker.build(tx, substitute)
        return tx.inline_user_function_return(function, list(args), kwargs)

    return handle


def _inlined_method(substitute: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `_inlined` does for a method of tensors, inside of a transform."""

    def handle(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_inside_transform():
            return None
        function = VariableTracker.build(tx, substitute)
        return tx.inline_user_function_return(function, [self, *args], kwargs)

    return handle


@contextlib.contextmanager
def _with_handlers(handlers: dict[Any, Any]) -> Iterator[None]:
    before = dict(handlers)
    handlers[torch.autograd.grad] = _handle_autograd_grad
    handlers[distributions.INFER_SIZE] = _inlined(distributions.infer_size)
    handlers.update({name: _inlined(body) for name, body in SUBSTITUTES.items()})
    handlers.update(
        {name: _inlined(body, is_inside_transform) for name, body in WRITTEN_OUT.items()}
    )
    try:
        yield
    finally:
        handlers.clear()
        handlers.update(before)


@contextlib.contextmanager
def capturing(
    trace: Trace,
    *,
    specialize_floats: bool = False,
    fixed_sizes: bool = False,
    inputs: Sequence[str] = (),
    logs: Sequence[str] = (),
) -> Iterator[None]:
    """Let Dynamo put nested derivatives into the graph, for the calls inside the ``with`` block.

    Args:
        trace: What is wished for, and gets to be known.
        specialize_floats: Build anew for each value of a float argument, where only a Python number
            will do.
        fixed_sizes: Build anew for each size, where nothing else was asked for.
        inputs: Integers to be inputs of the graph, as Dynamo's expressions for them.
        logs: Lists that are appended to after the graph has run.
    """
    handlers = TorchInGraphFunctionVariable._get_handlers()
    settings: dict[str, Any] = {
        name: True for name in ("trace_autograd_ops", "allow_rnn") if hasattr(dynamo_config, name)
    }
    take_any_size()
    mend_closing()
    with _lock, contextlib.ExitStack() as stack:
        settings["specialize_float"] = specialize_floats
        if fixed_sizes:
            settings |= {"automatic_dynamic_shapes": False, "assume_static_by_default": True}
        settings |= {
            "recompile_limit": MAX_SPECIALISATIONS,
            "reorderable_logging_functions": {print, warnings.warn},
            "skip_nnmodule_hook_guards": False,  # a hook may come after the capture
            "use_numpy_random_stream": True,  # refused; else drawn from PyTorch's own generator
            "optimize_ddp": False,  # cuts the graph, between a forward and its inner derivative too
        }
        if IS_BEFORE_2_13:
            # Else `requires_grad_()` on a parameter, or another default of a function, would go
            # unnoticed after a capture.
            settings |= {
                "skip_tensor_guards_with_matching_dict_tags": False,
                "use_recursive_dict_tags_for_guards": False,
                "skip_guards_on_constant_func_defaults": False,
            }
        if hasattr(dynamo_config, "record_runtime_overhead"):
            # Marks for profilers, around nothing: twelve calls of Python in each call of ours.
            settings["record_runtime_overhead"] = False
        stack.enter_context(dynamo_config.patch(**settings))
        # It looks for nan in the gradients of fake tensors. What a step returns is looked at later.
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        stack.enter_context(_open(inputs))
        stack.enter_context(appended_later(logs, trace.refuse))
        stack.enter_context(told_later(trace.refuse))
        stack.enter_context(_quiet())
        stack.enter_context(tensor_method("requires_grad_", _requires_grad_))
        for name, body in METHODS.items():
            stack.enter_context(tensor_method(name, _inlined_method(body)))
        stack.enter_context(replaced(dynamo_utils, "run_node", _run_node(dynamo_utils.run_node)))
        name = "speculate_subgraph_with_auto_output_flattening"
        if hasattr(higher_order_ops, name):
            traced = _speculate(getattr(higher_order_ops, name))
            stack.enter_context(replaced(higher_order_ops, name, traced))
        apply = _call_apply(AutogradFunctionVariable.call_apply, trace)
        stack.enter_context(replaced(AutogradFunctionVariable, "call_apply", apply))
        stack.enter_context(tensor_method("backward", _method_backward(trace)))
        for kind, attribute in (
            (SkipFunctionVariable, "value"),
            (UserFunctionVariable, "fn"),
            (LocalGeneratorFunctionVariable, "fn"),
        ):
            call = _call_substitute(kind.call_function, attribute, trace)
            stack.enter_context(replaced(kind, "call_function", call))
        draws = _noting_draws(user_defined.call_random_fn)
        stack.enter_context(replaced(user_defined, "call_random_fn", draws))
        drawn = drawn_before(NumpyVariable.call_function)
        stack.enter_context(replaced(NumpyVariable, "call_function", drawn))
        told = told_apart(Guard.set_export_info)
        stack.enter_context(replaced(Guard, "set_export_info", told))
        for kind, name in (
            (TorchInGraphFunctionVariable, "call_function"),
            (TensorVariable, "call_method"),
        ):
            stack.enter_context(replaced(kind, name, _leaf_made(getattr(kind, name))))
        own = converting(TorchInGraphFunctionVariable.call_function)
        stack.enter_context(replaced(TorchInGraphFunctionVariable, "call_function", own))
        made = converting(calling_variable(user_defined.UserDefinedClassVariable.call_function))
        stack.enter_context(replaced(user_defined.UserDefinedClassVariable, "call_function", made))
        if hasattr(TorchInGraphFunctionVariable, "call_nn_parameter"):
            own = TorchInGraphFunctionVariable.call_nn_parameter
            made = classmethod(calling_parameter(own, _requires_grad_))
            stack.enter_context(replaced(TorchInGraphFunctionVariable, "call_nn_parameter", made))
        held = _method_of_random(RandomVariable.call_method, trace)
        stack.enter_context(replaced(RandomVariable, "call_method", held))
        if hasattr(symbolic_convert, "is_stdlib"):
            is_stdlib = _is_stdlib(symbolic_convert.is_stdlib)
            stack.enter_context(replaced(symbolic_convert, "is_stdlib", is_stdlib))
        if hasattr(SuperVariable, "_resolved_getattr_and_source"):
            found = _resolve_super(SuperVariable._resolved_getattr_and_source)
            stack.enter_context(replaced(SuperVariable, "_resolved_getattr_and_source", found))
        owner, name = _setattr_of_dynamo()
        stack.enter_context(replaced(owner, name, _setattr_on_tensor(getattr(owner, name))))
        stack.enter_context(_with_handlers(handlers))
        stack.enter_context(levels_restored())
        token = _capturing.set(trace)
        try:
            yield
        finally:
            _capturing.reset(token)


def is_capturing() -> bool:
    """Whether Dynamo is prepared to capture a loss."""
    return _capturing.get() is not None


def _open(inputs: Sequence[str]) -> contextlib.AbstractContextManager[Any]:
    """Have Dynamo make inputs of integers that it would take for constants, in the block."""
    config: Any = compiler_config
    if not inputs or not hasattr(config, "dynamic_sources"):
        return contextlib.nullcontext()
    known = [name for name in config.dynamic_sources.split(",") if name]
    return config.patch(dynamic_sources=",".join([*known, *inputs]))


@contextlib.contextmanager
def refusing_side_effects() -> Iterator[None]:
    """Refuse, in the block, losses that change a Python object that others can see."""
    settings: dict[str, Any] = {}
    if hasattr(dynamo_config, "side_effect_replay_policy"):  # not in torch 2.11
        settings["side_effect_replay_policy"] = "error"
    with dynamo_config.patch(**settings):
        yield


def mark_dynamic(x: Tensor, dim: int, least: int, most: int | None) -> None:
    """Leave a size of a tensor open in captures of functions that are called with it."""
    # Without a number for the upper end, Dynamo fails on a lower one.
    torch._dynamo.mark_dynamic(x, dim, min=least, max=2**62 if most is None else most)


def compile_function(
    function: Callable[..., Any], backend: types.MethodType, dynamic: bool | None
) -> Callable[..., Any]:
    """Return ``function`` behind Dynamo's guards, each new specialisation built by ``backend(graph
    module, inputs)``, a method of what calls the function returned.

    Only inside of `capturing`: a specialisation that Dynamo would trace by itself, without what is
    prepared for it there, is an error of Dynamo's.
    """

    # Dynamo has its backend where no garbage collector sees it.
    method = weakref.WeakMethod(backend)

    def prepared(captured: GraphModule, inputs: Any) -> Any:
        trace = _capturing.get()
        if trace is None:
            raise CaptureError("a new specialisation outside of a capture")
        trace.graphs += 1
        if trace.graphs > 1:
            # A derivative in one piece of what lies in another would be a constant, or zero.
            trace.refuse("the graph of the loss was cut into pieces before it could be rewritten")
        if any(map(_gets_a_history, placeholders(captured.graph))):
            trace.refuse("a value that carries a gradient is written to an input of the loss")
        if outlives(captured):
            trace.refuse("a parameter that is made in the loss is kept after it")
        build = method()
        assert build is not None, "a specialisation for a loss that is gone"
        try:
            return build(captured, inputs)
        finally:
            for node in placeholders(captured.graph):
                _forget_tensors(getattr(example_of(node), "fake_mode", None))

    options: dict[str, Any] = {"options": {"guard_filter_fn": _kept_guards}}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = MAX_SPECIALISATIONS
    own = _own_code(function)
    with distributions.validation_kept():
        compiled = torch.compile(own, backend=prepared, fullgraph=True, dynamic=dynamic, **options)
    _let_go(prepared)
    reset = getattr(torch._dynamo.eval_frame, "reset_code", None)
    if reset is not None:
        # What Dynamo has made of a code object leads back to it where no garbage collector sees it.
        weakref.finalize(own, reset, own.__code__).atexit = False
    return past_the_wrapper(own, compiled, is_capturing)


def _gets_a_history(node: Node) -> bool:
    """Whether an input that has no history has one afterwards: whoever holds it sees that."""
    given = getattr(node.meta.get("grapharg"), "example", None)
    if not isinstance(given, Tensor) or not isinstance(example_of(node), Tensor):
        return False
    return given.grad_fn is None and example_of(node).grad_fn is not None


def _forget_tensors(mode: Any) -> None:
    """Drop the weak references to the user's tensors that go along with their fake values: while
    there is one, `torch.utils.swap_tensors` refuses a tensor."""
    converter = getattr(mode, "fake_tensor_converter", None)
    describer = getattr(getattr(converter, "meta_converter", None), "describer", None)
    known = getattr(describer, "lookup_tensor", None)
    if known:
        known.clear()


def _let_go(backend: Callable[..., Any]) -> None:
    """Take a backend out of Dynamo's list of those that it resets, which would keep all that it
    leads to for ever."""
    known: dict[int, Any] = getattr(torch._dynamo.eval_frame, "cached_backends", {})
    for key, wrapper in list(known.items()):
        if getattr(wrapper, "compiler_fn", None) is backend:
            known.pop(key, None)


def _kept_guards(guards: Sequence[Any]) -> list[bool]:
    """Drop the one guard that what we build does not depend on: which hooks on saved tensors are in
    force. It is Python, and would cost a call of a small network as much as ten others."""
    return [guard.guard_type != "AUTOGRAD_SAVED_TENSORS_HOOKS" for guard in guards]


_numbers = itertools.count()


def _own_code(function: Callable[..., Any]) -> types.FunctionType:
    """Return the function with a code object of its own.

    Dynamo keeps its specialisations with the code. Functions that share it (closures of one
    factory, one class's modules) would search, and use up, each other's.
    """
    if not inspect.isfunction(function):

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        code = call.__code__.replace(co_name=f"call_{next(_numbers)}")
        return types.FunctionType(code, call.__globals__, None, None, call.__closure__)
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    own.__dict__.update(function.__dict__)
    own.__module__, own.__qualname__ = function.__module__, function.__qualname__
    return own


def forget(error: BaseException) -> None:
    """Drop what a failed capture left behind, now and not when garbage is next collected.

    Frames of a trace that was broken off hold guards of the dispatcher's state. Whenever they are
    destroyed they put back the state they were made in, in which autograd may be switched off;
    everything computed after that would have wrong gradients.
    """
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    found: BaseException | None = error
    with torch._C._ForceDispatchKeyGuard(include, exclude):
        while found is not None:
            traceback.clear_frames(found.__traceback__)
            traced = getattr(found, "_torch_dynamo_tracer_output", None)
            output = getattr(traced, "output_graph_for_cleanup", None)
            _forget_tensors(getattr(output, "fake_mode", None))
            found = found.__cause__ or found.__context__
        gc.collect()


def as_capture_error(error: BaseException, trace: Trace) -> CaptureError | None:
    """Return what stood in the way of a capture, in words; None if the error is not about capture.

    Raises:
        OptionError, NotRewritten: What our backend told Dynamo about the user's wishes.
    """
    inner = getattr(error, "inner_exception", None) or error.__cause__
    for found in (error, inner):
        if isinstance(found, CaptureError):
            return found
    if isinstance(inner, (OptionError, NotRewritten)):
        raise inner from None
    if isinstance(error, dynamo_errors.BackendCompilerFailed):
        return CaptureError(f"internal error in optimize_nested: {inner!r}", _innermost(inner))
    if isinstance(error, dynamo_errors.FailOnRecompileLimitHit):
        return CaptureError(f"more than {MAX_SPECIALISATIONS} specialisations")
    if isinstance(error, DYNAMO_ERRORS):
        text = [line.strip() for line in str(error).splitlines() if line.strip()]
        if trace.refused:
            return CaptureError(trace.refused, _user_line(error, text))
        reason = text[0] if text else type(error).__name__
        if any(_asks_for_a_float(line) for line in text):
            return NeedsNumber("a branch on the value of a tensor", _user_line(error, text))
        if "config.use_numpy_random_stream" in reason:
            reason = "a draw from NumPy's random generator"
        if reason == "Data-dependent branching" or any(
            "Could not guard on data-dependent expression" in line for line in text
        ):
            reason = "a branch on the value of a tensor"
        if any(
            "Could not extract specialized integer" in line or "(got SymInt)" in line
            for line in text
        ):
            reason = _READ_FROM_A_TENSOR
        got = re.search(r"got \w+\([\"'](.*?)[\"']\)", " ".join(text))
        if got is not None:  # what an operator said on fake tensors
            reason += f": {got[1]}"
        return CaptureError(reason, _user_line(error, text))
    if hasattr(error, "real_stack"):
        # Raised while Dynamo ran the user's code on fake tensors. Where the fault is the user's,
        # the loss as written raises it too.
        line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        reason = f"{type(error).__name__}: {line}".rstrip(": ")
        if "got SymInt" in line:
            reason = _READ_FROM_A_TENSOR
        return CaptureError(reason, _user_line(error, []))
    return None


def _asks_for_a_float(line: str) -> bool:
    """Whether Dynamo says that the value of a float, which is an input or read from a tensor,
    decides."""
    return "Could not guard on data-dependent" in line and re.search(r"\bzu?f\d+", line) is not None


def is_dynamos_own(error: BaseException, trace: Trace) -> bool:
    """Whether Dynamo failed by itself, or PyTorch did on what Dynamo captured: not a refusal of
    ours."""
    if isinstance(error, dynamo_errors.BackendCompilerFailed):
        inner = error.inner_exception
        return isinstance(inner, InternalError) or not isinstance(inner, OptimizeNestedError)
    return isinstance(error, DYNAMO_ERRORS) and not trace.refused


def _innermost(error: BaseException | None) -> str:
    frames = traceback.extract_tb(getattr(error, "__traceback__", None))
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"


def _user_line(error: BaseException, text: list[str]) -> str:
    """Return the innermost line of the user's code that an error of Dynamo names."""
    stack = getattr(error, "real_stack", None)
    if stack:
        frame = stack[-1]
        return f"{frame.filename}:{frame.lineno}: {frame.line or ''}".rstrip(": ")
    for index in range(len(text) - 1, -1, -1):
        if text[index].startswith("File "):
            path, _, rest = text[index].removeprefix('File "').partition('", line ')
            code = text[index + 1] if index + 1 < len(text) else ""
            return f"{path}:{rest.split(',')[0]}: {code}"
    return "?"


def example_of(node: Node) -> Any:
    """Return the fake value Dynamo gave a node of a captured graph."""
    return node.meta.get("example_value")


def first_of_values(captured: GraphModule) -> str | None:
    """Return the line of a captured graph that makes the first size that depends on values; None if
    there is none."""
    for node in captured.graph.nodes:
        sizes = [
            size
            for x in pytree.tree_leaves(example_of(node))
            for size in (x.shape if isinstance(x, Tensor) else (x,))
            if isinstance(size, torch.SymInt)
        ]
        if any(not size.node.has_hint() for size in sizes):
            return where(node)
    return None


def is_parameter(placeholder: Node) -> bool:
    """Whether a captured graph's input is a parameter of a module."""
    return isinstance(example_of(placeholder), torch.nn.Parameter)


def source_name(placeholder: Node) -> str:
    """Return where a captured graph's input comes from, as an expression over the function's locals
    and globals."""
    argument = placeholder.meta.get("grapharg")
    name: Any = getattr(getattr(argument, "source", None), "name", None)
    return str(name() if callable(name) else name or placeholder.name)


def marked_sizes(captured: torch.fx.GraphModule) -> list[Any]:
    """Return the sizes that the user has told Dynamo to keep open, by `torch._dynamo.mark_dynamic`:
    to fix one is an error."""
    found = []
    for node in captured.graph.find_nodes(op="placeholder"):
        tensor = getattr(node.meta.get("grapharg"), "example", None)
        marked = getattr(tensor, "_dynamo_dynamic_indices", ())
        found += [example_of(node).shape[dim] for dim in marked]
    return found


def refuse_switched_off() -> None:
    """Check that Dynamo traces at all.

    Raises:
        CaptureError: The user has switched it off.
    """
    if is_switched_off():
        raise CaptureError("torch.compile is switched off (TORCHDYNAMO_DISABLE)")


def is_switched_off() -> bool:
    """Whether the user wants no compilation."""
    return dynamo_config.disable


def is_traced() -> bool:
    """Whether another compilation, compiled autograd or a dispatch mode is open around this
    call."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or compiled_autograd.compiled_autograd_enabled
    )


def is_transformed() -> bool:
    """Whether a transform, a dual level, another compilation or a dispatch mode is open around this
    call."""
    return torch.compiler.is_compiling() or is_observed()


def is_observed() -> bool:
    """Whether a transform, a dual level, a dispatch mode or compiled autograd is open around this
    call."""
    return torch._C._len_torch_dispatch_stack() > 0 or is_recorded()


def is_recorded() -> bool:
    """Whether a transform, a dual level, compiled autograd or a mode that traces is open around
    this call: what is run there is part of a program of theirs."""
    if is_inside_level() or compiled_autograd.compiled_autograd_enabled:
        return True
    return bool(is_watched()) and is_traced_by_a_mode()


def with_inputs_returned(captured: GraphModule, step: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``step`` with those inputs in place of outputs that the captured function returns
    itself: after ``self.steps += 1`` the module holds the same tensor, and so does who held it.
    Integers that it reads from tensors and returns are Python's.

    Args:
        captured: What Dynamo captured.
        step: Computes its outputs, and has written new values to the inputs by then.
    """
    positions = {
        id(example_of(node)): i
        for i, node in enumerate(placeholders(captured.graph))
        if isinstance(example_of(node), Tensor)
    }
    found = {
        index: positions[id(example_of(end))]
        for index, end in enumerate(results(captured.graph))
        if isinstance(end, Node) and id(example_of(end)) in positions
        # One that has got a history has it among the outputs alone.
        if not example_of(end).requires_grad
    }
    numbers = [
        index
        for index, end in enumerate(results(captured.graph))
        if isinstance(end, Node) and isinstance(example_of(end), (torch.SymInt, torch.SymBool))
    ]
    if not found and not numbers:
        return step

    def run(*inputs: Any) -> list[Any]:
        outputs = list(step(*inputs))
        for index, position in found.items():
            outputs[index] = inputs[position]
        for index in numbers:
            if isinstance(outputs[index], Tensor):  # Dynamo's code reads the floats
                outputs[index] = outputs[index].item()
        return outputs

    return run
