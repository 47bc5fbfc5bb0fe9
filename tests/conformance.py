"""PyTorch's own operator database as a conformance test.

Every differentiable entry of ``op_db`` and ``module_db`` becomes a loss with a derivative inside:
the gradient of a weighted sum of the operator's results, squared, differentiated once more. The
rewritten loss is compared with the loss as written in float64. Run all of it, and write
``docs/conformance.md``, with::

    python -m tests.conformance
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import operator
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from rewriter import NestedGradientWarning, OptimizedLoss, choose, optimize_nested
from rewriter.errors import OptionError
from tests.oracle import Outcome, relative_error

TABLE = Path(__file__).parent.parent / "docs" / "conformance.md"
VERSION = torch.__version__.split("+")[0]
SEED = 17
SAMPLES = 3
LARGEST = 2000  # elements of all tensors of a sample
SECONDS = 240.0  # for one entry
LONGEST = 200  # characters of a reason
TOLERANCE = 1e-9
FORCED = ("jvp_over_gradient", "reverse")

REWRITTEN = "rewritten"
AS_WRITTEN = "as written"
BEYOND = "beyond eager"
REFUSED = "eager refuses"
SKIPPED = "not differentiable"
WRONG = "WRONG"
CRASH = "CRASH"
RESULTS = (REWRITTEN, BEYOND, AS_WRITTEN, REFUSED, SKIPPED, WRONG, CRASH)


@dataclass(frozen=True)
class Result:
    """What became of one entry, or of one sample of it.

    Attributes:
        entry: The entry's name.
        result: One of ``RESULTS``.
        strategies: The strategies whose numbers were compared and agree.
        reason: Why a strategy was refused, why the loss ran as written, or what went wrong.
        samples: How many samples were run.
    """

    entry: str
    result: str
    strategies: tuple[str, ...] = ()
    reason: str = ""
    samples: int = 1


@dataclass(frozen=True)
class Sample:
    """A loss and its arguments.

    Attributes:
        function: The operator, or None for a module.
        module: The module, or None for an operator.
        finish: Applied to the results before they are differentiated.
        args: Positional arguments; floating-point tensors that require grad are differentiated.
        kwargs: Keyword arguments.
    """

    function: Callable[..., Any] | None
    module: nn.Module | None
    finish: Callable[[Any], Any] | None
    args: tuple
    kwargs: dict[str, Any]


# Losses


def _results(value: Any) -> list[Tensor]:
    """Return the real tensors among the results that carry a gradient."""
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _results(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _results(item)]
    if not isinstance(value, Tensor) or not value.requires_grad:
        return []
    return _parts(value)


def _parts(value: Tensor) -> list[Tensor]:
    return [value.real, value.imag] if value.is_complex() else [value]


def _squared_gradient(value: Any, at: list[Tensor]) -> Tensor:
    """Return ``‖∇⟨w, y + y²/5⟩‖² + ‖y‖²``, the gradient taken at ``at``.

    The square under the weights gives operators that are linear a second derivative too.
    """
    ends = _results(value)
    total = 0.0
    for y in ends:
        w = 1.5 + torch.arange(y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape).cos()
        total = total + (w * (y + 0.2 * y * y)).sum()
    grads = torch.autograd.grad(total, at, create_graph=True, allow_unused=True)
    loss = 0.0
    for g in grads:
        if g is not None:
            for part in _parts(g):
                loss = loss + (part * part).sum()
    for y in ends:
        loss = loss + (y * y).sum()
    return loss


def make_loss(sample: Sample) -> Callable[..., Tensor]:
    """Return the loss of a sample as a function of ``(at, args, kwargs)``, or of ``(module, at,
    args, kwargs)``."""
    function, finish = sample.function, sample.finish

    def of_operator(at: list[Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        value = function(*args, **kwargs)
        return _squared_gradient(value if finish is None else finish(value), at)

    def of_module(
        module: nn.Module, at: list[Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> Tensor:
        inner = at if at else [p for p in module.parameters() if p.requires_grad]
        return _squared_gradient(module(*args, **kwargs), inner)

    return of_operator if sample.module is None else of_module


# Samples


def entries() -> dict[str, Any]:
    """Return the differentiable entries of both databases by name, in the order of the table."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    found: dict[str, Any] = {}
    for op in op_db:
        if op.supports_autograd:
            name = f"{op.name} ({op.variant_test_name})" if op.variant_test_name else op.name
            found[name] = op
    found = dict(sorted(found.items()))
    modules = {info.formatted_name.replace("_", ".", 1): info for info in module_db}
    return found | dict(sorted(modules.items()))


