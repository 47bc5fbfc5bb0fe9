"""What is asked of a call of PyTorch that a loss makes, and of the place where it makes it."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from passes.graph import is_users
from rewriter import stateful
from rewriter.sizes import SYMBOLIC

_C: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

# What reads values, and has no tensor for a result.
READERS = {
    "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__",
    "__complex__", "is_nonzero", "equal", "allclose", "__contains__", "__dlpack__", "__format__",
    "__repr__", "__reduce_ex__", "__reduce__", "data_ptr", "storage", "untyped_storage",
}  # fmt: skip

REFUSED = {
    "backward": "backward() inside the loss",
    "register_hook": "a hook on a tensor",
    "register_post_accumulate_grad_hook": "a hook on a tensor",
    "retain_grad": "retain_grad() inside the loss",
    "set_": "Tensor.set_",
    "resize_": "Tensor.resize_",
}

FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.frombuffer, torch.from_numpy}

CONSTANTS: tuple[type, ...] = (
    int, float, bool, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format,
    type(None), type(Ellipsis),
)  # fmt: skip


METHODS: dict[Any, str] = {
    function: name
    for name in dir(Tensor)
    if callable(function := getattr(Tensor, name)) and not isinstance(function, type)
}


def name_of(func: Any) -> str:
    """Return the name of what was called; ``__get__ shape`` for a property."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        owner = func.__self__
        return f"{name} {getattr(owner, '__name__', '') or owner.fget.__name__}"
    return name


def is_in_place(name: str) -> bool:
    """Whether a method of this name writes to its tensor."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among arguments or results, in slices too."""
    found: list[Tensor] = []

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    map_aggregate(values, take)
    return found


def mapped(values: Any, function: Callable[[Any], Any]) -> Any:
    """Replace the tensors and symbolic numbers among arguments, and numbers of NumPy by
    Python's."""

    def swap(leaf: Any) -> Any:
        if isinstance(leaf, (Tensor, *SYMBOLIC)):
            return function(leaf)
        return leaf.item() if isinstance(leaf, numpy.generic) else leaf

    return map_aggregate(values, swap)


def any_wrapped(values: Any) -> bool:
    """Whether a transform has wrapped one of the tensors among arguments."""
    return any(stateful.is_wrapped(x) for x in tensors_in(values))


def storage_of(x: Tensor) -> int:
    """Return what memory a tensor lies in, whatever transforms are open around it."""
    while stateful.is_wrapped(x):
        x = _C.get_unwrapped(x)
    return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)


def is_same_plain(out: Any, shadow: Any) -> bool:
    """Whether a result that is no tensor is the same for a tensor without values."""
    return type(out) is type(shadow) and bool(out == shadow)


def users_frames() -> list[FrameType]:
    """Return the frames of the user's code, innermost last."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            found.append(frame)
        frame = frame.f_back
    return found[::-1]


def line_of(frames: list[FrameType]) -> str:
    """Return ``file:line: code`` of the innermost of these frames."""
    if not frames:
        return "?"
    path, number = frames[-1].f_code.co_filename, frames[-1].f_lineno
    return f"{path}:{number}: {linecache.getline(path, number).strip()}"


def stack_trace() -> str:
    """Return where the user's code is, as Dynamo notes it with a node."""
    lines = []
    for frame in users_frames()[-8:]:
        path, number = frame.f_code.co_filename, frame.f_lineno
        lines.append(f'  File "{path}", line {number}, in {frame.f_code.co_name}')
        lines.append(f"    {linecache.getline(path, number).strip()}")
    return "\n".join(lines)
