"""A loss whose cheapest form takes long to find: as written at first, while another process
searches.

The other process gets the derivative graph, and gives back the form that `rewriter.choose` takes;
the step then goes on with it, op by op until it is compiled (`rewriter.start`).
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from passes.custom_rules import CUSTOM
from passes.graph import graphs_in, is_random, placeholders
from passes.joint import step_of
from passes.price import evaluated, size_hints
from passes.tracing import example_inputs, fake_mode_of, without_fused_kernels
from rewriter.background import queue
from rewriter.choose import cheapest
from rewriter.codegen import has_compiler, keeps_code
from rewriter.forms import AS_WRITTEN, Form, Forms, as_written
from rewriter.options import Options
from rewriter.parcel import MARKS, CannotPack, pack, unpack
from rewriter.progress import shown
from rewriter.recall import Recollection
from rewriter.rewrite import Prepared, Rewritten, decide
from rewriter.specialising import gradients_on
from rewriter.start import waiting
from rewriter.stateful import set_aside
from rewriter.step import Step, explaining

# Of the loss as written; to find a form for more may take more than a second.
MOST_MATMULS = 15


def step_for(prepared: Prepared, options: Options) -> Step | Deferred:
    """Return what computes a loss: at once in the form that is best, or, with ``start="tiered"``,
    in that form later where it takes long to find.

    Args:
        prepared: The loss; its form is not chosen.
        options: The user's wishes.
    """
    if _takes_long(prepared, options):
        with contextlib.suppress(CannotPack):
            return Deferred(prepared, options)
    return Step(decide(prepared, options, recalls=_recalls(options)), options).prepare()


def _recalls(options: Options) -> bool:
    return options.backend == "inductor" and keeps_code()


def _takes_long(prepared: Prepared, options: Options) -> bool:
    """Whether another process is asked, and can be: it knows no rules of the user's own."""
    roles, module = prepared.roles, prepared.derivative
    is_asked = options.strategy != "auto" or options.strict or options.is_measured
    return (
        options.start == "tiered"
        and _recalls(options)
        and not is_asked
        and prepared.as_written.matmuls > MOST_MATMULS
        and bool(prepared.sites)
        and not (prepared.seeded and roles.differentiable)
        and not size_hints(module)
        and CUSTOM.keys().isdisjoint(node.target for node in _nodes(module))
        and torch.get_default_dtype() is torch.float32
        and has_compiler(module)
        and not _is_known(prepared)
    )


def _is_known(prepared: Prepared) -> bool:
    """Whether an earlier process chose a form that is soon built; the loss as written, traced with
    all its derivatives, is not."""
    strategies = _memory(prepared).strategies()
    return strategies is not None and AS_WRITTEN not in strategies.values()


def _memory(prepared: Prepared) -> Recollection:
    return Recollection(prepared.derivative, prepared.roles, seeded=prepared.seeded)


class Deferred:
    """A step as written, until its cheapest form is found.

    Args:
        prepared: The loss.
        options: The user's wishes.

    Raises:
        CannotPack: Its graph cannot go to another process.
    """

    def __init__(self, prepared: Prepared, options: Options) -> None:
        self._prepared, self._options = prepared, options
        module, written = prepared.derivative, prepared.as_written.flops
        asked = pack(module, MARKS), prepared.roles, evaluated(written, size_hints(module))
        self._step: Step = _WrittenStep(prepared, options)
        self._calls, self._is_searching = 0, True
        self._switching = threading.Lock()
        self._job = queue.submit(find, pickle.dumps(asked))
        waiting.add(self)

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._is_searching:
            self._calls += 1
            if explaining.get() or self._job.done.is_set():
                self.switch()
        return self._step(*inputs)

    @property
    def rewritten(self) -> Rewritten:
        """The specialisation; if its form is not found yet, it is searched for here."""
        if self._is_searching:
            self.switch()
        return self._step.rewritten

    @property
    def tiers(self) -> tuple[str, ...]:
        """What runs at present."""
        if not self._is_searching:
            return self._step.tiers
        name = self._prepared.function or "the loss"
        passed = time.perf_counter() - self._job.start
        how = f"as written, {self._calls} calls so far; the cheapest form is searched for"
        return (f"{name}: {how} for {passed:.1f} s",)

    def wait(self, seconds: float | None) -> bool:
        """Wait for the search; return whether it is done."""
        return self._job.done.wait(seconds)

    def switch(self) -> None:
        """Let the next call have the form that was found; if none was, search in this process."""
        with self._switching:
            if not self._is_searching:
                return
            with gradients_on(), set_aside(), shown(f"rewriting {self._prepared.function}"):
                rewritten = self._found() or decide(self._prepared, self._options, recalls=True)
                self._step = Step(rewritten, self._options).prepare()
            self._is_searching = False
            waiting.discard(self)

    def _found(self) -> Rewritten | None:
        """Return what the other process has found; None if it has failed, or is not done."""
        if not self._job.done.is_set() or self._job.error:
            return None
        prepared = self._prepared
        if not self._job.answer:
            forms = Forms(prepared.derivative, prepared.roles, seeded=prepared.seeded)
            form = forms.build_as_written(prepared.captured, prepared.flat.promoted)
        else:
            form = _unpacked(self._job.answer, fake_mode_of(example_inputs(prepared.derivative)))
        _memory(prepared).keep(form.candidate)
        return decide(prepared, self._options, form=form)


class _WrittenStep(Step):
    """Compute the loss and its gradients as written, op by op under autograd."""

    def __init__(self, prepared: Prepared, options: Options) -> None:
        self._begin(prepared, options)
        roles, module = prepared.roles, prepared.derivative
        self.is_random = any(map(is_random, _nodes(module)))
        written = as_written(prepared.captured, prepared.sites, roles)
        leaves = [i for i in roles.wanted if i not in prepared.flat.promoted]
        step = step_of(written, roles, leaves, len(placeholders(module.graph)))

        def forward(*inputs: Any) -> list[Any]:
            with without_fused_kernels():
                outputs, updates, gradients = step(*map(_detached, inputs))
            return [*map(_detached, outputs), *map(_detached, updates), *gradients]

        def value(*inputs: Any) -> list[Any]:
            own = [*map(_detached, inputs)]
            for i in leaves:
                own[i].requires_grad_()
            with torch.enable_grad(), without_fused_kernels():
                return [*map(_detached, written(own))]

        self._forward, self._value = forward, value
        self._is_fixed = False  # what autograd returns is looked at each time


def _nodes(module: GraphModule) -> list[Node]:
    """Return the nodes of a graph and of those that it calls."""
    return [node for part in graphs_in(module) for node in part.graph.nodes]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def find(data: bytes) -> bytes:
    """Find the cheapest form of a derivative graph: the task of the other process.

    Args:
        data: The graph, packed; what its inputs and outputs are; the FLOPs as written.

    Returns:
        The form, packed; nothing if the loss as written is the cheapest.
    """
    graph, roles, written = pickle.loads(data)
    form = cheapest(unpack(graph), roles, written)
    return b"" if form is None else _packed(form)


def _packed(form: Form) -> bytes:
    graphs = pack(form.module, MARKS), pack(form.joint, MARKS), form.joint.meta["simplified"]
    return pickle.dumps((form.candidate, graphs, form.build_seconds, form.trace_seconds))


def _unpacked(data: bytes, mode: FakeTensorMode) -> Form:
    candidate, (module, joint, simplified), *seconds = pickle.loads(data)
    joint = unpack(joint, mode)
    joint.meta["simplified"] = simplified
    return Form(candidate, unpack(module, mode), joint, *seconds)
