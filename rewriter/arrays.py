"""Arrays of NumPy that a loss is given, or makes, and turns into tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import tensortype_to_dtype
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.tensor import NumpyNdarrayVariable


def converting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Trace ``torch.Tensor(array)``, ``torch.FloatTensor(array)``… as copies in the constructor's
    type, and ``torch.tensor(array)`` as a copy: Dynamo's tensor in the array's place would keep its
    own type, and be warned of."""

    def call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        function = self.value
        is_copied = function is torch.tensor or _is_constructor(function)
        if not is_copied or len(args) != 1 or not kwargs.keys() <= {"dtype"}:
            return original(self, tx, args, kwargs)
        if not isinstance(args[0].realize(), NumpyNdarrayVariable):
            return original(self, tx, args, kwargs)
        if function is Tensor:
            kwargs = {"dtype": ConstantVariable.create(torch.get_default_dtype())}
        elif function is not torch.tensor:
            kwargs = {"dtype": ConstantVariable.create(tensortype_to_dtype[function][0])}
        kind = kwargs.get("dtype")
        shared = VariableTracker.build(tx, torch.as_tensor).call_function(tx, args, {})
        if kind is None:
            return shared.call_method(tx, "clone", [], {})
        return shared.call_method(tx, "to", [kind], {"copy": ConstantVariable.create(True)})

    return call


def _is_constructor(function: Any) -> bool:
    return function is Tensor or any(function is kind for kind in tensortype_to_dtype)


def told_apart(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let Dynamo guard what is another tensor each time it is asked for: an array as a tensor,
    ``x.T`` of an argument. It would compare one with the next, element by element."""

    def call(self: Any, *args: Any) -> Any:
        held = self.obj_weakref
        if isinstance(held, weakref.ref) and isinstance(held(), Tensor):
            self.obj_weakref = None
        return original(self, *args)

    return call
