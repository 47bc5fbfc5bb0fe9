"""Second and third derivatives of single functions at their degenerate points::

    python -m tests.degenerate

writes them to the end of ``docs/conformance.md``.

For a function ``f`` at a point ``A`` and a direction ``B`` the scalar ``φ(t) = ⟨w, f(A + tB)⟩`` is
what decides: a polynomial through its values gives ``φ″(0)`` and ``φ‴(0)``, without any derivative
formula. Each form of a nested derivative must give ``φ″`` as the loss's value and ``φ‴`` as the
gradient of the loss along ``B``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewriter import NestedGradientWarning, optimize_nested
from tests.conformance import TABLE, Sample, entries, points_of, samples_of

NODES, RADIUS = 17, 0.2
TOLERANCE = 1e-4  # of what a polynomial tells of a third derivative

RIGHT, WRONG, NAN, REFUSED, UNKNOWN = "right", "WRONG", "nan", "refused", "not smooth"


@dataclass(frozen=True)
class Case:
    """A function of one tensor, and a point of it.

    Attributes:
        name: What it is.
        function: Takes a float64 tensor and returns a tensor.
        point: Where.
        along: Which direction; None draws one.
        radius: How far φ is smooth and defined.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    point: Tensor
    along: Tensor | None = None
    radius: float = RADIUS


def direction(case: Case) -> Tensor:
    """Return the direction along which a case is differentiated."""
    if case.along is not None:
        return case.along
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(case.point.shape, generator=generator, dtype=torch.float64)
    return drawn.to(case.point.dtype)