def _seed() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(SEED)


# PyTorch's `matrix_exp` pulls a cotangent back as a block of one larger matrix; beside a cotangent
# of 1e19 the others lose their digits.
_SCALES = {"matrix_exp": 0.1}
_LOW_RANK = {
    "svd_lowrank": lambda a, b, **options: torch.svd_lowrank(a @ b.mT, **options),
    "pca_lowrank": lambda a, b, **options: torch.pca_lowrank(a @ b.mT, **options),
}


def _plain(op: Any) -> Callable[..., Any]:
    """Return the operator as users call it: the database wraps random ones in a seed of its own."""
    if op.name in _LOW_RANK:
        return _LOW_RANK[op.name]
    code = getattr(op.op, "__code__", None)
    if code is not None and "wrapper_set_seed" in code.co_names:
        return operator.attrgetter(op.name)(torch)
    return op.op


def _identity(function: Any) -> bool:
    """Whether a database's post-processing is the default, which does nothing."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_code == (lambda x: x).__code__.co_code


def _operator_samples(op: Any) -> Iterator[Sample]:
    backward = op.supported_backward_dtypes("cpu")
    dtype = torch.float64 if torch.float64 in backward else torch.complex128
    if dtype not in backward:
        return
    function = _plain(op)
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        finish = sample.output_process_fn_grad
        if op.name in _SCALES:
            sample.input = (sample.input.detach() * _SCALES[op.name]).requires_grad_()
        yield Sample(
            function,
            None,
            None if _identity(finish) else finish,
            (sample.input, *sample.args),
            dict(sample.kwargs),
        )


def _module_samples(info: Any) -> Iterator[Sample]:
    for training in (True, False) if info.train_and_eval_differ else (True,):
        inputs = info.module_inputs_func(
            info,
            device="cpu",
            dtype=torch.float64,
            requires_grad=True,
            training=training,
        )
        for given in inputs:
            if given.forward_input is None:
                continue
            made = given.constructor_input
            module = info.module_cls(*made.args, **made.kwargs).double()
            module.train(training)
            call = given.forward_input
            if isinstance(module, nn.modules.lazy.LazyModuleMixin):
                with torch.no_grad():  # parameters are made by the first call
                    module(*call.args, **call.kwargs)
            yield Sample(None, module, None, tuple(call.args), dict(call.kwargs))


def points_of(sample: Sample) -> list[Tensor]:
    """Return the tensors among the arguments to differentiate with respect to."""
    leaves = pytree.tree_leaves((sample.args, sample.kwargs))
    return [
        x
        for x in leaves
        if isinstance(x, Tensor)
        and x.requires_grad
        and (x.dtype.is_floating_point or x.dtype.is_complex)
    ]


def _is_useful(sample: Sample) -> bool:
    tensors = [x for x in pytree.tree_leaves((sample.args, sample.kwargs)) if isinstance(x, Tensor)]
    at = points_of(sample)
    if sample.module is not None:
        at = [*at, *sample.module.parameters()]
    if any(x.layout is not torch.strided for x in tensors):
        return False
    return bool(at) and sum(x.numel() for x in at) > 0 and sum(x.numel() for x in tensors) < LARGEST


def samples_of(info: Any) -> list[Sample]:
    """Return small samples of an entry with something to differentiate; the first few are spread
    over all it has."""
    _seed()
    make = _module_samples if hasattr(info, "module_cls") else _operator_samples
    useful = []
    for sample in make(info):
        if _is_useful(sample):
            useful.append(sample)
        if len(useful) >= 40:
            break
    last = len(useful) - 1
    spread = [round(last * k / (SAMPLES - 1)) for k in range(SAMPLES)] if useful else []
    return [useful[i] for i in dict.fromkeys([*spread, *range(len(useful))])]


# One entry


class _Differs(Exception):
    """Numbers that should agree and do not."""


def _arguments(sample: Sample) -> tuple[list[nn.Module], list[Tensor], tuple, dict[str, Any]]:
    """Return copies of what the loss takes: modules, points, arguments, keyword arguments."""
    import copy

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().clone().requires_grad_(x.requires_grad)

    args, kwargs = pytree.tree_map(own, (sample.args, sample.kwargs))
    made = dataclasses.replace(sample, args=args, kwargs=kwargs)
    modules = [] if sample.module is None else [copy.deepcopy(sample.module)]
    return modules, points_of(made), args, kwargs


def _run(loss: Callable[..., Tensor], sample: Sample) -> Outcome:
    """Run one step on copies."""
    modules, at, args, kwargs = _arguments(sample)
    _seed()
    value = loss(*modules, at, args, kwargs)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise _Nothing("nothing to differentiate")
    value.backward()
    grads = {f"argument {i}": x.grad for i, x in enumerate(at)}
    for module in modules:
        grads |= {name: p.grad for name, p in module.named_parameters()}
    buffers = {name: b for module in modules for name, b in module.named_buffers()}
    return Outcome(value.detach(), grads, buffers, torch.get_rng_state())


class _Nothing(Exception):
    """A sample without anything to differentiate."""


def _compare(mine: Outcome, reference: Outcome) -> None:
    """Compare value, gradients, buffers and generator.

    Raises:
        _Differs: Names what differs and by how much.
    """
    sizes = [
        g[g.isfinite()].abs().max().item()
        for g in reference.grads.values()
        if g is not None and g.isfinite().any()
    ]
    floor = 1e-5 * max(sizes, default=0.0)
    rows = [("value", mine.value, reference.value, 0.0)]
    rows += [(f"gradient of {n}", mine.grads[n], g, floor) for n, g in reference.grads.items()]
    rows += [(f"buffer {n}", mine.buffers[n], b, 0.0) for n, b in reference.buffers.items()]
    for name, ours, theirs, size in rows:
        error = _error(ours, theirs, size)
        if not error <= TOLERANCE:
            raise _Differs(f"{name} differs by {error:.2g}")
    if not torch.equal(mine.generator, reference.generator):
        raise _Differs("the generator ends elsewhere")


def _error(mine: Tensor | None, reference: Tensor | None, floor: float) -> float:
    """Return the relative error over the entries that are finite; infinite where others are not the
    same."""
    if mine is None or reference is None:
        return relative_error(mine, reference)
    if mine.shape != reference.shape or mine.dtype != reference.dtype:
        return float("inf")
    if mine.is_complex():
        mine, reference = torch.view_as_real(mine), torch.view_as_real(reference)
    finite = reference.isfinite()
    if not torch.equal(mine.nan_to_num()[~finite], reference.nan_to_num()[~finite]):
        return float("inf")
    return relative_error(mine[finite], reference[finite], floor)


def _taken(loss: OptimizedLoss) -> set[str]:
    return {name for step in loss.steps for name in step.rewritten.choice.taken.strategies.values()}


def _is_finite(outcome: Outcome) -> bool:
    found = [outcome.value, *(g for g in outcome.grads.values() if g is not None)]
    return all(bool(x.isfinite().all()) for x in found)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _rewritten(sample: Sample, strategy: str) -> tuple[Outcome, OptimizedLoss, str]:
    """Run the rewritten loss; return what it leaves, the decorated loss and why it ran as
    written."""
    torch._dynamo.reset()
    loss = optimize_nested(make_loss(sample), backend="eager", strategy=strategy, verify=False)
    with contextlib.ExitStack() as stack:
        if strategy != "auto":  # the loss as written is a candidate beside the form asked for
            stack.enter_context(patch.object(choose, "evaluated", lambda flops, sizes: sys.maxsize))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        found = _run(loss, sample)
    said = [str(w.message) for w in caught if w.category is NestedGradientWarning]
    reason = said[0].split(" runs as written: ", 1)[1].rsplit(" (at ", 1)[0] if said else ""
    return found, loss, reason


def _directional_error(sample: Sample, mine: Outcome) -> float:
    """Compare our gradient along a random direction with differences of the value as written, whose
    inner gradient is PyTorch's first derivative."""
    loss = make_loss(sample)
    modules, at, _, _ = _arguments(sample)
    leaves = [*at, *(p for m in modules for p in m.parameters())]
    names = [*(f"argument {i}" for i in range(len(at)))]
    names += [n for m in modules for n, _ in m.named_parameters()]
    _seed()
    directions = [torch.randn_like(x) for x in leaves]
    expected = sum(
        (mine.grads[n].conj() * v).real.sum().item()
        for n, v in zip(names, directions, strict=True)
        if mine.grads[n] is not None
    )

    def value(step: float) -> float:
        modules, at, args, kwargs = _arguments(sample)
        leaves = [*at, *(p for m in modules for p in m.parameters())]
        with torch.no_grad():
            for x, v in zip(leaves, directions, strict=True):
                x += step * v
        _seed()
        return loss(*modules, at, args, kwargs).item()

    errors = []
    for h in (1e-2, 1e-3, 1e-4, 1e-5):
        slope = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
        errors.append(abs(slope - expected) / max(abs(slope), 1e-8))
    return min(errors)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "logcumsumexp": lambda x, dim: x.exp().cumsum(dim).log(),
}
"""Formulas that are the reference in place of operators whose second derivatives PyTorch has to
eight digits only."""


