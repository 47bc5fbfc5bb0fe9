"""Compare a rewritten step with the loss as written in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from passes.graph import placeholders
from passes.tracing import without_fused_kernels
from rewriter.as_written import gradients_of, run_as_written
from rewriter.capture import source_name
from rewriter.dump import dump_failed
from rewriter.errors import CheckFailed
from rewriter.rewrite import Rewritten


@dataclass(frozen=True)
class _Run:
    values: list[Any]
    grads: list[Any]
    state: list[Any]


def check_step(
    rewritten: Rewritten, run: Callable[..., Sequence[Any]], inputs: Sequence[Any]
) -> None:
    """Run the step both ways on copies of ``inputs`` and compare value, gradients and state.

    The reference is the loss as written on float64 copies. In float64 the step may differ by 1e-9
    of the reference's size; in a narrower type by twice what the loss as written in that type
    differs, and by a few units in the last place.

    Raises:
        CheckFailed: Names the tensor that differs most, both numbers, the first stage whose graph
            gives such a difference, and a folder with all stages.
    """
    generator = torch.get_rng_state()

    def again(function: Callable[[], _Run]) -> _Run:
        torch.set_rng_state(generator)
        return function()

    try:
        ours = again(lambda: _rewritten_run(rewritten, run, inputs))
        plain = again(lambda: _plain_run(rewritten, inputs))
        wide = again(lambda: _plain_run(rewritten, [_widened(x) for x in inputs]))
        names = _names(rewritten)
        worst = _worst(names, ours, plain, wide)
        if worst is None:
            return
        stage = "compiled code"
        for number in range(len(rewritten.stages)):
            found = again(lambda: _stage_run(rewritten, number, inputs, ours))  # noqa: B023
            if _worst(names, found, plain, wide) is not None:
                stage = rewritten.stages[number].name
                break
    finally:
        torch.set_rng_state(generator)
    raise CheckFailed(
        f"check=True: {worst}. The first stage that departs is {stage!r}; all stages are in "
        f"{dump_failed(rewritten, inputs)}. Please report this; enabled=False avoids it."
    )


def check_layer(
    captured: GraphModule,
    run: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    wanted: Sequence[int],
    updated: Sequence[int],
) -> None:
    """Run a module's call both ways on copies of ``inputs`` and compare values, state, a pullback
    and the gradient of a function of that pullback, as `check_step` does.

    Raises:
        CheckFailed: Names the tensor that differs most and both numbers.
    """
    sources = [source_name(node) for node in placeholders(captured.graph)]
    generator = torch.get_rng_state()

    def twice(function: Callable[..., Sequence[Any]], given: Sequence[Any]) -> _Run:
        torch.set_rng_state(generator)
        own = [x.detach().clone() if isinstance(x, Tensor) else x for x in given]
        with torch.enable_grad(), without_fused_kernels():
            for i in wanted:
                own[i].requires_grad_()
            values = list(function(*own))
            leaves = [own[i] for i in wanted]
            first = _pulled_back(values, leaves)
            return _Run(values, [*first, *_pulled_back(first, leaves)], [own[i] for i in updated])

    try:
        ours, plain = twice(run, inputs), twice(captured, inputs)
        wide = twice(captured, [_widened(x) for x in inputs])
    finally:
        torch.set_rng_state(generator)
    names = [f"output {i}" for i in range(len(ours.values))]
    names += [f"the gradient of {sources[i]}" for i in wanted]
    names += [f"the gradient of the gradient, of {sources[i]}" for i in wanted]
    names += [f"the new value of {sources[i]}" for i in updated]
    worst = _worst(names, ours, plain, wide)
    if worst is not None:
        raise CheckFailed(f"check=True: {worst}. Please report this; enabled=False avoids it.")


def _pulled_back(values: Sequence[Any], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients along cotangents that are no multiples of one another."""
    ends = [u for u in values if isinstance(u, Tensor) and u.requires_grad]
    if not ends or not leaves:
        return [None] * len(leaves)
    seeds = [torch.arange(1, u.numel() + 1, device=u.device).sin().view_as(u).to(u) for u in ends]
    return list(torch.autograd.grad(ends, leaves, seeds, create_graph=True, allow_unused=True))


def _worst(names: Sequence[str], ours: _Run, plain: _Run, wide: _Run) -> _Difference | None:
    """Return the largest difference that is not allowed."""
    worst = max(_differences(names, ours, plain, wide), key=lambda d: d.excess, default=None)
    return worst if worst is not None and worst.excess > 1 else None


