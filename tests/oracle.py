"""The reference: the loss as written, run eagerly, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rewriter import OptimizedLoss, optimize_nested

SEED = 11


@dataclass(frozen=True)
class Outcome:
    """What one step leaves behind."""

    value: Any
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    generator: Tensor


def outcome(
    loss: Callable[..., Any], modules: list[nn.Module], args: tuple, kwargs: dict
) -> Outcome:
    """Run ``loss(*modules, *args)`` and ``.backward()`` on copies; return value, gradients, buffers
    and the generator."""
    return step(loss, copy.deepcopy(modules), args, kwargs)


def step(loss: Callable[..., Any], modules: list[nn.Module], args: tuple, kwargs: dict) -> Outcome:
    """Do what `outcome` does on the modules themselves, and clear their gradients before: a copy of
    a towered module would be captured anew."""
    for module in modules:
        module.zero_grad()
    tensors = [_copy(x) for x in args]
    torch.manual_seed(SEED)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative in eager
        value = loss(*modules, *tensors, **kwargs)
        if isinstance(value, Tensor) and value.requires_grad:
            value.backward()
    named = [(f"{i}.{n}", p) for i, m in enumerate(modules) for n, p in m.named_parameters()]
    grads = {name: p.grad for name, p in named}
    grads |= {
        f"argument {i}": x.grad
        for i, x in enumerate(tensors)
        if isinstance(x, Tensor) and x.is_leaf
    }
    buffers = {f"{i}.{name}": b for i, m in enumerate(modules) for name, b in m.named_buffers()}
    return Outcome(value.detach(), grads, buffers, torch.get_rng_state())


def _copy(x: Any) -> Any:
    return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def relative_error(mine: Tensor | None, reference: Tensor | None, floor: float = 0.0) -> float:
    """Return the largest difference over the largest reference entry; infinite where only one of
    the two exists.

    ``floor`` bounds that entry from below: a gradient that is zero but for rounding has no relative
    error of its own.
    """
    if mine is None or reference is None:
        return 0.0 if mine is reference else float("inf")
    if mine.numel() == 0:
        return 0.0
    if not torch.isfinite(reference).all():
        same = torch.equal(mine.isnan(), reference.isnan()) and torch.equal(
            mine.isinf(), reference.isinf()
        )
        return 0.0 if same else float("inf")
    wide = torch.complex128 if reference.is_complex() else torch.float64
    difference = (mine.to(wide) - reference.to(wide)).abs().max().item()
    size = max(reference.to(wide).abs().max().item(), floor)
    if difference < 1e-15:
        return 0.0
    return difference / size if size else float("inf")


def assert_same(mine: Outcome, reference: Outcome, tolerance: float = 1e-9) -> None:
    """Compare value, every gradient, every buffer and the generator."""
    assert relative_error(mine.value, reference.value) <= tolerance, (mine.value, reference.value)
    sizes = [g.abs().max().item() for g in reference.grads.values() if g is not None and g.numel()]
    floor = 1e-5 * max((size for size in sizes if size < float("inf")), default=0.0)
    for name, grad in reference.grads.items():
        error = relative_error(mine.grads[name], grad, floor)
        assert error <= tolerance, f"gradient of {name}: {error:.3g}, {mine.grads[name]}, {grad}"
    for name, buffer in reference.buffers.items():
        error = relative_error(mine.buffers[name], buffer)
        assert error <= tolerance, f"buffer {name}: {error:.3g}"
    assert torch.equal(mine.generator, reference.generator), "the generator ends elsewhere"


def check(
    loss: Callable[..., Any],
    modules: list[nn.Module],
    *args: Any,
    kwargs: dict[str, Any] | None = None,
    reference: list[nn.Module] | None = None,
    **options: Any,
) -> OptimizedLoss:
    """Compare a loss with itself as written, twice in a row, and return the decorated loss.

    ``reference`` stands in for the modules where PyTorch's own derivative is wrong. The loss must
    have been captured: one that falls back warns, and warnings are errors here.
    """
    decorated = optimize_nested(loss, **({"backend": "eager", "capture": "dynamo"} | options))
    expected = outcome(loss, reference or modules, args, kwargs or {})
    for _ in range(2):
        assert_same(outcome(decorated, modules, args, kwargs or {}), expected)
    assert decorated.steps, "nothing was captured"
    return decorated


def flops_per_forward(
    loss: OptimizedLoss, net: nn.Module, *args: Any, forward: Any = None
) -> float:
    """Return the rewritten step's FLOPs in forward passes of ``net``."""
    from passes.price import FlopCounter

    with FlopCounter() as counter, torch.no_grad():
        net(args[0] if forward is None else forward)
    return loss.explain(net, *args).flops / counter.flops