def run_sample(name: str, sample: Sample, strategies: Sequence[str]) -> Result:
    """Compare a sample, by each of the strategies in turn, with the loss as written."""
    refusal = ""
    reference = None
    function = PLAIN.get(name, sample.function)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = _run(make_loss(dataclasses.replace(sample, function=function)), sample)
        if not _is_finite(reference):
            return Result(name, SKIPPED, (), "not finite as written")
    except _Nothing as nothing:
        return Result(name, SKIPPED, (), str(nothing))
    except Exception as error:
        refusal = _first_line(error)
        if "scaled_dot_product" in refusal:
            with sdpa_kernel(SDPBackend.MATH):
                reference = _run(make_loss(sample), sample)
    verified: list[str] = []
    reasons: list[str] = []
    for strategy in strategies:
        if strategy in verified:
            continue
        try:
            mine, loss, reason = _rewritten(sample, strategy)
        except OptionError as error:
            text = str(error).split(f"{strategy!r}: ", 1)[-1]
            reasons.append(f"{strategy}: {text.rsplit('. It accepts', 1)[0]}")
            continue
        except Exception as error:
            if refusal:
                return Result(name, REFUSED, (), refusal)
            return Result(name, CRASH, (strategy,), _first_line(error))
        if reference is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                error = _directional_error(sample, mine)
            if not error <= 1e-6:
                return Result(name, WRONG, (strategy,), f"off by {error:.2g} of differences")
        else:
            try:
                _compare(mine, reference)
            except _Differs as difference:
                return Result(name, WRONG, tuple(_taken(loss)), str(difference))
        if reason:
            return Result(name, AS_WRITTEN, (), reason)
        verified += [taken for taken in sorted(_taken(loss)) if taken not in verified]
    if refusal:
        return Result(name, BEYOND, tuple(sorted(verified)), refusal)
    return Result(name, REWRITTEN, tuple(sorted(verified)), "; ".join(reasons))


