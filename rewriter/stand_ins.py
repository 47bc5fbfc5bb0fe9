"""Calls inside a `torch.func` transform or a dual level: plain tensors for Dynamo, the real ones
for the tower.

Dynamo guards on what it is given, and knows neither the wrappers of a transform nor tangents. It
gets plain tensors of the same shapes, outside of every transform; what it finds for them is then
called with what they stand for.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from rewriter.stateful import inside_transforms, is_wrapped, outside_transforms


@dataclass(frozen=True)
class StandIns:
    """Plain tensors and what they stand for.

    Attributes:
        real: What stands behind each plain tensor, by its identity.
        levels: The transforms that are closed for the time being.
    """

    real: dict[int, Tensor]
    levels: list[Any]

    def behind(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the real inputs, in the memory format that the stand-ins have."""
        real = self.real
        return [real[id(x)].contiguous() if id(x) in real else x for x in inputs]

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Open the transforms again, for a call on real tensors."""
        token = standing_in.set(None)
        try:
            with inside_transforms(self.levels):
                yield
        finally:
            standing_in.reset(token)


standing_in: contextvars.ContextVar[StandIns | None] = contextvars.ContextVar(
    "standing_in", default=None
)


@contextlib.contextmanager
def stood_in(module: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Close all transforms, and give arguments and the module's parameters and buffers stand-ins.

    Gives the arguments to call Dynamo with; the module has its own tensors back after the block.
    """
    plain: dict[int, Tensor] = {}
    real: dict[int, Tensor] = {}

    def stand_in(x: Any) -> Any:
        if not isinstance(x, Tensor) or not _is_more_than_plain(x):
            return x
        if id(x) not in plain:
            moves = x.is_floating_point() or x.is_complex()
            new = torch.empty(x.shape, dtype=x.dtype, device=x.device, requires_grad=moves)
            plain[id(x)] = nn.Parameter(new, moves) if isinstance(x, nn.Parameter) else new
            real[id(plain[id(x)])] = x
        return plain[id(x)]

    stores: list[dict[str, Any]] = [
        store for m in module.modules() for store in (m._parameters, m._buffers)
    ]
    own = [(store, name, x) for store in stores for name, x in store.items()]
    with outside_transforms() as levels:
        args, kwargs = pytree.tree_map(stand_in, (args, kwargs))
        replaced = [(store, name, x) for store, name, x in own if stand_in(x) is not x]
        token = standing_in.set(StandIns(real, levels))
        try:
            for store, name, x in replaced:
                store[name] = stand_in(x)
            yield args, kwargs
        finally:
            for store, name, x in replaced:
                store[name] = x
            standing_in.reset(token)


def _is_more_than_plain(x: Tensor) -> bool:
    return is_wrapped(x) or forward_ad.unpack_dual(x).tangent is not None