def weighted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``A ↦ ⟨w, f(A)⟩`` for fixed weights that are all different."""

    def scalar(x: Tensor) -> Tensor:
        y = function(x)
        if y.is_complex():
            y = torch.view_as_real(y)
        w = 1.5 + torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()
        return (w * y).sum()

    return scalar


def truth(case: Case) -> tuple[float, float, float] | None:
    """Return ``φ′, φ″, φ‴`` at 0 from values alone; None where no polynomial fits."""
    scalar, b = weighted(case.function), direction(case)
    fits = []
    for radius in (case.radius, case.radius / 2):
        angle = math.pi * (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
        t = angle.cos()
        with torch.no_grad():
            values = torch.stack([scalar(case.point + radius * s * b) for s in t])
        if not values.isfinite().all():
            return None
        size = values.abs().max().clamp_min(1e-300)
        # Chebyshev coefficients, then those of powers, by the recurrence of the polynomials
        k = torch.arange(NODES, dtype=torch.float64)
        c = 2 / NODES * (k[:, None] * angle).cos() @ values
        c[0] /= 2
        if c[-3:].abs().max() > 1e-9 * size:
            return None
        c[c.abs() < 1e-14 * size] = 0  # of nothing but rounding, which a derivative would enlarge
        d = [0.0, 0.0, 0.0]
        for n in range(1, NODES):
            at = n * math.pi / 2
            d[0] += c[n].item() * n * math.sin(at)
            d[1] += c[n].item() * -n * n * math.cos(at)
            d[2] += c[n].item() * n * (1 - n * n) * math.sin(at)
        fits.append(tuple(d[i] / radius ** (i + 1) for i in range(3)))
    one, other = fits
    scale = max(map(abs, one))
    for a, b in zip(one, other, strict=True):
        if abs(a - b) > TOLERANCE / 3 * (abs(a) + 0.1 * scale):
            return None
    return one


def _grad_twice(f: Any, x: Tensor, b: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (h,) = torch.autograd.grad((g * b).sum(), x, create_graph=True)
    return (h * b).sum()


def _hessian(f: Any, x: Tensor, b: Tensor) -> Tensor:
    b = b.flatten()
    h = torch.func.hessian(lambda y: f(y.reshape(x.shape)))(x.flatten())
    return b @ h @ b


def _jacrev_twice(f: Any, x: Tensor, b: Tensor) -> Tensor:
    b = b.flatten()
    h = torch.func.jacrev(torch.func.jacrev(lambda y: f(y.reshape(x.shape))))(x.flatten())
    return b @ h @ b


def _jvp_twice(f: Any, x: Tensor, b: Tensor) -> Tensor:
    def slope(y: Tensor) -> Tensor:
        return torch.func.jvp(f, (y,), (b,))[1]

    return torch.func.jvp(slope, (x,), (b,))[1]


FORMS = {
    "grad, grad": _grad_twice,
    "hessian": _hessian,
    "jacrev, jacrev": _jacrev_twice,
    "jvp, jvp": _jvp_twice,
}


def _measured(loss: Any, x: Tensor, b: Tensor) -> tuple[float, float]:
    x = x.clone().requires_grad_()
    value = loss(x, b)
    if not value.requires_grad:
        return value.item(), 0.0
    value.backward()
    return value.item(), 0.0 if x.grad is None else (x.grad * b).sum().item()


def _verdict(loss: Any, case: Case, expected: tuple[float, float, float]) -> str:
    b = direction(case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", NestedGradientWarning)
            found = _measured(loss, case.point, b)
    except NestedGradientWarning as warning:
        return "as written: " + str(warning)[:300]
    except Exception as error:  # whatever it raises is what is reported
        return (
            f"{REFUSED}: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}"
        )
    scale = max(map(abs, expected))
    words = []
    for order, (mine, right) in enumerate(zip(found, expected[1:], strict=True), 2):
        if not math.isfinite(mine):
            words.append(f"{NAN} {order}")
        elif abs(mine - right) > TOLERANCE * (abs(right) + 1e-2 * scale):
            words.append(f"{WRONG} {order}: {mine:.6g} for {right:.6g}")
    return "; ".join(words) or RIGHT


def run_case(case: Case, form: str) -> tuple[str, str]:
    """Return what is to be said of the rewritten loss, and of the loss as written."""
    expected = truth(case)
    if expected is None:
        return UNKNOWN, UNKNOWN
    f = weighted(case.function)
    make = FORMS[form]

    def loss(x: Tensor, b: Tensor) -> Tensor:
        return make(f, x, b)

    torch._dynamo.reset()
    ours = _verdict(optimize_nested(loss, backend="eager", verify=False), case, expected)
    return ours, _verdict(loss, case, expected)


# Entries of PyTorch's operator database along a line


POINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": lambda x: x,
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "halves": lambda x: torch.full_like(x, 0.5),
    "large": lambda x: x + torch.where(x < 0, -40.0, 40.0),  # where exponentials saturate
    "very large": lambda x: x + torch.where(x < 0, -1e4, 1e4),
}


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        entry: What was differentiated.
        form: How.
        numbers: How many second and third derivatives are known from differences.
        ours: How many of them are right in the rewritten loss.
        theirs: How many are in the loss as written; 0 if it is refused.
        note: What is not right, first ours.
    """

    entry: str
    form: str
    numbers: int
    ours: int
    theirs: int
    note: str = ""

    def __str__(self) -> str:
        note = self.note.replace("|", "\\|")
        cells = (self.entry, self.form, self.numbers, self.ours, self.theirs, note)
        return f"| {' | '.join(map(str, cells))} |"