def run_entry(name: str, info: Any, most: int = SAMPLES) -> Result:
    """Run samples of an entry; the worst of them is the entry's result. Fewer are from the
    middle: the first one is often the plainest."""
    try:
        samples = samples_of(info)
    except Exception as error:
        return Result(name, SKIPPED, (), f"no samples: {_first_line(error)}", 0)
    if most < SAMPLES:
        samples = samples[1:] + samples[:1]
    results: list[Result] = []
    skipped: dict[str, None] = {} if samples else {"no float64 input with a gradient": None}
    for sample in samples[: 4 * SAMPLES]:
        result = run_sample(name, sample, FORCED if results else ("auto", *FORCED))
        if result.result == SKIPPED:
            skipped[result.reason] = None
        else:
            results.append(result)
        if len(results) == most:
            break
    if not results:
        return Result(name, SKIPPED, (), "; ".join(skipped), 0)
    order = (REFUSED, REWRITTEN, BEYOND, AS_WRITTEN, WRONG, CRASH)
    worst = max(results, key=lambda r: order.index(r.result)).result
    ran = [r for r in results if r.result != REFUSED or worst == REFUSED]
    common = set.intersection(*(set(r.strategies) for r in ran))
    reasons = [r.reason for r in ran if r.reason and r.result == worst]
    if len(ran) < len(results):
        refused = next(r for r in results if r.result == REFUSED)
        reasons.append(f"{len(results) - len(ran)} of {len(results)} samples: {refused.reason}")
    return Result(
        name, worst, tuple(sorted(common)), "; ".join(dict.fromkeys(reasons)), len(results)
    )


