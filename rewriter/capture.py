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
import logging
import re
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo import exc as dynamo_errors
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.variables import builtin as dynamo_builtins
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.builder import wrap_fx_proxy
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.lists import BaseListVariable, TupleVariable
from torch._dynamo.variables.tensor import TensorVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch.fx import GraphModule, Node

from passes.graph import where
from rewriter.errors import CaptureError, NotRewritten, OptionError
from rewriter.stateful import WRITTEN_OUT, is_inside_transform, is_wrapped, write_outside
from rewriter.substitutes import SUBSTITUTES

_lock = threading.RLock()
torch._dynamo.allow_in_graph(write_outside)

DYNAMO_ERRORS = (dynamo_errors.TorchDynamoException,)


def set_requires_grad(x: Tensor, requires_grad: bool) -> Tensor:
    """Do what ``x.requires_grad_(requires_grad)`` does; one node of the captured graph."""
    return x.requires_grad_(requires_grad)


def _proxy_arguments(args: Any, kwargs: Any) -> tuple[tuple, dict]:
    return tuple(a.as_proxy() for a in args), {k: v.as_proxy() for k, v in kwargs.items()}


def _handle_autograd_grad(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
    """Put `torch.autograd.grad` into the graph as one node."""
    inputs = args[1] if len(args) > 1 else kwargs.get("inputs")
    keys = None
    if isinstance(inputs, ConstDictVariable):
        keys = list(inputs.items)
        flat = TupleVariable(list(inputs.items.values()))
        args = (args[0], flat, *args[2:]) if len(args) > 1 else args
        kwargs = kwargs if len(args) > 1 else {**kwargs, "inputs": flat}
    proxy = tx.output.create_proxy(
        "call_function", torch.autograd.grad, *_proxy_arguments(args, kwargs)
    )
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
    return self


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
        return original(self, tx, obj, name, value)

    return call


def _run_node(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let a transform's body write to tensors that the transform does not wrap."""

    def run(tracer: Any, node: Node, args: Any, kwargs: Any, nnmodule: Any) -> Any:
        name = str(node.target)
        writes = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
        if writes and is_inside_transform() and not any(is_wrapped(x) for x in args):
            node.op, node.target, node.args = "call_function", write_outside, (name, *node.args)
            write_outside(name, *args, **kwargs)
            return args[0]
        return original(tracer, node, args, kwargs, nnmodule)

    return run


def _setattr_of_dynamo() -> tuple[Any, str]:
    """Return where Dynamo handles `setattr`; it moved between torch 2.11 and 2.13."""
    owner = getattr(dynamo_builtins, "SetAttrBuiltinVariable", None)
    if owner is not None:
        return owner, "_call_setattr"
    return dynamo_builtins.BuiltinVariable, "call_setattr"


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def number_of(x: Tensor) -> Tensor:
    """Do what ``x.item()`` does for a float, without leaving the graph: a constant of shape () that
    promotes like a number."""
    return x.detach().to(torch.float64)


def keep_numbers(captured: GraphModule) -> None:
    """Turn ``x.item()`` of floats (also Dynamo's own, for a float argument that changed) into
    `number_of`.

    Raises:
        CaptureError: An integer is read from a tensor: sizes or branches depend on values.
    """
    for node in captured.graph.find_nodes(op="call_method", target="item"):
        if not example_of(node.args[0]).dtype.is_floating_point:
            raise CaptureError("an integer is read from a tensor", where(node))
        node.op, node.target = "call_function", number_of
    captured.recompile()


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


@contextlib.contextmanager
def _with_handlers(handlers: dict[Any, Any]) -> Iterator[None]:
    before = dict(handlers)
    handlers[torch.autograd.grad] = _handle_autograd_grad
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
def capturing(*, specialize_floats: bool = False) -> Iterator[None]:
    """Let Dynamo put nested derivatives into the graph, for the calls inside the ``with`` block.

    Args:
        specialize_floats: Build anew for each value of a float argument, where only a Python number
            will do.
    """
    handlers = TorchInGraphFunctionVariable._get_handlers()
    settings: dict[str, Any] = (
        {"trace_autograd_ops": True} if hasattr(dynamo_config, "trace_autograd_ops") else {}
    )
    with _lock, contextlib.ExitStack() as stack:
        settings["specialize_float"] = specialize_floats
        settings |= {"recompile_limit": 64, "reorderable_logging_functions": {print, warnings.warn}}
        stack.enter_context(dynamo_config.patch(**settings))
        stack.enter_context(_quiet())
        stack.enter_context(_replaced(TensorVariable, "method_requires_grad_", _requires_grad_))
        stack.enter_context(_replaced(dynamo_utils, "run_node", _run_node(dynamo_utils.run_node)))
        owner, name = _setattr_of_dynamo()
        stack.enter_context(_replaced(owner, name, _setattr_on_tensor(getattr(owner, name))))
        stack.enter_context(_with_handlers(handlers))
        yield


def compile_function(
    function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None
) -> Callable[..., Any]:
    """Return ``function`` behind Dynamo's guards, each new specialisation built by ``backend(graph
    module, inputs)``."""
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def as_capture_error(error: BaseException) -> CaptureError | None:
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
    if isinstance(error, DYNAMO_ERRORS):
        text = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = text[0] if text else type(error).__name__
        got = re.search(r"got \w+\([\"'](.*?)[\"']\)", " ".join(text))
        if got is not None:  # what an operator said on fake tensors
            reason += f": {got[1]}"
        return CaptureError(reason, _user_line(error, text))
    return None


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


def source_name(placeholder: Node) -> str:
    """Return where a captured graph's input comes from, as an expression over the function's locals
    and globals."""
    argument = placeholder.meta.get("grapharg")
    name: Any = getattr(getattr(argument, "source", None), "name", None)
    return str(name() if callable(name) else name or placeholder.name)


def is_transformed() -> bool:
    """Whether a transform, another compilation or a dispatch mode is running around this call."""
    return (
        torch.compiler.is_compiling()
        or is_inside_transform()
        or torch._C._len_torch_dispatch_stack() > 0
    )