def _moves(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and x.dtype.is_floating_point


def along_a_line(sample: Sample, point: str) -> Callable[[Tensor], Tensor]:
    """Return ``t ↦ ⟨w, f(x + tB)⟩`` for all tensors of a sample that are differentiated at once."""
    leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
    generator = torch.Generator().manual_seed(3)
    start = [POINTS[point](x.detach()) if _moves(x) else x for x in leaves]
    b = [
        torch.randn(x.shape, generator=generator, dtype=x.dtype) if _moves(x) else 0 for x in leaves
    ]
    assert sample.function is not None
    function = sample.function

    def phi(t: Tensor) -> Tensor:
        moved = [x + t * v if isinstance(v, Tensor) else x for x, v in zip(start, b, strict=True)]
        args, kwargs = pytree.tree_unflatten(moved, spec)
        y = function(*args, **kwargs)
        y = y if sample.finish is None else sample.finish(y)
        found = [r for z in pytree.tree_leaves(y) if isinstance(z, Tensor) for r in _real(z)]
        total = torch.zeros((), dtype=torch.float64)
        for r in found:
            total = (
                total + (r * (1.5 + torch.arange(r.numel()).double().reshape(r.shape).cos())).sum()
            )
        return total

    return phi


def _real(z: Tensor) -> list[Tensor]:
    if z.is_complex():
        return [z.real, z.imag]
    return [z] if z.is_floating_point() else []


def run_entry(name: str, info: Any) -> Line | None:
    """Differentiate an entry three times along a line through each of `POINTS`; None where no
    polynomial fits anywhere, or the database has no sample."""
    samples = sorted(samples_of(info)[:3], key=lambda s: sum(x.numel() for x in points_of(s)))
    if not samples or not any(
        map(_moves, pytree.tree_leaves((samples[0].args, samples[0].kwargs)))
    ):
        return None
    sample = samples[len(samples) // 2]
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    known: dict[str, tuple[Any, tuple[float, float, float]]] = {}
    for point in POINTS:
        try:
            phi = along_a_line(sample, point)
            twice = [phi(zero[0]) for _ in range(2)]
            if not twice[0].isfinite():
                continue
            if not torch.equal(*twice):  # it draws, or writes to what it takes
                return None
            found = truth(Case(name, lambda t, phi=phi: phi(t.reshape(())).reshape(1), zero, one))
        except (RuntimeError, ValueError, TypeError):  # the point is outside of what it takes
            continue
        if found is not None:
            known[point] = phi, found
    if not known:
        return None

    def second(t: Tensor) -> Tensor:
        value = sum(phi(t[k]) for k, (phi, _) in enumerate(known.values()))
        (g,) = torch.autograd.grad(value, t, create_graph=True)
        (h,) = torch.autograd.grad(g.sum() + 0 * (t * t * t).sum(), t, create_graph=True)
        return h

    torch._dynamo.reset()
    expected = {f"{point} {k}": d[k - 1] / 2.5 for point, (_, d) in known.items() for k in (2, 3)}
    scales = {f"{point} {k}": max(map(abs, d)) for point, (_, d) in known.items() for k in (2, 3)}
    notes, right = [], []
    for who, loss in (
        ("ours", optimize_nested(second, backend="eager", verify=False)),
        ("PyTorch's", second),
    ):
        t = torch.zeros(len(known), dtype=torch.float64, requires_grad=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                h = loss(t)
                h.sum().backward()
        except Exception as error:
            notes.append(f"{who}: {type(error).__name__}")
            right.append(0)
            continue
        pairs = zip(h.tolist(), t.grad.tolist(), strict=True) if t.grad is not None else ()
        values = dict(zip(expected, [x for pair in pairs for x in pair], strict=True))
        bad = [at for at, d in expected.items() if not _agree(values[at], d, scales[at] / 2.5)]
        right.append(len(expected) - len(bad))
        if bad:
            notes.append(f"{who} not at {', '.join(bad)}")
    return Line(
        name, "grad, grad along a line", len(expected), right[0], right[1], "; ".join(notes)
    )


def _agree(mine: float, right: float, scale: float) -> bool:
    return abs(mine - right) <= 3e-4 * (abs(right) + 0.1 * scale) + 1e-9


def line_of_case(case: Case, form: str) -> Line:
    """Return what `run_case` says of a function as a line of the table."""
    ours, theirs = run_case(case, form)
    if ours == UNKNOWN:
        return Line(case.name, form, 0, 0, 0, UNKNOWN)
    notes = [
        f"{who} {said}" for who, said in (("ours", ours), ("PyTorch's", theirs)) if said != RIGHT
    ]
    return Line(case.name, form, 2, _count(ours), _count(theirs), "; ".join(notes))


def _count(verdict: str) -> int:
    """Return how many of the second and the third derivative are right."""
    if verdict == RIGHT:
        return 2
    return 0 if verdict.startswith((REFUSED, "as written")) else 2 - len(verdict.split("; "))


# Along a line of matrices that are not symmetric their derivative is none of their values.
_READ_A_TRIANGLE = {
    "cholesky", "cholesky_inverse", "cholesky_solve", "linalg.cholesky", "linalg.cholesky_ex",
    "linalg.eigh", "linalg.eigvalsh", "linalg.ldl_factor", "linalg.ldl_factor_ex",
    "linalg.ldl_solve", "linalg.pinv (hermitian)", "linalg.matrix_rank (hermitian)",
}  # fmt: skip


# Functions of matrices


def _tensor(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


EYE = torch.eye(3, dtype=torch.float64)
NEAR = torch.diag(_tensor([1.0, 1.0 + 1e-9, 2.0]))
PLAIN = _tensor([[2.6, 0.3, -0.6], [0.2, 2.9, 0.5], [-0.4, 0.7, 1.7]])
ZERO, RANK_1 = torch.zeros_like(EYE), torch.ones_like(EYE)
TALL = torch.eye(4, 2, dtype=torch.float64)
TRIANGLE = _tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 1.0], [0.0, 0.0, 4.0]])
REGULAR = {"equal": EYE, "nearly equal": NEAR, "plain": PLAIN}
EQUAL = {"equal": EYE, "plain": PLAIN}


def _symmetric(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function((x + x.mT) / 2)


def _exponential(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    return vectors @ torch.diag_embed(values.exp()) @ vectors.mT


def _positive(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(torch.linalg.cholesky(x @ x.mT + EYE))


linalg = torch.linalg
# Function → the points it is differentiated at.
MATRICES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Tensor]]] = {
    "det": (linalg.det, REGULAR | {"rank 1": RANK_1, "zero": ZERO}),
    "slogdet": (lambda x: linalg.slogdet(x)[1], REGULAR),
    "logdet": (torch.logdet, REGULAR),
    "inv": (linalg.inv, REGULAR),
    "solve": (lambda x: linalg.solve(x, x.cos()), REGULAR),
    "cholesky": (_symmetric(linalg.cholesky), EQUAL),
    "cholesky_solve": (_positive(lambda x: torch.cholesky_solve(x.sin(), x)), EQUAL),
    "eigvalsh, sum of exp": (_symmetric(lambda x: linalg.eigvalsh(x).exp().sum()), EQUAL),
    "eigh, function of a matrix": (_symmetric(_exponential), EQUAL),
    "svdvals, sum of squares": (lambda x: linalg.svdvals(x).square().sum(), EQUAL),
    "nuclear norm": (lambda x: linalg.matrix_norm(x, "nuc"), EQUAL),
    "qr": (lambda x: linalg.qr(x)[1].abs(), {"plain": PLAIN}),
    "pinv": (linalg.pinv, {"equal": EYE, "tall": TALL}),
    "lstsq": (lambda x: linalg.lstsq(x, TALL.cos()).solution, {"tall": TALL}),
    "matrix_exp": (torch.matrix_exp, EQUAL | {"zero": ZERO, "rank 1": RANK_1}),
    "matrix_power": (lambda x: linalg.matrix_power(x, 3), {"equal": EYE, "zero": ZERO}),
    "matrix_power, negative": (lambda x: linalg.matrix_power(x, -2), EQUAL),
    "lu": (lambda x: linalg.lu(x)[2], EQUAL),
    "lu_solve": (lambda x: linalg.lu_solve(*linalg.lu_factor(x), x.cos()), EQUAL),
    "solve_triangular": (
        lambda x: linalg.solve_triangular(x.triu(), x.cos(), upper=True),
        EQUAL,
    ),
    "householder_product": (
        lambda x: linalg.householder_product(x, _tensor([0.5, 0.7, 0.3])),
        {"plain": PLAIN, "zero": ZERO},
    ),
    "eigvals": (lambda x: linalg.eigvals(x).abs(), {"triangle": TRIANGLE}),
    "cond": (lambda x: linalg.cond(x, "fro"), EQUAL),
    "vector_norm": (lambda x: linalg.vector_norm(x, 3), {"ones": RANK_1}),
}


def cases() -> dict[str, Callable[[], Line | None]]:
    """Return what can be run, by name: functions of matrices in each form, then the database."""
    found: dict[str, Callable[[], Line | None]] = {}
    for name, (function, points) in MATRICES.items():
        for at, point in points.items():
            case = Case(f"{name} ({at})", function, point, radius=0.1)
            for form in FORMS:
                found[f"{case.name} {form}"] = functools.partial(line_of_case, case, form)
    for name, info in entries().items():
        if not hasattr(info, "module_cls") and name not in _READ_A_TRIANGLE:
            found[name] = functools.partial(run_entry, name, info)
    return found


# The page


TITLE = "## Three times, at special points"


_ABOUT = """
Second and third derivatives along a line, decided by a polynomial through values: the operator
database at its samples, at zeros, ones, halves and large numbers, and functions of matrices with
equal and nearly equal eigenvalues or low rank, in four forms. Where no polynomial fits (a kink, a
pole, a draw) nothing is compared. Written by `python -m tests.degenerate`.
"""


def page(lines: Sequence[Line], left: int = 0) -> str:
    """Return the section: sums, and the lines on which not everything is right.

    Args:
        lines: What has been run.
        left: How much has not been.
    """
    known = [line for line in lines if line.numbers]
    numbers, ours, theirs = (
        sum(getattr(line, name) for line in known) for name in ("numbers", "ours", "theirs")
    )
    better = sum(line.ours > line.theirs for line in known)
    worse = sum(line.ours < line.theirs for line in known)
    rows = [str(line) for line in known if min(line.ours, line.theirs) < line.numbers]
    said = (
        f"{len(known)} functions and forms, {numbers} derivatives: {ours} right here, {theirs} "
        f"right in PyTorch.\n{better} lines are better here, {worse} are worse. Lines on which "
        "all are right in both are left out."
    )
    if left:
        said += f"\n{left} functions and forms have not been run yet."
    head = [
        "| function | form | derivatives | right here | right in PyTorch | not right |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(["", TITLE, _ABOUT, said, "", *head, *rows, ""])


def main() -> int:
    """Run everything and write the section; 1 if PyTorch is right where we are not."""
    parser = argparse.ArgumentParser(prog="python -m tests.degenerate", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run and print these alone")
    parser.add_argument("--kept", type=Path, help="a file of results, to go on from")
    parser.add_argument("--stop", action="store_true", help="write the section from what is kept")
    options = parser.parse_args()
    known = cases()
    done: dict[str, Line | None] = {}
    if options.kept is not None and options.kept.exists():
        for text in options.kept.read_text().splitlines():
            name, fields = json.loads(text)
            done[name] = fields and Line(*fields)
    for name in [] if options.stop else options.only or known:
        if name in done:
            continue
        done[name] = line = known[name]()
        if options.kept is not None:
            with options.kept.open("a") as file:
                file.write(json.dumps([name, line and dataclasses.astuple(line)]) + "\n")
        if line is not None:
            print(line, flush=True)
    lines = [line for name in known if (line := done.get(name)) is not None]
    if not options.only:
        text, _, old = TABLE.read_text().partition("\n" + TITLE)
        _, found, rest = old.partition("\n## ")  # what `tests.narrowed` writes
        left = sum(name not in done for name in known)
        TABLE.write_text(text + page(lines, left) + found + rest)
    return int(any(line.ours < line.theirs for line in lines))


if __name__ == "__main__":
    sys.exit(main())
