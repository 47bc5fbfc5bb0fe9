"""Compare each new specialisation with the loss as written, once, at its first call.

The reference is what Dynamo captured, run under plain autograd on copies of the caller's arguments
and in their types. What is rounding is found out: where the two are not equal to a few units in the
last place, the loss as written is run again in float64 and on arguments that differ in their last
places. What is still different is decided by finite differences (`rewriter.judge`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import graphs_in, needs, placeholders, results, value_of
from passes.markers import FUNCTION, LEAF, STOP
from passes.nest import active_nodes
from rewriter import judge
from rewriter.as_written import gradients_of, run_as_written, without_checkpoints
from rewriter.capture import source_name
from rewriter.comparing import Difference, Run, from_plain, worst
from rewriter.dump import dump_failed, dump_internal
from rewriter.errors import CheckFailed, NestedGradientWarning, OptimizeNestedError
from rewriter.forms import written_out
from rewriter.generators import Generators, generators_restored
from rewriter.log import logger
from rewriter.rewrite import Rewritten
from rewriter.stateful import set_aside

PAGE = "docs/wrong_in_pytorch.md"
WRONG_IN_PYTORCH = frozenset(
    {
        "det", "logdet", "slogdet", "inverse", "inv", "solve", "householder_product",
        "cholesky_inverse", "cholesky", "eigh", "eigvalsh", "prod", "cumprod", "logcumsumexp",
        "logsigmoid", "mish", "sinc",
    }
)  # fmt: skip
"""Functions of which a derivative of second or third order, in some mode of differentiation or at
some point, is not right in every version of PyTorch that we support."""
_RERUNS = 4
_SEED = 20


@dataclass(frozen=True)
class Verdict:
    """What came of comparing a specialisation with the loss as written.

    Attributes:
        is_wrong: Whether it runs as written from now on.
        said: What was found, in one line.
        told: Whether the user is told, beside the report.
    """

    is_wrong: bool
    said: str
    told: bool = False


SAME = Verdict(False, "the same as the loss as written, at the first call")


APART = Verdict(False, "not compared: other processes would have to run it as often")


def communicates(captured: GraphModule) -> bool:
    """Whether a captured graph waits for other processes, which would have to run it as often as
    this one does."""
    targets = (node.target for node in captured.graph.nodes)
    return any("c10d" in str(t) or _module_of(t).startswith("torch.distributed") for t in targets)


def _module_of(target: Any) -> str:
    return str(getattr(target, "__module__", ""))


def tell(verdict: Verdict, name: str, *, strict: bool) -> None:
    """Tell the user what he has to know of a verdict.

    Args:
        verdict: The verdict.
        name: The loss's name.
        strict: Whether a difference is an error.

    Raises:
        CheckFailed: With ``strict``: the rewritten loss differs from the loss as written.
    """
    if not verdict.told:
        return
    said = f"{name or 'the loss'}: {verdict.said}"
    if not verdict.is_wrong:
        logger.warning(said)
        return
    if strict:
        raise CheckFailed(f"strict=True: {said}")
    warnings.warn(
        f"optimize_nested: {said}; it runs as written from now on",
        NestedGradientWarning,
        stacklevel=4,
    )


def verify_step(
    rewritten: Rewritten,
    run: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    *,
    value_only: bool,
) -> Verdict:
    """Run a step both ways on copies of ``inputs`` and compare values, gradients, state and random
    streams; nothing is left changed.

    Args:
        rewritten: The specialisation.
        run: Takes the graph's inputs, writes to those that the loss writes to, and returns its
            outputs; they lead to the gradients.
        inputs: Those of the call.
        value_only: Whether gradients are off.
    """
    if communicates(rewritten.captured):
        return APART
    with set_aside(), generators_restored() as start:
        return _verdict(rewritten, run, inputs, start, value_only=value_only)


def _verdict(
    rewritten: Rewritten,
    run: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    start: Generators,
    *,
    value_only: bool,
) -> Verdict:
    def as_written(given: Sequence[Any]) -> Run:
        start.set()
        return plain_run(rewritten, given, value_only=value_only)

    try:
        plain = as_written(inputs)
    except RuntimeError as error:
        return Verdict(False, f"not compared: as written PyTorch raises {_first_line(error)}")
    start.set()
    try:
        ours = rewritten_run(rewritten, run, inputs, value_only=value_only)
    except torch.OutOfMemoryError:
        return Verdict(False, "not compared: there is no memory for copies of the inputs")
    # Whatever else it is that our code raises, the loss as written has just run.
    except Exception as error:
        said = f"{_first_line(error)} where the loss as written does not"
        return _wrong(rewritten, inputs, said)
    names = names_of(rewritten, value_only=value_only)
    unit = coarsest(rewritten.derivative)
    found = differs(names, ours, plain, as_written, inputs, unit)
    if found is None:
        return SAME
    if decided := pytorch_is_wrong(rewritten, inputs, ours, plain, start):
        return Verdict(False, f"{found}, and it is PyTorch's that is wrong: {decided}", told=True)
    return _wrong(rewritten, inputs, str(found))


def differs(
    names: Sequence[str],
    ours: Run,
    plain: Run,
    as_written: Callable[[Sequence[Any]], Run],
    inputs: Sequence[Any],
    unit: float,
) -> Difference | None:
    """Return the largest difference between two runs that is no rounding.

    Args:
        names: What each result is.
        ours: The run in doubt.
        plain: The loss as written, on the same inputs.
        as_written: Runs it on others; it is run only if the two are not nearly equal.
        inputs: Those of the two runs.
        unit: How far the coarsest type in between rounds.
    """
    if worst(from_plain(names, ours, plain)) is None:
        return None
    return worst(from_plain(names, ours, plain, _reruns(as_written, inputs, unit)))


def coarsest(module: GraphModule) -> float:
    """Return how far the coarsest type of a graph rounds: under autocast that of no input."""
    values = (value_of(node) for part in graphs_in(module) for node in part.graph.nodes)
    kinds = {x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point()}
    return max((torch.finfo(kind).eps for kind in kinds), default=0.0)


def verify_code(
    ours: Sequence[Any],
    reference: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    what: str,
    unit: float,
) -> tuple[Sequence[Any], Verdict]:
    """Compare results with those of another function of the same inputs.

    Args:
        ours: The results in doubt; None counts as zero.
        reference: The function that is right; nothing is written in it.
        inputs: What it takes.
        what: What the results are, for the user.
        unit: How far the coarsest type in between rounds.

    Returns:
        The results, those of ``reference`` if they differ, and what was found.
    """

    def as_written(given: Sequence[Any]) -> Run:
        return _filled(reference(*given), ours)

    plain = reference(*inputs)
    names = [f"{what} ({i})" for i in range(len(plain))]
    own = _filled(ours, plain)
    found = differs(names, own, _filled(plain, ours), as_written, inputs, unit)
    if found is None:
        return ours, SAME
    return plain, Verdict(True, f"{found}. Please report this", told=True)


def _filled(results: Sequence[Any], like: Sequence[Any]) -> Run:
    """Take the absence of a result for zero, where another run has one."""
    pairs = zip(results, like, strict=True)
    return Run(
        [torch.zeros_like(b) if a is None and b is not None else a for a, b in pairs], [], []
    )


def verify_layer(
    captured: GraphModule,
    run: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    wanted: Sequence[int],
    updated: Sequence[int],
    unit: float,
) -> Verdict:
    """Run a module's call both ways on copies of ``inputs`` and compare values, state and random
    streams; nothing is left changed. Its derivatives are compared when they are first asked for.

    Args:
        captured: The call as Dynamo captured it.
        run: Takes the graph's inputs and returns its outputs.
        inputs: Those of the call.
        wanted: Positions of the inputs that a derivative can be asked for.
        updated: Positions of the inputs that the module writes to.
        unit: How far the coarsest type in between rounds.
    """
    if communicates(captured):
        return APART
    plain_call = without_checkpoints(captured)
    with set_aside(), generators_restored() as start:

        def once(function: Callable[..., Sequence[Any]], given: Sequence[Any]) -> Run:
            start.set()
            leaves = [i for i in wanted if inputs[i].requires_grad]
            values, own = run_as_written(function, given, leaves)
            return Run(values, [], [own[i] for i in updated], Generators.now())

        def as_written(given: Sequence[Any]) -> Run:
            return once(plain_call, given)

        try:
            plain = as_written(inputs)
        except RuntimeError as error:
            return Verdict(False, f"not compared: as written PyTorch raises {_first_line(error)}")
        try:
            ours = once(run, inputs)
        except OptimizeNestedError:
            raise
        # Whatever it is that our code raises, the module as written has just run.
        except Exception as error:
            return failed("a module", captured, error)
        names = [f"output {i}" for i in range(len(plain.values))]
        names += [
            f"the new value of {source_name(placeholders(captured.graph)[i])}" for i in updated
        ]
        found = differs(names, ours, plain, as_written, inputs, unit)
    return SAME if found is None else Verdict(True, f"{found}. Please report this", told=True)


def failed(name: str, captured: GraphModule, error: Exception) -> Verdict:
    """Return what there is to say of an error of ours in what was built."""
    folder = dump_internal(name or "the loss", captured, error)
    report = f"Please report this, with {folder}" if folder else "Please report this"
    return Verdict(True, f"internal error: {error!r}. {report}", told=True)


def _wrong(rewritten: Rewritten, inputs: Sequence[Any], said: str) -> Verdict:
    try:
        report = f"Please report this, with {dump_failed(rewritten, inputs)}"
    except OSError as error:  # nothing can be written anywhere; what is right still runs
        report = f"Please report this (its graphs cannot be written to a folder: {error})"
    return Verdict(True, f"{said}. {report}", told=True)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _reruns(
    as_written: Callable[[Sequence[Any]], Run], inputs: Sequence[Any], least: float
) -> list[Run]:
    """Return the loss as written in float64, where it runs, and on inputs that are moved in their
    last places."""
    runs: list[Run] = []
    with contextlib.suppress(RuntimeError):  # a type is burned in
        runs.append(as_written([judge.widened(x) for x in inputs]))
    source = torch.Generator().manual_seed(_SEED)
    for _ in range(_RERUNS):
        with contextlib.suppress(RuntimeError):  # an error of linear algebra, say
            runs.append(as_written([_shaken(x, source, least) for x in inputs]))
    return runs


def _shaken(x: Any, source: torch.Generator, least: float) -> Any:
    """Move a tensor by up to two units in the last place, or of ``least``, whichever is more."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    unit = max(torch.finfo(x.dtype).eps, least)
    moves = torch.rand(x.shape, generator=source, dtype=torch.float64).to(x.device)
    return (x.detach() * (1 + (4 * moves - 2) * unit)).to(x.dtype)


