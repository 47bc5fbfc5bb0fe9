"""`mode="reduce-overhead"`: the step is one CUDA graph, and what it returns survives the next
replay. What needs no GPU runs everywhere."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from rewriter import codegen, optimize_nested
from rewriter.codegen import _replayed
from tests.cases import mlp

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum() + net(x).square().mean()


@needs_cuda
@pytest.mark.inductor
def test_steps_and_accumulation() -> None:
    net = mlp(nn.Tanh, 3, 8, 2).cuda()
    reference = copy.deepcopy(net)
    loss = optimize_nested(penalty, mode="reduce-overhead")
    batches = [torch.randn(5, 2, dtype=torch.float64, device="cuda") for _ in range(6)]
    batches = [x.requires_grad_() for x in batches]
    mine, theirs = (torch.optim.SGD(n.parameters(), 0.05) for n in (net, reference))
    values = []
    for x in batches:  # warm-up, recording, replays
        for n, f, optimizer in ((net, loss, mine), (reference, penalty, theirs)):
            optimizer.zero_grad()
            value = f(n, x)
            value.backward()
            optimizer.step()
            values.append(value)
    # Two losses before one backward pass, accumulated on what is there already.
    for n, f in ((net, loss), (reference, penalty)):
        (f(n, batches[0]) + 2 * f(n, batches[1])).backward()
        values.append(f(n, batches[2]))
    for ours, expected in zip(values[::2], values[1::2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert len(loss.steps) == 1


def test_results_survive_the_next_replay() -> None:
    memory = torch.zeros(3)
    x = torch.ones(3)

    def replay(x: Tensor) -> list[Any]:
        memory.add_(x)
        return [memory, None, x, 2]

    run = _replayed(replay, [])
    first, *others = run(x)
    run(x)
    assert first.tolist() == [1, 1, 1]
    assert others[1] is x and others[::2] == [None, 2]


def test_unaligned_parameters_are_copied() -> None:
    seen: list[Tensor] = []
    aligned, unaligned = torch.ones(4), torch.ones(5)[1:]
    _replayed(lambda *inputs: seen.extend(inputs) or [], [0, 1])(aligned, unaligned)
    assert seen[0] is aligned
    assert seen[1] is not unaligned and seen[1].data_ptr() % 16 == 0
    assert torch.equal(seen[1], unaligned)


def test_parameters_are_static() -> None:
    """They are read where they are; the batch is copied to where the graph reads it."""
    asked: list[Any] = []

    def compile_fx(module: Any, examples: Any, inner: Any, **settings: Any) -> Any:
        asked.append(settings["config_patches"].get("triton.cudagraphs"))
        with patch.object(codegen, "compile_fx_inner", lambda **kwargs: asked.append(kwargs)):
            inner(static_input_idxs=[], cudagraphs=True)
        return module.forward

    net, x = mlp(nn.Tanh, 3, 8, 2), torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    loss = optimize_nested(penalty, mode="reduce-overhead")
    with (
        patch.object(codegen, "compile_fx", compile_fx),
        patch.object(codegen, "_is_on_cuda", lambda examples: True),
    ):
        loss(net, x).backward()
    given = loss.inputs_of(net, x)
    expected = [i for i, value in enumerate(given) if isinstance(value, nn.Parameter)]
    assert asked == [True, {"static_input_idxs": expected, "cudagraphs": True}]
    assert len(expected) == len(list(net.parameters()))
