"""A loss called several times with other data: all that each call leaves behind, beside the loss as
written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import OptimizedLoss, optimize_nested
from tests.oracle import relative_error


def left_behind(loss: Callable[..., Any], modules: Sequence[nn.Module], args: Any) -> dict:
    """Call the loss and ``backward()``; return by name its value, gradients, buffers, flags, the
    identities of parameters and the state of the generator.

    Arguments are given to each of the two forms as they are but for a copy of the tensors.
    """
    tensors = [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in args
    ]
    value = loss(*modules, *tensors)
    left: dict[str, Any] = {"value requires grad": value.requires_grad}
    if value.requires_grad:
        value.backward()
    left["value"] = value.detach()
    for i, module in enumerate(modules):
        left[f"{i} is in training"] = [m.training for m in module.modules()]
        left[f"{i} holds"] = [id(p) for p in module.parameters()]
        for name, p in module.named_parameters():
            left |= {f"{i}.{name}": p.detach().clone(), f"{i}.{name} flag": p.requires_grad}
            left[f"{i}.{name} gradient"] = None if p.grad is None else p.grad.detach().clone()
        left |= {f"{i}.{name}": b.clone() for name, b in module.named_buffers()}
    for i, x in enumerate(tensors):
        if isinstance(x, Tensor):
            left |= {f"argument {i}": x.detach(), f"argument {i} flag": x.requires_grad}
            left[f"argument {i} gradient"] = x.grad if x.is_leaf else None
    left["generator"] = torch.get_rng_state()
    return left


def assert_alike(mine: dict, reference: dict, tolerance: float = 1e-9) -> None:
    """Compare what two calls left behind."""
    assert mine.keys() == reference.keys()
    sizes = [x.abs().max().item() for name, x in reference.items() if _is_gradient(name, x)]
    floor = 1e-5 * max(sizes, default=0.0)
    for name, expected in reference.items():
        if isinstance(expected, Tensor) or isinstance(mine[name], Tensor):
            error = relative_error(mine[name], expected, floor)
            assert error <= tolerance, f"{name}: {error:.3g}, {mine[name]}, {expected}"
        elif not name.endswith(" holds"):
            assert mine[name] == expected, f"{name}: {mine[name]}, {expected}"


def _is_gradient(name: str, x: Any) -> bool:
    return name.endswith(" gradient") and isinstance(x, Tensor) and x.numel() > 0


def check_calls(
    loss: Callable[..., Any], modules: Sequence[nn.Module], calls: Sequence[Any], **options: Any
) -> OptimizedLoss:
    """Compare a loss with itself as written over calls on the same modules, and return the
    decorated loss.

    The loss must have been captured whole: one that falls back warns, and warnings are errors here.

    Args:
        loss: Called as ``loss(*modules, *arguments)``.
        modules: Their gradients accumulate from call to call.
        calls: The arguments of each call.
        options: Of `optimize_nested`.
    """
    decorated = optimize_nested(loss, **({"backend": "eager"} | options))
    forms = (loss, copy.deepcopy(list(modules))), (decorated, copy.deepcopy(list(modules)))
    held = [[id(p) for m in own for p in m.parameters()] for _, own in forms]
    for number, args in enumerate(calls):
        left = []
        for form, own in forms:
            torch.manual_seed(number)
            left.append(left_behind(form, own, args))
        assert_alike(left[1], left[0])
    assert held == [[id(p) for m in own for p in m.parameters()] for _, own in forms]
    assert decorated.steps, "nothing was captured"
    return decorated
