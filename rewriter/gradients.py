"""Keep the gradients of a step for its backward pass, and hand them out.

What ``backward()`` hands out is the caller's to keep and to change. Gradients that nothing else
holds are handed out as they are; they are copied where the pass may run again, and where the
cotangent scales them. The one file that knows how PyTorch counts references to tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from rewriter.batched import is_batched, one_by_one
from rewriter.stateful import is_wrapped

_uses: Any = Tensor._use_count  # pyright: ignore[reportAttributeAccessIssue]
_storage_uses: Any = torch._C._storage_Use_Count
_may_run_again: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph  # pyright: ignore[reportAttributeAccessIssue]


def owned(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return gradients that nobody else holds: those that an input, an output, a constant of the
    graph or another gradient has a part of are copied, and those with one number in many places.

    Args:
        grads: What was just computed; nothing but this sequence holds those that are new.
    """
    found = _references(grads)
    if found.count(_ALONE) == len(found):
        return grads
    return [
        g.clone() if g is not None and references != _ALONE else g
        for g, references in zip(grads, found, strict=True)
    ]


def _references(grads: Sequence[Tensor | None]) -> list[int]:
    """Count for each gradient the references to the Python object, to the tensor behind it and to
    its memory: none of the three is ever below what a new tensor has. None counts as alone, an
    expanded tensor as held."""
    return [
        _ALONE
        if g is None
        else getrefcount(g) + _uses(g) + _storage_uses(g.untyped_storage()._cdata)
        if g.is_contiguous() or 0 not in g.stride()
        else 0
        for g in grads
    ]


_ALONE = 0
_ALONE = _references([torch.empty(1)])[0]


def hand_out(ctx: Any, cotangent: Tensor | None) -> Sequence[Tensor | None]:
    """Return ``ctx.gradients``, those of one scalar, times its cotangent.

    They are no saved tensors: hooks on those offload or recompute what a backward pass works on,
    and this one is done.

    Args:
        ctx: The context; its gradients are `owned`, and dropped unless the pass may run again.
        cotangent: Shape () or all ones; None for zero.

    Raises:
        RuntimeError: They have been handed out before.
    """
    grads = ctx.gradients
    if grads is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the gradients were handed out "
            "and freed. Specify retain_graph=True if you need to backward through the graph a "
            "second time."
        )
    is_last = not _may_run_again()
    if is_last:
        ctx.gradients = None
    if cotangent is None:
        return [None] * len(grads)
    if is_last and _is_one(cotangent):
        return grads
    return one_by_one(lambda c: _scaled(grads, c), [cotangent])


def _scaled(grads: Sequence[Tensor | None], cotangent: Tensor) -> list[Tensor | None]:
    """Multiply every gradient by the loss's cotangent, into new tensors."""
    factor = cotangent.reshape(())
    there = [g for g in grads if g is not None]
    scaled = iter(torch._foreach_mul(there, factor) if there else ())
    return [None if g is None else next(scaled) for g in grads]


def _is_one(cotangent: Tensor) -> bool:
    """Whether a cotangent is known to be 1 without waiting for a device or asking a mode."""
    return (
        cotangent.is_cpu
        and type(cotangent) is Tensor
        and not is_batched(cotangent)
        and not is_wrapped(cotangent)
        and torch._C._len_torch_dispatch_stack() == 0
        and cotangent.item() == 1
    )


def keep_residuals(ctx: Any, residuals: Sequence[Any], ends: Sequence[Tensor]) -> None:
    """Keep what the gradients of several outputs, or of one that is no scalar, are computed from.

    Args:
        ctx: The context.
        residuals: Tensors and numbers.
        ends: The outputs that have a gradient.
    """
    ctx.numbers = [(i, x) for i, x in enumerate(residuals) if not isinstance(x, Tensor)]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in residuals))
    ctx.like = [(end.shape, end.dtype, end.device) for end in ends]


def pulled_back(
    ctx: Any,
    cotangents: Sequence[Tensor | None],
    pull_back: Callable[[Sequence[Any], Sequence[Tensor]], Sequence[Any]],
) -> Sequence[Any]:
    """Return the gradients that belong to cotangents.

    Args:
        ctx: The context, with what `keep_residuals` has kept.
        cotangents: One for each of its ``ends``; None for zero.
        pull_back: Computes gradients from residuals and cotangents.
    """
    residuals = list(ctx.saved_tensors)
    for i, number in ctx.numbers:
        residuals[i] = number
    full = [
        torch.zeros(shape, dtype=dtype, device=device) if c is None else c
        for c, (shape, dtype, device) in zip(cotangents, ctx.like, strict=True)
    ]
    return one_by_one(lambda *c: pull_back(residuals, c), full)


def mark_constant(ctx: Any, outputs: Sequence[Any], differentiable: Sequence[int]) -> None:
    """Tell autograd which outputs have no gradient.

    Args:
        ctx: The context.
        outputs: What the step returns.
        differentiable: Positions of the outputs that have a gradient.
    """
    if len(outputs) > len(differentiable):
        others = (u for i, u in enumerate(outputs) if i not in differentiable)
        ctx.mark_non_differentiable(*(u for u in others if isinstance(u, Tensor)))


def own_tensors(outputs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Give the caller tensors that share no memory with the inputs' by accident of
    simplification."""
    seen = set(map(id, inputs))
    result = []
    for value in outputs:
        taken = isinstance(value, Tensor) and (id(value) in seen or value._is_view())
        seen.add(id(value))
        result.append(value.clone() if taken else value)
    return tuple(result)
