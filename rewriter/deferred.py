"""A loss whose cheapest form takes long to find: as written at first, while another process
searches.

The other process gets what Dynamo has captured, and gives back the derivative graph with the form
that `rewriter.choose` takes; the step then goes on with it, op by op until it is compiled
(`rewriter.start`).
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.convolutions import take_any_size
from passes.custom_rules import CUSTOM
from passes.graph import placeholders
from passes.joint import Roles
from passes.tracing import fake_mode_of
from rewriter import nesting
from rewriter.as_written import AsWritten, run_in_place
from rewriter.background import Job, queue
from rewriter.capture import DERIVATIVES, example_of, source_name
from rewriter.choose import sole_choice
from rewriter.codegen import Settings, has_compiler, keeps_code
from rewriter.flags import begin_with_all_on
from rewriter.flatten import Flat
from rewriter.forms import Candidate, Form, written_out
from rewriter.modes import through_modes
from rewriter.options import Options
from rewriter.parcel import MARKS, CannotPack, pack, pack_captured, unpack, unpack_captured
from rewriter.recurrent import KINDS
from rewriter.rewrite import Rewritten, decide, prepare
from rewriter.specialising import gradients_on
from rewriter.speculating import branches_of
from rewriter.start import waiting
from rewriter.stateful import set_aside
from rewriter.step import CaptureAgain, Step, explaining, value_only
from rewriter.twice import is_differentiable_once
from rewriter.verifying import Verdict

# Of loss and gradients as written, as far as the captured graph tells; to find a form for more may
# take more than a second.
MOST_PRODUCTS = 15
_PRODUCTS = {
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "bilinear", "mv", "tensordot",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "scaled_dot_product_attention", "__matmul__", "__rmatmul__",
}  # fmt: skip


def step_for(
    captured: GraphModule, options: Options, function: str, *, may_wait: bool
) -> Step | Deferred:
    """Return what computes a loss: at once in the form that is best, or, with ``start="tiered"``,
    in that form later where it takes long to find.

    Args:
        captured: What Dynamo captured.
        options: The user's wishes.
        function: The loss's name.
        may_wait: Whether the form may come later.
    """
    begin_with_all_on(captured)
    if may_wait and _takes_long(captured, options):
        with contextlib.suppress(CannotPack):
            return Deferred(captured, options, function)
    prepared = prepare(captured, options, function)
    return Step(decide(prepared, options, recalls=_recalls(options)), options).prepare()


def _recalls(options: Options) -> bool:
    return options.backend == "inductor" and keeps_code()


def _takes_long(captured: GraphModule, options: Options) -> bool:
    """Whether another process is asked, and can be: it knows sizes that are numbers, no rules and
    no surroundings of the user's own."""
    is_asked = options.strategy != "auto" or options.is_measured
    examples = [example_of(node) for node in placeholders(captured.graph)]
    return (
        options.start == "tiered"
        and _recalls(options)
        and not (is_asked or options.strict or options.check)
        and products_in(captured) > MOST_PRODUCTS
        and all(map(_is_plain, captured.graph.nodes))
        and not branches_of(captured)
        and not CUSTOM
        and not any(torch.is_autocast_enabled(x.device.type) for x in examples)
        and torch.get_default_device().type == "cpu"
        and has_compiler(examples)
    )


def _is_plain(node: Node) -> bool:
    """Whether a node can be run as written, derivatives too, and means the same in another
    process."""
    if node.op == "placeholder":
        example = example_of(node)
        return isinstance(example, Tensor) and all(type(n) is int for n in example.shape)
    if node.op in ("get_attr", "call_module") or node.target == "item":
        return False
    return node.target not in KINDS and not is_differentiable_once(node)  # cuDNN's neither


def products_in(captured: GraphModule) -> int:
    """Return about how many matrix products and convolutions loss and gradients take as written:
    each is computed once more where a derivative is taken, and twice more where the loss is
    differentiated. 0 without an inner derivative."""
    products = derivatives = inside = 0
    for node in captured.graph.nodes:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.target in DERIVATIVES:
            derivatives += 1
            products *= 2
        elif node.target is nesting.enter_dual_level:
            derivatives += 1
            inside += 1
        elif node.target is nesting.exit_dual_level:
            inside -= 1
        elif name in _PRODUCTS:
            products += 2**inside
    return 3 * products if derivatives else 0


