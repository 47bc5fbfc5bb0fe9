"""Batches of cotangents that only the dispatcher sees, as `torch.autograd.grad` has them with
`is_grads_batched=True` and `torch.autograd.functional` with `vectorize=True`.

Compiled code reads memory, which such a tensor does not have, and a node of autograd that is put on
one is lost: the dispatcher records derivatives of the memory below. So what is compiled gets one
cotangent of the batch after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_C: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
_MAX_LEVELS = 64  # the dispatcher's own limit


def one_by_one(function: Callable[..., Sequence[Any]], cotangents: Sequence[Tensor]) -> list[Any]:
    """Call ``function(*cotangents)``; if they are batched, for each of the batch.

    Args:
        function: Returns tensors or None, the same ones at each call.
        cotangents: Its arguments; those that are not batched are the same at each call.

    Returns:
        What it returned, batched as the cotangents are.
    """
    if not any(map(is_batched, cotangents)):
        return list(function(*cotangents))
    level = next(i for i in range(1, _MAX_LEVELS) if any(_size(c, i) for c in cotangents))
    size = next(size for c in cotangents if (size := _size(c, level)))
    whole = [torch._remove_batch_dim(c, level, size, 0) for c in cotangents]
    rows = zip(*(c.unbind() for c in whole), strict=True)
    with _outside():
        found = [one_by_one(function, row) for row in rows]
    return [
        None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level)
        for column in zip(*found, strict=True)
    ]


def is_batched(x: Tensor) -> bool:
    """Whether a tensor is a batch that only the dispatcher sees."""
    return _C.is_legacy_batchedtensor(x)


def _size(x: Tensor, level: int) -> int:
    """Return the size of a tensor's batch at a level, 0 if it is not batched there."""
    if not is_batched(x):
        return 0
    return torch._remove_batch_dim(x, level, 0, 0).shape[0]


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Leave one level of batches inside the ``with`` block: the compiler draws random numbers,
    which is forbidden at such a level. A thread of the engine may have none to leave."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level:
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        if level:
            torch._C._vmapmode_increment_nesting()