def pytorch_is_wrong(
    rewritten: Rewritten, inputs: Sequence[Any], ours: Run, plain: Run, start: Generators
) -> str | None:
    """Return by which numbers PyTorch's derivatives are wrong and ours right; None if that is not
    so, or not decided.

    The judge is never one of our graphs alone, which may be what is wrong: it is differences of the
    value as written, or PyTorch's autograd on the formula of a layer. Only for operators without
    one that are known to be wrong in PyTorch it is differences inside of the flat graph.

    Args:
        rewritten: The specialisation.
        inputs: Those that it was run on.
        ours: What it gave.
        plain: What PyTorch gave.
        start: Where the random generators were before each of the two.
    """
    wide = [judge.widened(x) for x in inputs]
    try:
        if decided := _by_formulas(rewritten, inputs, ours, start):
            return decided
        pairs = zip(ours.values, plain.values, strict=True)
        if all(is_near(mine, judge.widened(theirs)) for mine, theirs in pairs):
            return _by_differences_of_the_loss(rewritten, wide, ours, plain, start)
        return _by_differences_inside(rewritten, wide, ours)
    # An operator that float64 is no input of is no case for finite differences either.
    except (judge.Undecided, RuntimeError):
        return None


def _by_differences_of_the_loss(
    rewritten: Rewritten, wide: Sequence[Any], ours: Run, plain: Run, start: Generators
) -> str | None:
    """Decide about gradients of a value that both agree on; not where the loss says that its
    gradient is another one."""
    if not ours.grads or has_stops(rewritten):
        return None

    def value(moved: Sequence[Any]) -> Tensor:
        start.set()
        ends = plain_run(rewritten, moved, value_only=True).values
        return torch.stack([ends[i].detach().sum().real for i in differentiable]).sum()

    differentiable, wanted = rewritten.roles.differentiable, rewritten.roles.wanted
    right, by_ours, by_plain = judge.nearer(value, wide, wanted, ours.grads, plain.grads)
    off, off_as_written = abs(right - by_ours), abs(right - by_plain)
    if off > 1e-3 * max(abs(right), abs(by_ours)) or off_as_written < 10 * off:
        return None
    return (
        f"along the direction in which the gradients differ, finite differences give {right:.6g}, "
        f"ours {by_ours:.6g}, PyTorch's {by_plain:.6g}; see {PAGE}"
    )


