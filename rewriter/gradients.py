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

from rewriter.batched import one_by_one

_uses: Any = Tensor._use_count  # pyright: ignore[reportAttributeAccessIssue]
_storage_uses: Any = torch._C._storage_Use_Count
is_legacy_batch: Any = torch._C._functorch.is_legacy_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
_is_wrapped_tensor: Any = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_may_run_again: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph  # pyright: ignore[reportAttributeAccessIssue]


def owned(grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Return gradients that nobody else holds: those that an input, an output, a constant of the
    graph or another gradient has a part of are copied, and those with one number in many places.

    Args:
        grads: What was just computed; nothing but this sequence holds those that are new.
    """
    return copied(grads, held(grads))


def held(results: Sequence[Any], start: int = 0) -> list[int]:
    """Return the positions, from ``start`` on, of the gradients that `owned` copies.

    Args:
        results: What was just computed; nothing but this sequence holds those that are new.
        start: Where the gradients begin.
    """
    alone = _ALONE
    return [
        i
        for i in range(start, len(results))
        if results[i] is not None and _references(results, i) != alone
    ]


def copied(values: Sequence[Any], positions: Sequence[int]) -> Sequence[Any]:
    """Return values, those at these positions as copies."""
    if not positions:
        return values
    return [x.clone() if i in positions else x for i, x in enumerate(values)]


def _references(results: Sequence[Any], position: int) -> int:
    """Count the references to the Python object, to the tensor behind it and to its memory: none of
    the three is ever below what a new tensor has. An expanded tensor counts as held."""
    g = results[position]
    if not g.is_contiguous() and 0 in g.stride():
        return 0
    return getrefcount(g) + _uses(g) + _storage_uses(g.untyped_storage()._cdata)


_ALONE = _references([torch.empty(1)], 0)


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
    if not _may_run_again():
        ctx.gradients = None
        if cotangent is not None and _is_one(cotangent):
            return grads
    if cotangent is None:
        return [None] * len(grads)
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
        and not is_legacy_batch(cotangent)
        and not _is_wrapped_tensor(cotangent)
        and _modes() == 0
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
    others = (u for i, u in enumerate(outputs) if i not in differentiable)
    ctx.mark_non_differentiable(*(u for u in others if isinstance(u, Tensor)))


def _run_backward(function: Any, ctx: Any, cotangents: Sequence[Any]) -> Any:
    """Run a backward of ours as it is where compiled autograd would have Dynamo trace it."""
    return function.pulled(ctx, *cotangents)


uncompiled: Any = torch._dynamo.disable(_run_backward)


def own_tensors(outputs: Sequence[Any], inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Give the caller tensors that share no memory with the inputs' by accident of
    simplification."""
    return tuple(copied(outputs, shared(outputs, inputs)))


def shared(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[int]:
    """Return the positions of the outputs that `own_tensors` copies."""
    seen = set(map(id, inputs))
    found: list[int] = []
    for i, value in enumerate(outputs):
        if isinstance(value, Tensor) and (id(value) in seen or value._is_view()):
            found.append(i)
        seen.add(id(value))
    return found


class Ownership:
    """Make what one code returns the caller's own.

    Code for fixed sizes shares memory among its results, and with its inputs, in the same way each
    time it runs: what is to be copied is found at its first run.

    Args:
        n_outputs: How many results are outputs.
        start: Where gradients begin; None where residuals are in their place.
    """

    def __init__(self, n_outputs: int, start: int | None) -> None:
        self._n_outputs, self._start = n_outputs, start
        self._copied: list[int] | None = None

    def taken(
        self, results: Sequence[Any], inputs: Sequence[Any], *, is_settled: bool
    ) -> Sequence[Any]:
        """Return the results, those that somebody else holds as copies.

        Args:
            results: What the code has just returned; nothing else holds those that are new.
            inputs: What it got.
            is_settled: Whether the same code runs from now on, at the same sizes.
        """
        positions = self._copied
        if positions is None or not is_settled:
            positions = shared(results[: self._n_outputs], inputs)
            if self._start is not None:
                positions += held(results, self._start)
            if is_settled:
                self._copied = positions
        return copied(results, positions) if positions else results
