"""Compare a rewritten step with the loss as written in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from passes.graph import placeholders
from passes.tracing import without_fused_kernels
from rewriter.as_written import gradients_of
from rewriter.capture import source_name
from rewriter.comparing import Run, from_exact, worst
from rewriter.dump import dump_failed
from rewriter.errors import CheckFailed
from rewriter.generators import Generators, generators_restored
from rewriter.judge import widened
from rewriter.rewrite import Rewritten
from rewriter.verifying import copies, names_of, plain_run, pytorch_is_wrong, rewritten_run


def check_step(
    rewritten: Rewritten,
    run: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    *,
    value_only: bool = False,
) -> None:
    """Run the step both ways on copies of ``inputs`` and compare value, gradients and state.

    The reference is the loss as written on float64 copies. In float64 the step may differ by 1e-9
    of the reference's size; in a narrower type by twice what the loss as written in that type
    differs, and by a few units in the last place. Where PyTorch's own derivatives are wrong, and
    finite differences agree with the step, it passes.

    Raises:
        CheckFailed: Names the tensor that differs most, both numbers, the first stage whose graph
            gives such a difference, and a folder with all stages.
    """
    with generators_restored() as start:

        def again(function: Callable[[], Run]) -> Run:
            start.set()
            return function()

        def as_written(given: Sequence[Any]) -> Run:
            return again(lambda: plain_run(rewritten, given, value_only=value_only))

        ours = again(lambda: rewritten_run(rewritten, run, inputs, value_only=value_only))
        plain, wide = as_written(inputs), as_written([widened(x) for x in inputs])
        names = names_of(rewritten, value_only=value_only)
        found = worst(from_exact(names, ours, plain, wide))
        if found is None or pytorch_is_wrong(rewritten, inputs, ours, plain, start):
            return
        stage = "compiled code"
        for number in range(0 if value_only else len(rewritten.stages)):
            by_stage = again(lambda: _stage_run(rewritten, number, inputs, ours))  # noqa: B023
            if worst(from_exact(names, by_stage, plain, wide)) is not None:
                stage = rewritten.stages[number].name
                break
    raise CheckFailed(
        f"check=True: {found}. The first stage that departs is {stage!r}; all stages are in "
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

    def twice(
        start: Generators, function: Callable[..., Sequence[Any]], given: Sequence[Any]
    ) -> Run:
        start.set()
        own = [x.detach().clone() if isinstance(x, Tensor) else x for x in given]
        with torch.enable_grad(), without_fused_kernels():
            for i in wanted:
                own[i].requires_grad_()
            values = list(function(*own))
            leaves = [own[i] for i in wanted]
            first = _pulled_back(values, leaves)
            return Run(values, [*first, *_pulled_back(first, leaves)], [own[i] for i in updated])

    with generators_restored() as start:
        ours, plain = twice(start, run, inputs), twice(start, captured, inputs)
        wide = twice(start, captured, [widened(x) for x in inputs])
    names = [f"output {i}" for i in range(len(ours.values))]
    names += [f"the gradient of {sources[i]}" for i in wanted]
    names += [f"the gradient of the gradient, of {sources[i]}" for i in wanted]
    names += [f"the new value of {sources[i]}" for i in updated]
    found = worst(from_exact(names, ours, plain, wide))
    if found is not None:
        raise CheckFailed(f"check=True: {found}. Please report this; enabled=False avoids it.")


def _pulled_back(values: Sequence[Any], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Return gradients along cotangents that are no multiples of one another."""
    ends = [u for u in values if isinstance(u, Tensor) and u.requires_grad]
    if not ends or not leaves:
        return [None] * len(leaves)
    seeds = [torch.arange(1, u.numel() + 1, device=u.device).sin().view_as(u).to(u) for u in ends]
    return list(torch.autograd.grad(ends, leaves, seeds, create_graph=True, allow_unused=True))


def _stage_run(rewritten: Rewritten, number: int, inputs: Sequence[Any], like: Run) -> Run:
    """Run the graph after a stage: under autograd, or as it is if gradients are among its
    results."""
    stage, roles = rewritten.stages[number], rewritten.roles
    own = copies(rewritten, inputs)
    if stage.name == "joint":
        cotangents = []
        if rewritten.seeded:
            cotangents = [torch.ones_like(like.values[i]) for i in roles.differentiable]
        out = list(Interpreter(stage.module).run(*own, *cotangents))
        early = roles.n_outputs + len(roles.updated)
        return Run(out[: roles.n_outputs], out[early:], out[roles.n_outputs : early])
    out = list(Interpreter(stage.runnable).run(*own))
    values = out[: roles.n_outputs]
    ends = [values[i] for i in roles.differentiable]
    grads = gradients_of(ends, [own[i] for i in roles.wanted])
    return Run(values, grads, out[roles.n_outputs :])