def has_stops(rewritten: Rewritten) -> bool:
    """Whether the gradient is not that of the value: something that depends on what requires grad
    is detached, or pulled back as the user says."""
    flat = next((stage.module for stage in rewritten.stages if stage.name == "flatten"), None)
    if flat is None:
        return True
    inputs, roles = placeholders(flat.graph), rewritten.roles
    active = active_nodes(flat, {inputs[i] for i in roles.wanted})
    stops = [
        node
        for node in flat.graph.nodes
        if node.target in (STOP, LEAF, FUNCTION) and not active.isdisjoint(node.all_input_nodes)
    ]
    # What is written to the statistics of a layer is no part of the value.
    read = needs(results(flat.graph)[i] for i in roles.differentiable)
    return not read.isdisjoint(stops)


def _by_formulas(
    rewritten: Rewritten, inputs: Sequence[Any], ours: Run, start: Generators
) -> str | None:
    """Decide by PyTorch's autograd on the formulas of layers that it has derivatives of its own
    for."""
    captured = written_out(rewritten.captured)
    if [n.target for n in captured.graph.nodes] == [
        n.target for n in rewritten.captured.graph.nodes
    ]:
        return None

    def by_formula(given: Sequence[Any]) -> Run:
        start.set()
        return plain_run(rewritten, given, value_only=not ours.grads, captured=captured)

    reference = by_formula(inputs)
    names = names_of(rewritten, value_only=not ours.grads)
    unit = coarsest(rewritten.derivative)
    if differs(names, ours, reference, by_formula, inputs, unit):
        return None
    return f"with its layers written as formulas it gives what is given here; see {PAGE}"


