"""The loss as written: the captured graph under plain autograd. The reference for numbers, price
and absent gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from passes.convolutions import any_size_differentiable
from passes.graph import copy_graph, placeholders
from passes.live import LiveBytes
from passes.price import FlopCounter
from passes.tracing import fake_mode_of, without_fused_kernels
from rewriter.capture import example_of
from rewriter.stateful import levels_restored


@dataclass(frozen=True)
class AsWritten:
    """What one step of the loss as written does.

    Attributes:
        flops: Matmul and convolution FLOPs of loss and gradients, in the symbolic sizes.
        matmuls: How many matrix products and convolutions that is.
        wanted: Positions of the inputs that require grad.
        reached: Output that requires grad → those of ``wanted`` it has a gradient for; for the
            others ``.grad`` stays None.
        kernels: How many kernels eager launches: views and allocations are none.
    """

    flops: sympy.Expr
    matmuls: int
    wanted: tuple[int, ...]
    reached: dict[int, frozenset[int]]
    kernels: int = 0

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the outputs that have a gradient for some input."""
        return tuple(i for i, inputs in self.reached.items() if inputs)

    @property
    def hollow(self) -> tuple[int, ...]:
        """Positions of the outputs that require grad but lead to no input, only to leaves made
        inside the loss."""
        return tuple(i for i, inputs in self.reached.items() if not inputs)

    @property
    def unreached(self) -> frozenset[int]:
        """Those of ``wanted`` that no output has a gradient for."""
        return frozenset(self.wanted).difference(*self.reached.values())


def without_checkpoints(captured: GraphModule) -> GraphModule:
    """Return a captured graph that computes what its checkpoints do at once: Dynamo's, run as they
    are, draw anew when they compute again."""
    found = [n for n in captured.graph.nodes if is_checkpoint(n.target)]
    if not found:
        return captured
    captured = copy_graph(captured)
    for node in captured.graph.nodes:
        if is_checkpoint(node.target):
            node.target, node.kwargs = _call, {}
    captured.recompile()
    return captured


def is_checkpoint(target: Any) -> bool:
    """Whether a node of a captured graph computes its part again in the backward pass."""
    is_of_higher_order = isinstance(target, torch._ops.HigherOrderOperator)
    return is_of_higher_order and target.name() in CHECKPOINTS


CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")


def _call(body: GraphModule, *inputs: Any) -> Any:
    return body(*inputs)


def run_as_written(
    captured: Callable[..., Any], inputs: Sequence[Any], wanted: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    """Run the captured graph on leaves made of ``inputs``; return its outputs and the leaves.

    Args:
        captured: What Dynamo captured.
        inputs: Tensors and numbers, one per graph input; they are not changed.
        wanted: Positions of the inputs to differentiate with respect to.
    """
    own = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    with torch.enable_grad(), without_fused_kernels(), levels_restored():
        for position in wanted:
            own[position].requires_grad_()
        return list(captured(*own)), own


def run_in_place(captured: GraphModule, inputs: Sequence[Any], *, value_only: bool) -> Any:
    """Run the captured graph on the caller's own tensors, as the loss would: it writes to them, and
    its outputs lead to them.

    Args:
        captured: What Dynamo captured.
        inputs: Tensors and numbers, one per graph input.
        value_only: Whether the caller has gradients switched off.
    """
    with torch.enable_grad(), without_fused_kernels(), levels_restored():
        outputs = without_checkpoints(captured)(*inputs)
    return tree_map_only(Tensor, torch.detach, outputs) if value_only else outputs


def gradients_of(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, retain_graph: bool = False
) -> list[Tensor | None]:
    """Return the gradients of the sum of ``outputs``; None where eager leaves ``.grad`` alone."""
    ends = [u for u in outputs if isinstance(u, Tensor) and u.requires_grad]
    if not ends or not inputs:
        return [None] * len(inputs)
    seeds = [torch.ones_like(u) for u in ends]
    with torch._C._DisableAutocast():  # users leave autocast before the backward pass
        return list(
            torch.autograd.grad(ends, inputs, seeds, allow_unused=True, retain_graph=retain_graph)
        )


def measure(captured: GraphModule, promoted: Sequence[int]) -> AsWritten:
    """Run the loss as written on fake tensors: exact FLOPs, and which gradients exist at all.

    Args:
        captured: What Dynamo captured.
        promoted: Inputs that the loss itself makes require grad.
    """
    examples, mode, wanted, start = _given(captured, promoted)
    with mode, numbers_forgotten(mode), FlopCounter() as counter:
        outputs, own = run_as_written(captured, examples, start)
    leaves = [own[i] for i in wanted]
    ends = [i for i, u in enumerate(outputs) if isinstance(u, Tensor) and u.requires_grad]
    reached: dict[int, frozenset[int]] = {}
    if len(ends) > 1:
        with mode, numbers_forgotten(mode):
            for end in ends:
                grads = gradients_of([outputs[end]], leaves, retain_graph=True)
                reached[end] = _there(wanted, grads)
    with mode, numbers_forgotten(mode), counter:
        # Counted once, all outputs together, as one backward pass would.
        grads = gradients_of(outputs, leaves)
    if len(ends) == 1:
        reached[ends[0]] = _there(wanted, grads)
    return AsWritten(counter.total, counter.calls, wanted, reached, counter.kernels)


def bytes_kept(captured: GraphModule, promoted: Sequence[int]) -> int:
    """Return the most bytes of computed values that eager has alive at once in one step of the loss
    as written, at the sizes at hand; inputs do not count.

    Args:
        captured: What Dynamo captured.
        promoted: Inputs that the loss itself makes require grad.
    """
    examples, mode, wanted, start = _given(captured, promoted)
    counter = FlopCounter()  # under it zero tangents are tensors with memory
    with mode, numbers_forgotten(mode), any_size_differentiable(), LiveBytes() as live, counter:
        outputs, own = run_as_written(captured, examples, start)
        gradients_of(outputs, [own[i] for i in wanted])
    # The leaves are copies of the inputs, alive all the time.
    return live.most - sum(live.bytes_of(x) for x in own if isinstance(x, Tensor))


def _given(
    captured: GraphModule, promoted: Sequence[int]
) -> tuple[list[Any], FakeTensorMode, tuple[int, ...], list[int]]:
    """Return fake inputs and their mode, the positions of those that require grad, and of those
    that do when the loss begins."""
    examples = [example_of(node) for node in placeholders(captured.graph)]
    wanted = tuple(
        i
        for i, example in enumerate(examples)
        if isinstance(example, Tensor) and (i in promoted or example.requires_grad)
    )
    start = [i for i in wanted if i not in promoted]
    return examples, fake_mode_of(examples), wanted, start


def _there(wanted: Sequence[int], grads: Sequence[Tensor | None]) -> frozenset[int]:
    return frozenset(i for i, grad in zip(wanted, grads, strict=True) if grad is not None)


@contextlib.contextmanager
def numbers_forgotten(mode: FakeTensorMode) -> Iterator[None]:
    """Let a backward operator read a number (`torch.trace` does) that no traced value holds, or a
    size (the second derivative of `batch_norm` does) without fixing it in the graphs to come."""
    if mode.shape_env is None:
        yield
        return
    with mode.shape_env.ignore_fresh_unbacked_symbols(), mode.shape_env.suppress_guards():
        yield
