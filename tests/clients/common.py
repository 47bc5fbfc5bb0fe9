"""One network in the hands of one library, as written and as a tower."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.layer import OptimizedForward
from tests.oracle import relative_error

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")


def example(library: str, name: str) -> ModuleType:
    """Import one of the examples, or skip the tests of a file if its library is absent."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: make clients", allow_module_level=True)
    if EXAMPLES not in sys.path:
        sys.path.insert(0, EXAMPLES)
    return importlib.import_module(name)


def towered(net: nn.Module) -> nn.Module:
    return optimize_nested(net, backend="eager")


def as_written(net: nn.Module) -> nn.Module:
    return net


def check(make: Callable[..., Any], **sizes: Any) -> Any:
    """Train a client as written and with the line, in float64; compare every gradient of the first
    step and the losses of those that follow. Return the client with the line."""
    mine, reference = (make(line, torch.float64, **sizes) for line in (towered, as_written))
    _step(mine), _step(reference)
    expected = _gradients(reference)
    for name, grad in _gradients(mine).items():
        assert relative_error(grad, expected[name]) <= 1e-9, f"gradient of {name}"
    losses, expected_losses = (_train(client, 3) for client in (mine, reference))
    assert len(losses) == 3
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    return mine


def check_captured(client: Any) -> None:
    forward = client.net.forward
    assert isinstance(forward.__func__, OptimizedForward)
    assert forward.steps and not forward.refusals


def check_float32(make: Callable[..., Any], **sizes: Any) -> None:
    """In float32, the gradients with the line are as near to those of float64 as eager's own."""
    reference = make(as_written, torch.float64, **sizes)
    mine, eager = (make(line, torch.float32, **sizes) for line in (towered, as_written))
    for client in (reference, mine, eager):
        _step(client)
    assert _distance(mine, reference) <= 2 * _distance(eager, reference)


def _step(client: Any) -> None:
    torch.manual_seed(0)
    client.step()


def _train(client: Any, steps: int) -> list[float]:
    torch.manual_seed(1)
    return client.train(steps)


def _gradients(client: Any) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in client.model.named_parameters()}
    assert any(grad is not None for grad in found.values())
    return {name: None if grad is None else grad.clone() for name, grad in found.items()}


def _distance(client: Any, reference: Any) -> float:
    mine, theirs = (
        torch.cat([g.flatten().double() for g in _gradients(c).values() if g is not None])
        for c in (client, reference)
    )
    return ((mine - theirs).norm() / theirs.norm()).item()