class Deferred:
    """A step as written, until its cheapest form is found.

    Args:
        captured: What Dynamo captured.
        options: The user's wishes.
        function: The loss's name.

    Raises:
        CannotPack: Its graph cannot go to another process.
    """

    def __init__(self, captured: GraphModule, options: Options, function: str) -> None:
        self._captured, self._options, self._function = captured, options, function
        self._names = tuple(source_name(node) for node in placeholders(captured.graph))
        self._written = written_out(captured)
        self._step: Step | None = None
        self._calls, self._is_searching = 0, True
        self._switching = threading.Lock()
        asked = pack_captured(captured), Settings.packed(options.mode), options, function
        self._job = Job(find, pickle.dumps(asked))

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        if self._is_searching:
            if not (explaining.get() or self._job.done.is_set()):
                return through_modes(self._as_written, inputs)
            self.switch()
        if self._step is None:
            raise CaptureAgain
        return self._step(*inputs)

    def _as_written(self, inputs: Sequence[Any]) -> Sequence[Any]:
        outputs = run_in_place(self._written, inputs, value_only=value_only.get())
        self._calls += 1
        if self._calls == 1:  # the first step has the cores to itself
            queue.submit(self._job)
            waiting.add(self)
        return outputs

    @property
    def rewritten(self) -> Rewritten | None:
        """The specialisation; None if its form is not found yet."""
        return self._step.rewritten if self._step else None

    @property
    def verdict(self) -> Verdict | None:
        """What came of comparing it with the loss as written."""
        return self._step.verdict if self._step else None

    @property
    def tiers(self) -> tuple[str, ...]:
        """What runs at present."""
        if self._step is not None:
            return self._step.tiers
        passed = time.perf_counter() - self._job.start
        how = f"as written, {self._calls} calls so far; the cheapest form is searched for"
        return (f"{self._function or 'the loss'}: {how} for {passed:.1f} s",)

    def wait(self, seconds: float | None) -> bool:
        """Wait for the search; return whether it is done."""
        return self._job.done.wait(seconds)

    def switch(self) -> None:
        """Let the next call have the form that was found; if none was, the loss is captured again
        at that call, and searched for here."""
        with self._switching:
            if not self._is_searching:
                return
            try:
                if self._job.done.is_set() and not self._job.error:
                    with gradients_on(), set_aside():
                        self._step = self._found()
            finally:
                self._is_searching = False
                waiting.discard(self)

    def _found(self) -> Step:
        """Return the step in the form that was found."""
        found: Found = pickle.loads(self._job.answer)
        return Step(found.rewritten(self._captured, self._names), self._options).prepare()


@dataclass(frozen=True)
class Found:
    """A specialisation on its way back, see `rewriter.rewrite.Rewritten`: its graphs are packed."""

    function: str
    as_written: AsWritten
    promoted: tuple[int, ...]
    roles: Roles
    seeded: bool
    detached: tuple[str, ...]
    candidate: Candidate
    graphs: tuple[bytes, bytes, bytes]
    simplified: int
    seconds: tuple[float, float]

    @classmethod
    def of(cls, rewritten: Rewritten) -> Found:
        """Pack a specialisation."""
        choice = rewritten.choice
        return cls(
            function=rewritten.function,
            as_written=rewritten.as_written,
            promoted=rewritten.flat.promoted,
            roles=rewritten.roles,
            seeded=rewritten.seeded,
            detached=rewritten.detached,
            candidate=choice.taken,
            graphs=(
                pack(rewritten.derivative, MARKS),
                pack(choice.form, MARKS),
                pack(choice.joint, MARKS),
            ),
            simplified=choice.joint.meta["simplified"],
            seconds=(choice.build_seconds, choice.trace_seconds),
        )

    def rewritten(self, captured: GraphModule, names: tuple[str, ...]) -> Rewritten:
        """Return the specialisation, without its stages.

        Args:
            captured: What Dynamo captured.
            names: What its inputs are, see `rewriter.rewrite.Prepared`.
        """
        mode = fake_mode_of([example_of(node) for node in placeholders(captured.graph)])
        derivative, form, joint = (unpack(graph, mode) for graph in self.graphs)
        joint.meta["simplified"] = self.simplified
        return Rewritten(
            captured=captured,
            names=names,
            as_written=self.as_written,
            flat=Flat(derivative, self.roles.n_outputs, self.roles.updated, self.promoted),
            derivative=derivative,
            roles=self.roles,
            seeded=self.seeded,
            stages=(),
            detached=self.detached,
            function=self.function,
            choice=sole_choice(Form(self.candidate, form, joint, *self.seconds)),
        )


def find(data: bytes) -> bytes:
    """Rewrite what Dynamo captured in another process: the task of this one.

    Args:
        data: The captured graph, packed; the settings and wishes there; the loss's name.

    Returns:
        What was `Found`.

    Raises:
        CannotPack: Only a changed copy of the captured graph can be rewritten.
    """
    graph, settings, options, function = pickle.loads(data)
    Settings.applied(settings)
    take_any_size()
    nesting.mend_closing()
    captured = unpack_captured(graph)
    before = str(captured.graph)
    prepared = prepare(captured, options, function)
    if str(captured.graph) != before:
        raise CannotPack("the captured graph was changed")
    return pickle.dumps(Found.of(decide(prepared, options, recalls=True)))