@dataclass(frozen=True)
class _Difference:
    name: str
    ours: float
    reference: float
    error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.name} differs from the loss as written: {self.ours!r} here, "
            f"{self.reference!r} as written in float64 (error {self.error:.3g}, allowed "
            f"{self.allowed:.3g})"
        )

    @property
    def excess(self) -> float:
        return self.error / self.allowed if self.error == self.error else float("inf")


def _copies(rewritten: Rewritten, inputs: Sequence[Any]) -> list[Any]:
    own = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    for position in rewritten.roles.wanted:
        own[position].requires_grad_()
    return own


def _rewritten_run(
    rewritten: Rewritten, run: Callable[..., Sequence[Any]], inputs: Sequence[Any]
) -> _Run:
    own = _copies(rewritten, inputs)
    values = list(run(*own))
    grads = gradients_of(values, [own[i] for i in rewritten.roles.wanted])
    return _Run(values, grads, [own[i] for i in rewritten.roles.updated])


def _stage_run(rewritten: Rewritten, number: int, inputs: Sequence[Any], like: _Run) -> _Run:
    """Run the graph after a stage: under autograd, or as it is if gradients are among its
    results."""
    stage, roles = rewritten.stages[number], rewritten.roles
    own = _copies(rewritten, inputs)
    if stage.name == "joint":
        cotangents = []
        if rewritten.seeded:
            cotangents = [torch.ones_like(like.values[i]) for i in roles.differentiable]
        out = list(Interpreter(stage.module).run(*own, *cotangents))
        early = roles.n_outputs + len(roles.updated)
        return _Run(out[: roles.n_outputs], out[early:], out[roles.n_outputs : early])
    out = list(Interpreter(stage.runnable).run(*own))
    values = out[: roles.n_outputs]
    ends = [values[i] for i in roles.differentiable]
    grads = gradients_of(ends, [own[i] for i in roles.wanted])
    return _Run(values, grads, out[roles.n_outputs :])


def _plain_run(rewritten: Rewritten, inputs: Sequence[Any]) -> _Run:
    start = [i for i in rewritten.roles.wanted if i not in rewritten.flat.promoted]
    values, own = run_as_written(rewritten.captured, inputs, start)
    grads = gradients_of(values, [own[i] for i in rewritten.roles.wanted])
    return _Run(values, grads, [own[i] for i in rewritten.roles.updated])


def _widened(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.dtype.is_complex:
        return x.detach().to(torch.complex128)
    return x.detach().double() if x.dtype.is_floating_point else x


def _names(rewritten: Rewritten) -> list[str]:
    roles, inputs = rewritten.roles, rewritten.names
    names = [f"output {i}" for i in range(roles.n_outputs)]
    names += [f"the gradient of {inputs[i]}" for i in roles.wanted]
    return [*names, *(f"the new value of {inputs[i]}" for i in roles.updated)]


def _differences(names: Sequence[str], ours: _Run, plain: _Run, wide: _Run) -> list[_Difference]:
    rows = zip(
        names,
        [*ours.values, *ours.grads, *ours.state],
        [*plain.values, *plain.grads, *plain.state],
        [*wide.values, *wide.grads, *wide.state],
        strict=True,
    )
    sizes = [
        x.detach().abs().max().item() for x in wide.grads if isinstance(x, Tensor) and x.numel()
    ]
    # A gradient that is zero but for rounding has no size of its own: it is a sum of terms of the
    # others' size.
    floor = max(sizes, default=0.0)
    return [
        difference
        for name, mine, narrow, reference in rows
        if (difference := _difference(name, mine, narrow, reference, floor)) is not None
    ]


def _difference(
    name: str, mine: Any, narrow: Any, reference: Any, floor: float
) -> _Difference | None:
    if (mine is None) != (reference is None):
        return _Difference(name, float(mine is not None), float(reference is not None), 1.0, 1e-300)
    if not isinstance(mine, Tensor) or mine.numel() == 0:
        return None
    exact = reference.detach()
    error = (mine.detach().to(exact.dtype) - exact).abs().flatten()
    size = max(float(exact.abs().max()), floor if name.startswith("the gradient") else 0.0)
    if mine.dtype in (torch.float64, torch.complex128) or not mine.dtype.is_floating_point:
        allowed = 1e-9 * size + 1e-14
    else:
        own = float((narrow.detach().to(exact.dtype) - exact).abs().max())
        allowed = 2 * own + 16 * torch.finfo(mine.dtype).eps * size
    at = int(error.argmax())
    mine_flat, exact_flat = mine.detach().flatten(), exact.flatten()
    return _Difference(name, mine_flat[at].item(), exact_flat[at].item(), float(error[at]), allowed)
