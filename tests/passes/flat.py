"""Flat graphs for tests: a loss written once, with marks or eagerly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from passes.graph import copy_graph, placeholders
from passes.linearize import flatten_output
from passes.markers import gradient_mark, leaf_mark, point_mark, stop_mark
from passes.nest import active_nodes, nest
from passes.share import share
from passes.tracing import trace_before_autograd
from passes.verify import verify


class Marks(ABC):
    """What a loss may do beside plain arithmetic."""

    @abstractmethod
    def leaf(self, x: Tensor) -> Tensor:
        """``x.detach().requires_grad_()``."""

    @abstractmethod
    def stop(self, x: Tensor) -> Tensor:
        """``x.detach()``."""

    @abstractmethod
    def point(self, x: Tensor) -> Tensor:
        """Enter a `torch.func` transform at ``x``."""

    @abstractmethod
    def pull(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        seeds: Sequence[Tensor],
        seed_dims: int = 0,
    ) -> list[Tensor]:
        """``autograd.grad(outputs, inputs, seeds, create_graph=True)``."""

    def gradient(self, output: Tensor, *inputs: Tensor) -> Any:
        """The gradient of the sum of one output; a list only for several inputs."""
        grads = self.pull([output], inputs, [torch.ones_like(output)])
        return grads[0] if len(inputs) == 1 else grads


class Eager(Marks):
    """The meaning."""

    def leaf(self, x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    def stop(self, x: Tensor) -> Tensor:
        return x.detach()

    def point(self, x: Tensor) -> Tensor:
        return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()

    def pull(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        seeds: Sequence[Tensor],
        seed_dims: int = 0,
    ) -> list[Tensor]:
        assert seed_dims <= 1
        grads = torch.autograd.grad(
            list(outputs),
            list(inputs),
            list(seeds),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
            is_grads_batched=seed_dims == 1,
        )
        return list(grads)


class Marked(Marks):
    """The marks of `passes.markers`."""

    def leaf(self, x: Tensor) -> Tensor:
        return leaf_mark(x)

    def stop(self, x: Tensor) -> Tensor:
        return stop_mark(x)

    def point(self, x: Tensor) -> Tensor:
        return point_mark(x, [])

    def pull(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        seeds: Sequence[Tensor],
        seed_dims: int = 0,
    ) -> list[Tensor]:
        return gradient_mark(list(outputs), list(inputs), list(seeds), seed_dims)


Loss = Callable[..., Any]  # (marks, *inputs) → a tensor or a tuple of tensors


def flat_graph(loss: Loss, *inputs: Tensor) -> GraphModule:
    """Trace a loss with marks."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x.detach()) for x in inputs]

    def run(*values: Tensor) -> Any:
        with torch.no_grad():
            return loss(Marked(), *values)

    module = trace_before_autograd(run, fakes, mode)
    flatten_output(module.graph)
    for node in module.graph.nodes:
        node.meta["stack_trace"] = 'File "loss.py", line 7, in loss\n    marks.gradient(u, x)'
    verify(module)
    return module


def active_of(module: GraphModule, inputs: Sequence[Tensor]) -> set[Node]:
    """The nodes that carry a gradient from those inputs that require one."""
    given = zip(placeholders(module.graph), inputs, strict=True)
    return active_nodes(module, {node for node, x in given if x.requires_grad})


def shared(module: GraphModule, inputs: Sequence[Tensor]) -> int:
    """Share, and check the result."""
    merged = share(module, active_of(module, inputs))
    verify(module)
    return merged


def nested(module: GraphModule) -> GraphModule:
    """A nested copy: the graph with marks can not run, this one can."""
    module = copy_graph(module)
    nest(module)
    verify(module)
    return module


def step(run: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """All results, and the gradients of the sum of their sines to the inputs that require grad."""
    own = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    results = run(*own)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    wanted = [x for x in own if x.requires_grad]
    total = sum((u.sin().sum() for u in results if u.requires_grad), start=torch.zeros(()))
    grads = [torch.zeros_like(x) for x in wanted]
    if total.requires_grad and wanted:
        found = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        grads = list(found)
    return [u.detach() for u in results] + grads


def assert_step(run: Callable[..., Any], loss: Loss, inputs: Sequence[Tensor]) -> None:
    """Compare results and gradients with the loss run eagerly."""
    expected = step(lambda *values: loss(Eager(), *values), inputs)
    for mine, reference in zip(step(run, inputs), expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


def assert_rewrites(loss: Loss, *inputs: Tensor) -> tuple[GraphModule, GraphModule]:
    """Compare every stage with the loss as written; return the shared and the nested graph."""
    module = flat_graph(loss, *inputs)
    assert_step(nested(module), loss, inputs)
    shared(module, inputs)
    assert shared(module, inputs) == 0
    result = nested(module)
    assert_step(result, loss, inputs)
    return module, result


def random_points(*shape: int, grad: bool = False) -> Tensor:
    """A tensor in float64."""
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


def calls(module: GraphModule, target: Any) -> int:
    """How many nodes call an operator, the bodies of derivatives not counted."""
    return len(module.graph.find_nodes(op="call_function", target=target))


def net(x: Tensor, w: Tensor) -> Tensor:
    """One layer: what most losses here differentiate."""
    return torch.tanh(x @ w)