def _name_of(target: Any) -> str:
    return str(getattr(target, "__name__", target)).removeprefix("linalg_")


def _by_differences_inside(rewritten: Rewritten, wide: Sequence[Any], ours: Run) -> str | None:
    """Decide about a value with derivatives of operators inside that PyTorch is known to get
    wrong."""
    called = {_name_of(node.target) for node in rewritten.captured.graph.nodes}
    known = called & WRONG_IN_PYTORCH
    flat = next((stage for stage in rewritten.stages if stage.name == "flatten"), None)
    if not known or flat is None:
        return None
    exact = judge.check_sites(judge.widened_graph(flat.runnable), wide)
    if not all(map(is_near, ours.values, exact)):
        return None
    return f"each derivative in it agrees with finite differences here; see {PAGE}"


def is_near(mine: Any, exact: Any) -> bool:
    """Whether a result is that of float64, to half of the digits of its type."""
    if not isinstance(mine, Tensor):
        return True
    rough = torch.finfo(mine.dtype).eps ** 0.5 if mine.is_floating_point() else 0.0
    size = float(exact.abs().max()) if exact.numel() else 0.0
    return bool(((judge.widened(mine) - exact).abs() <= rough * size + 1e-12).all())


def plain_run(
    rewritten: Rewritten,
    inputs: Sequence[Any],
    *,
    value_only: bool = False,
    captured: GraphModule | None = None,
) -> Run:
    """Run the loss as written on copies of ``inputs``, or another captured graph in its place."""
    roles = rewritten.roles
    start = [i for i in roles.wanted if i not in rewritten.flat.promoted]
    plain = without_checkpoints(captured or rewritten.captured)
    values, own = run_as_written(plain, inputs, start)
    grads = [] if value_only else gradients_of(values, [own[i] for i in roles.wanted])
    return Run(values, grads, [own[i] for i in roles.updated], Generators.now())


def rewritten_run(
    rewritten: Rewritten,
    run: Callable[..., Sequence[Any]],
    inputs: Sequence[Any],
    *,
    value_only: bool = False,
) -> Run:
    """Run a step on copies of ``inputs``."""
    own = copies(rewritten, inputs)
    values = list(run(*own))
    wanted = [own[i] for i in rewritten.roles.wanted]
    grads = [] if value_only else gradients_of(values, wanted)
    return Run(values, grads, [own[i] for i in rewritten.roles.updated], Generators.now())


def copies(rewritten: Rewritten, inputs: Sequence[Any]) -> list[Any]:
    """Return copies of a step's inputs, as leaves."""
    own = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    for position in rewritten.roles.wanted:
        own[position].requires_grad_()
    return own


def names_of(rewritten: Rewritten, *, value_only: bool = False) -> list[str]:
    """Return what each of a run's results is."""
    roles, inputs = rewritten.roles, rewritten.names
    names = [f"output {i}" for i in range(roles.n_outputs)]
    if not value_only:
        names += [f"the gradient of {inputs[i]}" for i in roles.wanted]
    return [*names, *(f"the new value of {inputs[i]}" for i in roles.updated)]