# All entries


Runner = Callable[[str, dict[str, Any]], Result]


def _serve(connection: Connection, run: Runner) -> None:
    """Answer names with results, in a process of its own."""
    torch.set_num_threads(1)
    known = entries()
    connection.send(None)
    while True:
        name = connection.recv()
        if name is None:
            return
        connection.send(run(name, known))


class _Worker:
    """A process that can be given up on."""

    def __init__(self, run: Runner) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, run), daemon=True)
        self.process.start()
        theirs.close()
        self.name: str | None = None
        self.since = time.monotonic()
        self.ready = False

    def give(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()
        self.connection.send(name)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _run_known(name: str, known: dict[str, Any]) -> Result:
    return run_entry(name, known[name])


def run_all(
    names: Sequence[str], jobs: int, done: Callable[[Result], None], run: Runner = _run_known
) -> list[Result]:
    """Run entries in worker processes; one that hangs or dies is a result like any other.

    Args:
        names: What to run.
        jobs: How many processes.
        done: Called with each result.
        run: A module's function, which takes a name and all entries.
    """
    waiting = list(names)
    results: dict[str, Result] = {}
    workers = [_Worker(run) for _ in range(min(jobs, len(waiting)))]

    def finished(result: Result) -> None:
        results[result.entry] = result
        done(result)

    while len(results) < len(names):
        wait([worker.connection for worker in workers], timeout=1.0)
        for index, worker in enumerate(workers):
            lost = ""
            try:
                while worker.connection.poll():
                    answer = worker.connection.recv()
                    worker.ready = True
                    if answer is not None:
                        finished(answer)
                        worker.name = None
            except (EOFError, OSError):
                worker.process.join()
                lost = f"the process ended with {worker.process.exitcode}"
            if worker.name is not None and time.monotonic() - worker.since > SECONDS:
                lost = f"no result after {SECONDS:.0f} s"
            if lost:
                if worker.name is not None:
                    finished(Result(worker.name, CRASH, (), lost, 0))
                worker.end()
                workers[index] = worker = _Worker(run)
            if worker.ready and worker.name is None and waiting:
                worker.give(waiting.pop(0))
    for worker in workers:
        worker.end()
    return [results[name] for name in names]


def row(result: Result) -> str:
    """Return the line of an entry; addresses and numbers of symbols, which vary, are left out."""
    reason = re.sub(r" at 0x[0-9a-f]+", "", result.reason)
    reason = re.sub(r"\bu\d+\b", "u", reason).replace("|", "\\|").replace("<", "\\<")
    if len(reason) > LONGEST:
        reason = reason[: LONGEST - 1] + "…"
    strategies = ", ".join(result.strategies)
    return f"| {result.entry} | {result.result} | {strategies} | {reason} |"


def lines_of(text: str) -> dict[str, str]:
    """Return entry → line from the page."""
    body = text.split("| entry | result |", 1)[1].split("\n## ", 1)[0].splitlines()[2:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in body if line.startswith("| ")}


def rest_of(text: str) -> str:
    """Return what follows the table on the page, which `tests.degenerate` writes."""
    _, found, rest = text.partition("\n## ")
    return found + rest


def result_in(line: str) -> str:
    """Return the result a line of the page states."""
    return line.split(" | ")[1]


def table(found: dict[str, str]) -> str:
    """Return the page: a summary and one line per entry."""
    counts = Counter(result_in(line) for line in found.values())
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in RESULTS)
    lines = [
        "# Conformance",
        "",
        "PyTorch's own operator and module databases, each entry as the loss",
        "`‖∇⟨w, y + y²/5⟩‖² + ‖y‖²` of its results `y`, differentiated once more; value,",
        "gradients, buffers and generator against eager in float64 (relative 1e-9), for each",
        "strategy that accepts it. Samples whose gradient as written is not finite are left",
        "out. Written by `make conformance`.",
        "",
        f"torch {VERSION}, {len(found)} entries: {summary}.",
        "",
        "| result | meaning |",
        "|---|---|",
        f"| {REWRITTEN} | captured, numbers agree |",
        f"| {BEYOND} | eager has no second derivative; ours agrees with differences of the loss |",
        f"| {AS_WRITTEN} | not captured, with the reason; numbers are eager's |",
        f"| {REFUSED} | neither eager nor we can differentiate it twice; the error is eager's |",
        f"| {SKIPPED} | no input with a gradient on this machine, or nothing finite to compare |",
        "",
        "| entry | result | strategies | reason |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *found.values()]) + "\n"


def main() -> int:
    """Run the entries and write the page; 1 if any is wrong or crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these entries alone")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    options = parser.parse_args()
    names = list(entries())
    if options.only:
        unknown = [name for name in options.only if name not in names]
        if unknown:
            parser.error(f"no entry {', '.join(unknown)}")
        names = options.only
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    counts: Counter[str] = Counter()
    with Progress(*columns) as progress:
        task = progress.add_task("conformance", total=len(names))

        def done(result: Result) -> None:
            counts[result.result] += 1
            if options.only or result.result in (WRONG, CRASH):
                progress.console.print(
                    f"{result.entry}: {result.result} ({', '.join(result.strategies)}) "
                    f"{result.reason}",
                    markup=False,
                    highlight=False,
                )
            progress.update(task, advance=1, description=f"{result.entry[:40]:40}")

        results = run_all(names, options.jobs, done)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    old = lines_of(TABLE.read_text()) if options.only else {}
    new = old | {result.entry: row(result) for result in results}
    page = table({name: new[name] for name in entries() if name in new})
    TABLE.write_text(page + rest_of(TABLE.read_text()))
    return 1 if counts[WRONG] or counts[CRASH] else 0


if __name__ == "__main__":
    sys.exit(main())
