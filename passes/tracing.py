"""Trace a function of fake tensors into a functional ATen graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.nn.attention import SDPBackend, sdpa_kernel

from passes.decompositions import decompositions
from passes.graph import value_of


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    """Return the mode the fake tensors among ``values`` belong to; a new one if there are none."""
    for value in values:
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def trace(
    function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode, *, functional: bool
) -> GraphModule:
    """Record what ``function(*inputs)`` computes, as ATen operators without in-place writes.

    Args:
        function: Takes and returns tensors and symbolic sizes.
        inputs: Fake tensors and symbolic sizes, the graph's inputs; they are not changed.
        mode: The mode of the fake tensors.
        functional: Whether ``function`` itself may write in place (then writes to inputs become ``copy_`` at the graph's end).
    """
    traced = torch.func.functionalize(function, remove="mutations") if functional else function
    with mode, enable_python_dispatcher(), preserve_node_meta(), sdpa_kernel(SDPBackend.MATH):
        module = make_fx(traced, decomposition_table=decompositions())(*inputs)
    if not functional and any(_writes(node.target) for node in module.graph.nodes):
        detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        plain = module.forward

        def again(*values: Any) -> Any:
            with torch.no_grad():
                return plain(*values)

        return trace(again, detached, mode, functional=True)
    return module


def _writes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def example_inputs(module: GraphModule) -> list[Any]:
    """Return the example values of a graph's inputs, as constants of autograd."""
    values = [value_of(node) for node in module.graph.find_nodes(op="placeholder")]
    return [v.detach() if isinstance(v, Tensor) else v for v in values]
