"""Parameters and `Variable`s that a loss makes: leaves that nobody holds afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.tensor import TensorVariable
from torch.fx import GraphModule, Node

from passes.graph import results

_MADE = "parameter_made_inside"
"""In the meta of a captured graph's node: it is a parameter."""


def variable(data: Tensor, requires_grad: bool = False) -> Tensor:
    """Do what ``torch.autograd.Variable(data, requires_grad)`` does."""
    return data.detach().requires_grad_(requires_grad)


def calling_variable(original: Callable[..., Any]) -> Callable[..., Any]:
    """Trace `variable` in place of the class, whose constructor is no function."""

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.value is not torch.autograd.Variable:
            return original(self, tx, args, kwargs)
        return tx.inline_user_function_return(VariableTracker.build(tx, variable), args, kwargs)

    return call


def calling_parameter(
    original: Callable[..., Any], switch: Callable[..., Any]
) -> Callable[..., Any]:
    """Trace ``nn.Parameter(data)`` as a leaf that shares its memory.

    Args:
        original: What Dynamo does.
        switch: Traces ``x.requires_grad_(flag)``.
    """

    def call(cls: Any, tx: Any, data: Any = None, requires_grad: Any = True) -> Any:
        data = data.realize() if data is not None else None
        if not isinstance(data, TensorVariable):
            return original(tx, data, requires_grad)
        made: Any = data.call_method(tx, "detach", [], {})
        made.class_type = torch.nn.Parameter
        made.as_proxy().node.meta[_MADE] = True
        flag = requires_grad if isinstance(requires_grad, bool) else True
        if not isinstance(requires_grad, bool):
            flag = requires_grad.as_python_constant()
        return switch(made, tx, flag)

    return call


def outlives(captured: GraphModule) -> bool:
    """Whether a parameter that is made in the loss is returned, or kept by an object: it would be a
    tensor there."""
    return any(isinstance(x, Node) and x.meta.get(_MADE) for x in results(captured.graph))
