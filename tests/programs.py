"""Random losses as small Python programs: a grammar of networks, derivatives and contractions.

Everything has the shape (batch, 4): points, values of the network, gradients. So any of them may
stand for any other, and a derivative of a derivative is one more application of a rule. `programs`
is a hypothesis strategy; a `Program` prints as a script that shows the failure when it is run.
"""

from __future__ import annotations

import copy
import linecache
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.price import evaluated, size_hints
from rewriter import NestedGradientWarning, optimize_nested
from rewriter.errors import OptionError
from rewriter.rewrite import Rewritten
from tests.cases import with_written_norms
from tests.oracle import Outcome, assert_same, outcome, relative_error

Draw = Callable[[st.SearchStrategy[Any]], Any]

_HEADER = """\
import copy
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from tests.blocks import *
"""


@dataclass(frozen=True)
class Program:
    """A loss, its network and how it is called.

    Attributes:
        net: The network, an expression.
        lines: The body of ``loss(net, x, y)``.
        batch: Number of rows of ``x`` and ``y``.
        dtype: ``float64`` or ``float32``.
        training: Whether the network is in train mode.
        grad: Whether ``x`` requires grad.
        options: Options of the decorator.
        then: A second batch size to call the loss with; None for none.
    """

    net: str
    lines: tuple[str, ...]
    batch: int = 3
    dtype: str = "float64"
    training: bool = True
    grad: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    then: int | None = None

    @property
    def definitions(self) -> str:
        """The source of ``make()`` and ``loss(net, x, y)``."""
        mode = "" if self.training else ".eval()"
        body = "\n".join(f"    {line}" for line in self.lines)
        return (
            f"{_HEADER}\n\ndef make():\n    return randomized({self.net}){mode}\n\n\n"
            f"def loss(net, x, y):\n{body}\n"
        )

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options)
        calls = [self.batch, self.batch] + ([] if self.then is None else [self.then])
        return (
            f"\n{self.definitions}\n\n"
            "from tests.programs import compare\n"
            f"compare(make, loss, batches={calls}, dtype=torch.{self.dtype}, "
            f"grad={self.grad}{options})\n"
        )


class Discarded(Exception):
    """A program that says nothing: eager refuses it, or its numbers are not finite."""


class Fallback(Exception):
    """A program that runs as written; the message is the reason that the warning gives."""


class IllConditioned(Discarded):
    """A difference that the loss as written shows too, when its inputs change by rounding."""


def run(program: Program) -> None:
    """Compare a program, decorated, with itself as written.

    Raises:
        AssertionError: A number differs.
        Discarded: There is nothing to compare.
        Fallback: The loss was not captured; it ran as written.
    """
    name = f"<program {id(program)}>"
    source = program.definitions
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    # Dynamo imports the module of a function that it traces.
    module = sys.modules["program"] = types.ModuleType("program")
    scope = module.__dict__
    try:
        exec(compile(source, name, "exec"), scope)
        batches = [program.batch] * 2 + ([] if program.then is None else [program.then])
        compare(
            scope["make"],
            scope["loss"],
            batches=batches,
            dtype=getattr(torch, program.dtype),
            grad=program.grad,
            **dict(program.options),
        )
    finally:
        del linecache.cache[name], sys.modules["program"]


def compare(
    make: Callable[[], nn.Module],
    loss: Callable[..., Tensor],
    *,
    batches: Sequence[int],
    dtype: torch.dtype = torch.float64,
    grad: bool = False,
    absent_is_zero: bool = False,
    is_around: bool = False,
    **options: Any,
) -> None:
    """Call a loss, decorated, once per batch size on other data each time; compare each step.

    In float64 with the loss as written, to 1e-9; in float32 both with float64: no further from it
    than twice eager's own error. Norm layers as written are taken by their formulas, because some
    of PyTorch's own derivatives of them are wrong. See `run` for what is raised.

    Args:
        make: Makes the network.
        loss: Takes the network and two tensors of shape (batch, 4).
        batches: The batch size of each call.
        dtype: What the decorated loss computes in.
        grad: Whether the first tensor requires grad.
        absent_is_zero: Whether a gradient may be zero that the loss as written leaves at None:
            `torch.autograd.functional.jvp` is captured as `torch.func.jvp`, which has one.
        is_around: Whether the network is decorated in place of the loss.
        **options: Options of the decorator.
    """
    torch.manual_seed(1)
    wide = make().double()
    net = copy.deepcopy(wide).to(dtype)
    options = {"verify": False, **options}  # it would run what differs as written
    decorated: Any = optimize_nested(loss, backend="eager", **options)
    if is_around:
        decorated = _around(loss, options)
    for call, batch in enumerate(batches):
        torch.manual_seed(2 + call)
        exact_args = tuple(torch.randn(batch, 4, dtype=torch.float64) for _ in "xy")
        args = tuple(x.to(dtype).requires_grad_(grad and i == 0) for i, x in enumerate(exact_args))
        exact_args = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in args)
        reference = with_written_norms(copy.deepcopy(wide))
        exact = _as_written(loss, reference, exact_args)
        mine = _rewritten(decorated, net, args)
        if absent_is_zero:
            mine = replace(mine, grads=_without_zeros(mine.grads, exact.grads))
        # Forward mode's zeros are what pullbacks do not reach.
        if is_around or decorated._by_pullbacks:
            exact = replace(exact, grads=_without_zeros(exact.grads, mine.grads))
        try:
            if dtype is torch.float64:
                assert_same(mine, exact)
            else:
                narrow = with_written_norms(copy.deepcopy(net))
                _assert_as_exact(mine, exact, _rounded(loss, narrow, reference, args))
        except AssertionError as difference:
            _refuse_if_ill_conditioned(loss, reference, exact_args, exact, dtype, difference)
            raise
    if not is_around:
        assert len(decorated.steps) <= len(set(batches)), "a specialisation was not used again"
        for step in decorated.steps:
            _assert_never_dearer(step.rewritten)


def _assert_never_dearer(rewritten: Rewritten) -> None:
    """What the chooser takes of its own accord has no more FLOPs than the loss as written."""
    taken, hints = rewritten.choice.taken, size_hints(rewritten.joint)
    written = evaluated(rewritten.as_written.flops, hints)
    assert rewritten.choice.asked or taken.flops <= written, f"{taken.flops} > {written} FLOPs"


def _around(loss: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    """Return the loss around a decorated network."""

    def call(net: nn.Module, *args: Any) -> Tensor:
        return loss(optimize_nested(net, backend="eager", **options), *args)

    return call


def _as_written(loss: Callable[..., Tensor], net: nn.Module, args: tuple[Tensor, ...]) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch says of the program is not under test
            found = outcome(loss, [net], args, {})
    except Exception as error:  # whatever it is, there is nothing to compare with
        raise Discarded(f"eager: {(str(error) or repr(error)).splitlines()[0]}") from error
    numbers = [found.value, *(g for g in found.grads.values() if g is not None)]
    numbers += found.buffers.values()
    if not all(x.isfinite().all() for x in numbers):
        raise Discarded("not finite")
    if any(x.numel() and x.abs().max() > 1e8 for x in numbers):
        raise Discarded("too large")
    return found


def _rewritten(decorated: Any, net: nn.Module, args: tuple[Tensor, ...]) -> Outcome:
    with warnings.catch_warnings():
        # Another says that a derivative enters the loss as a constant, which is often meant here.
        warnings.simplefilter("ignore", NestedGradientWarning)
        warnings.filterwarnings("error", ".* runs as written", NestedGradientWarning)
        # A norm layer by its formula, of no samples.
        warnings.filterwarnings("ignore", ".*degrees of freedom is <= 0", UserWarning)
        try:
            return outcome(decorated, [net], args, {})
        except NestedGradientWarning as warning:
            raise Fallback(str(warning)) from None
        except OptionError as refusal:
            raise Discarded("the strategy is refused") from refusal


def _without_zeros(
    mine: dict[str, Tensor | None], exact: dict[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """Leave out gradients that are zero everywhere, where the reference has none."""
    is_zero = {name: g is not None and not g.any() for name, g in mine.items()}
    return {n: None if is_zero[n] and exact[n] is None else g for n, g in mine.items()}


def _rounded(
    loss: Callable[..., Tensor], net: nn.Module, wide: nn.Module, args: tuple[Tensor, ...]
) -> Iterator[dict[str, float]]:
    """Eager's own error in float32 of each number: at the point itself, then at points that differ
    from it by rounding, because at one point an error may be small by chance."""
    ulp = torch.finfo(torch.float32).eps
    generator = torch.Generator().manual_seed(0)
    points = [args] + [
        tuple(_leaf(x * (1 + ulp * torch.randn(x.shape, generator=generator)), x) for x in args)
        for _ in range(4)
    ]
    for point in points:
        exact = _as_written(loss, wide, tuple(_leaf(x.double(), x) for x in point))
        yield _errors(_as_written(loss, net, point), exact)


def _leaf(x: Tensor, like: Tensor) -> Tensor:
    return x.detach().requires_grad_(like.requires_grad)


def _errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """The largest error of each number."""
    return {
        name: (mine.double() - right).abs().max().item() if right.numel() else 0.0
        for name, (mine, right) in _numbers(found, exact).items()
    }


def _numbers(found: Outcome, exact: Outcome) -> dict[str, tuple[Tensor, Tensor]]:
    """Value, gradients and buffers of two outcomes, side by side."""
    pairs = {"value": (found.value, exact.value)}
    pairs |= {name: (found.grads[name], g) for name, g in exact.grads.items()}
    pairs |= {name: (found.buffers[name], b) for name, b in exact.buffers.items()}
    for name, (mine, right) in pairs.items():
        assert (mine is None) == (right is None), f"{name}: {mine} where {right} is right"
    return {name: pair for name, pair in pairs.items() if pair[1] is not None}


def _assert_as_exact(mine: Outcome, exact: Outcome, rounded: Iterator[dict[str, float]]) -> None:
    """Compare in float32: no further from float64 than twice eager's own error, and a few ulp.

    A gradient that is zero because terms cancel is noise in both, or in one of them: it may be as
    far from zero as the worst of eager's gradients is from the right one.
    """
    errors = _errors(mine, exact)
    pairs = _numbers(mine, exact)
    own = next(rounded)
    for name, (ours, _) in pairs.items():
        assert ours.dtype in (torch.float32, torch.int64), f"{name}: {ours.dtype}"
    sizes = {n: r.abs().max().item() if r.numel() else 0.0 for n, (_, r) in pairs.items()}
    floor = max((sizes[name] for name in exact.grads if name in sizes), default=0.0)
    while True:
        worst = max((own[name] for name in exact.grads if name in own), default=0.0)
        cancels = {name for name, size in sizes.items() if size <= 1e-12 * floor}
        allowed = {
            name: 2 * (worst if name in cancels else own[name])
            + 32 * 1.2e-7 * max(size, floor if name != "value" else 0.0)
            for name, size in sizes.items()
        }
        over = [name for name in pairs if not errors[name] <= allowed[name]]
        other = next(rounded, None) if over else None
        if other is None:
            break
        own = {name: max(error, other[name]) for name, error in own.items()}
    assert not over, "; ".join(
        f"{n}: error {errors[n]:.3g}, allowed {allowed[n]:.3g}" for n in over
    )


def _refuse_if_ill_conditioned(
    loss: Callable[..., Tensor],
    net: nn.Module,
    args: tuple[Tensor, ...],
    exact: Outcome,
    dtype: torch.dtype,
    difference: AssertionError,
) -> None:
    """Run the loss as written on inputs that differ by rounding: if it changes by more than is
    allowed, its own numbers say nothing.

    Raises:
        IllConditioned: It does.
    """
    ulp = 8 * torch.finfo(dtype).eps
    torch.manual_seed(0)
    moved = tuple(
        (x.detach() * (1 + ulp * torch.randn_like(x))).requires_grad_(x.requires_grad) for x in args
    )
    allowed = 1e-10 if dtype is torch.float64 else 1e-3
    other = _as_written(loss, net, moved)
    errors = [relative_error(other.value, exact.value)]
    errors += [relative_error(other.grads[n], g) for n, g in exact.grads.items() if g is not None]
    if max(errors) > allowed:
        raise IllConditioned(f"ill-conditioned: {max(errors):.3g}") from difference


# The grammar of networks

ACTIVATIONS = (
    "nn.Tanh()", "nn.ReLU()", "nn.SiLU()", "nn.GELU()", "nn.Softplus()", "nn.LeakyReLU(0.2)",
    "nn.ELU()", "nn.CELU(1.5)", "nn.Hardtanh(-0.5, 0.5)", "nn.Sigmoid()", "nn.Mish()",
    "nn.GELU(approximate='tanh')", "nn.SELU()", "nn.Softsign()", "nn.Hardswish()", "nn.ReLU6()",
    "nn.Softshrink(0.1)", "nn.PReLU()", "nn.LogSigmoid()", "nn.Tanhshrink()",
    "nn.Threshold(0.1, 0.3)",
)  # fmt: skip
LAYERS = (
    "nn.Linear(4, 4)",
    "nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))",
    "nn.Sequential(nn.Linear(4, 4, bias=False), nn.ELU(inplace=True))",
    "nn.LayerNorm(4)",
    "nn.LayerNorm(4, elementwise_affine=False)",
    "nn.GroupNorm(2, 4)",
    "nn.Softmax(dim=1)",
    "nn.LogSoftmax(dim=1)",
    "nn.Sequential(nn.Linear(4, 8), nn.GLU())",
    "nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(3, 4))",
    "nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, stride=2, padding=1), nn.Flatten())",
    "nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 2, padding=1), nn.Flatten(), "
    "nn.Linear(18, 4))",
    "nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten())",
    "nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 2), nn.Flatten(), "
    "nn.Linear(9, 4))",
    "nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.MaxPool2d(2, 1, 1), nn.Flatten(), "
    "nn.Linear(9, 4))",
    "nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.AvgPool2d(2, 1, 1), nn.Flatten(), "
    "nn.Linear(9, 4))",
    "nn.Sequential(nn.Unflatten(1, (1, 4)), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 4))",
    "nn.Sequential(nn.Unflatten(1, (1, 4)), nn.AdaptiveAvgPool1d(2), nn.Flatten(), "
    "nn.Linear(2, 4))",
    "Attention()",
    "Embedded()",
    "Map(lambda h: h.abs())",
    "Map(lambda h: h * h.norm(dim=1, keepdim=True))",
    "Map(lambda h: h / (1 + h.square().sum(1, keepdim=True)).sqrt())",
    "Map(lambda h: h * h.max(dim=1, keepdim=True)[0])",
    "Map(lambda h: torch.maximum(h, h.flip(1)) * h.amin(1, keepdim=True))",
    "Map(lambda h: torch.where(h > 0, h, h.sin()))",
    "Map(lambda h: h.clamp(-0.7, 0.7) * h.roll(1, 1))",
    "Map(lambda h: h.sort(dim=1)[0].cumsum(1))",
    "Map(lambda h: h.logsumexp(1, keepdim=True) * h)",
    "Map(lambda h: h.pow(3) + h[:, [2, 0, 1, 1]])",
    "Map(lambda h: torch.einsum('bi,bj->bij', h, h.cos()).sum(2))",
    "Map(lambda h: h * (1 + h.var(1, keepdim=True)))",
    "Map(lambda h: torch.atan2(h, 2 + h.square()))",
    "Map(lambda h: nn.functional.normalize(h, dim=1))",
    "weight_norm(nn.Linear(4, 4))",
    "frozen(nn.Linear(4, 4))",
)  # fmt: skip
# Write to buffers in train mode, which PyTorch forbids inside of a transform.
WRITERS = (
    "nn.BatchNorm1d(4)",
    "spectral_norm(nn.Linear(4, 4))",
    "nn.Sequential(nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2), nn.Flatten())",
)
# Draw random numbers in train mode, which PyTorch forbids inside of a vmap.
DRAWERS = ("nn.Dropout(0.4)", "nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3, inplace=True))")
AROUND = ("Residual({a})", "Twice({a})", "Product({a})", "Beside({a}, {b})", "frozen({a})")


@dataclass
class _Networks:
    """Draws networks.

    Attributes:
        draw: Hypothesis' choices.
        layers: The layers to choose from, beside activations.
    """

    draw: Draw
    layers: Sequence[str]

    def network(self) -> str:
        count = self.draw(st.integers(1, 2))
        parts = ["nn.Linear(4, 4)"]
        for _ in range(count):
            parts.append(self.activation() if self.draw(st.booleans()) else self.layer(1))
        parts.append("nn.Linear(4, 4)")
        return f"nn.Sequential({', '.join(parts)})"

    def activation(self) -> str:
        return self.draw(st.sampled_from(ACTIVATIONS))

    def layer(self, depth: int) -> str:
        if depth and self.draw(st.integers(0, 3)) == 3:
            around = self.draw(st.sampled_from(AROUND))
            return around.format(a=self.layer(depth - 1), b=self.activation())
        return self.draw(st.sampled_from(tuple(self.layers)))


# The grammar of losses

UNARY = (
    "{a}.sin()", "{a}.tanh()", "{a}.square()", "torch.relu({a})", "{a}.abs()", "{a}.flip(1)",
    "{a}.softmax(1)", "{a}.clamp(-0.5, 0.5)", "{a}.cumsum(1)", "2 * {a}", "{a}.roll(1, 0)",
    "{a} * {a}.amax(1, keepdim=True)", "{a} / (1 + {a}.norm(dim=1, keepdim=True))",
    "{a}.sum(1, keepdim=True).expand(-1, 4)", "{a} - {a}.mean(0)",
    "{a}[:, 0:1] * {a}[:, [3, 1, 1, 0]]",
    "({a}.square() + 0.5).sqrt()", "-{a}", "torch.zeros_like({a}) + {a}[:, 1:2]",
)  # fmt: skip
BINARY = (
    "{a} * {b}", "{a} + {b}", "{a} - 0.5 * {b}", "{a}[:, 0:1] * {b}",
    "torch.where({a} > 1e-6, {a}, {b})",  # a derivative may be zero but for rounding
    "torch.maximum({a}, {b})", "torch.cat([{a}[:, :2], {b}[:, 2:]], 1)", "{a} * {b}.detach()",
    "({a} * {b}).sum(1, keepdim=True) * {a}", "{a} @ {b}.mT @ {b} / 4", "{a} / (1 + {b}.square())",
    "torch.stack([{a}, {b}]).sum(0)",
)  # fmt: skip
SCALAR = (
    "{a}.sum()", "{a}.square().sum()", "{a}.square().mean()", "({a} * {b}).sum()",
    "{a}[:, 0].sum()",
    "({a}.norm(dim=1) - 1).square().sum()", "torch.einsum('bi,bi->', {a}, {b})", "{a}.sin().sum()",
    "{a}[:, 1:3].square().sum()", "{a}.norm()", "(1 + {a}.square().sum(1)).sqrt().mean()",
    "{a}.pow(3).sum()", "nn.functional.mse_loss({a}, {b})", "({a} * {a}.detach()).sum()",
)  # fmt: skip
# of {J}, shape (4, batch, 4)
ROWS = (
    "{J}.sum(0)", "torch.einsum('kbi,bk->bi', {J}, {d})", "torch.einsum('kbk->bk', {J})",
    "({J}.permute(1, 0, 2) @ {d}[..., None])[..., 0]", "{J}[1]",
)  # fmt: skip
# of {H}, shape (batch, 4, 4)
BLOCKS = (
    "{H}.diagonal(dim1=1, dim2=2)", "({H} @ {d}[..., None])[..., 0]", "{H}.sum(1)",
    "torch.einsum('bij,bj->bi', {H}, {d})", "{H}[:, 0]",
    "{d} * torch.einsum('bii->b', {H})[:, None]",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A way to write a derivative, as an expression.

    Attributes:
        text: With ``{S}``, a scalar and ``{F}``, a field, of the point ``{z}``; ``{e}`` the point's
            value and ``{d}`` a direction or seed.
        kind: What shape it has: ``field``, ``rows`` (4, batch, 4) or ``blocks`` (batch, 4, 4).
        sampled: Whether the point is one row of shape (4,), under `torch.vmap`.
        order: How many derivatives it takes.
    """

    text: str
    kind: str = "field"
    sampled: bool = False
    order: int = 1


TRANSFORMS = (
    Form("torch.func.grad(lambda {z}: {S})({e})"),
    Form("torch.func.vjp(lambda {z}: {F}, {e})[1]({d})[0]"),
    Form("torch.func.jvp(lambda {z}: {F}, ({e},), ({d},))[1]"),
    Form("torch.func.grad_and_value(lambda {z}: {S})({e})[0]"),
    Form("torch.func.jvp(torch.func.grad(lambda {z}: {S}), ({e},), ({d},))[1]", order=2),
)
BATCHED = (
    Form("torch.func.vmap(torch.func.grad(lambda {z}: {S}))({e})", sampled=True),
    Form("torch.func.vmap(torch.func.grad_and_value(lambda {z}: {S}))({e})[0]", sampled=True),
    Form("torch.func.vmap(torch.func.jacrev(lambda {z}: {F}[0]))({e})", "blocks", True),
    Form("torch.func.vmap(torch.func.jacfwd(lambda {z}: {F}[0]))({e})", "blocks", True),
    Form("torch.func.vmap(torch.func.hessian(lambda {z}: {S}))({e})", "blocks", True, 2),
    Form(
        "torch.func.vmap(torch.func.jacrev(torch.func.grad(lambda {z}: {S})))({e})",
        "blocks", True, 2,
    ),
    Form("torch.func.jacrev(lambda {z}: {F}.sum(0))({e})", "rows"),
    Form("torch.func.jacfwd(lambda {z}: {F}.sum(0))({e})", "rows"),
    Form(
        "torch.func.vmap(lambda a, b: torch.func.jvp(lambda {z}: {F}[0], (a,), (b,))[1])({e}, {d})",
        sampled=True,
    ),
)  # fmt: skip
FUNCTIONAL = (
    Form("torch.autograd.functional.vjp(lambda {z}: {F}, {e}, {d}, create_graph=True)[1]"),
    Form("torch.autograd.functional.jvp(lambda {z}: {F}, {e}, {d}, create_graph=True)[1]", order=2),
    Form("torch.autograd.functional.hvp(lambda {z}: {S}, {e}, {d}, create_graph=True)[1]", order=2),
    Form("torch.autograd.functional.vhp(lambda {z}: {S}, {e}, {d}, create_graph=True)[1]", order=2),
    Form(
        "torch.autograd.functional.jacobian(lambda {z}: {F}.sum(0), {e}, create_graph=True)",
        "rows",
    ),
    Form(
        "torch.autograd.functional.jacobian("
        "lambda {z}: {F}.sum(0), {e}, create_graph=True, vectorize=True)",
        "rows",
    ),
    Form(
        "torch.einsum('bicj,cj->bi', torch.autograd.functional.hessian("
        "lambda {z}: {S}, {e}, create_graph=True), {d})",
        order=2,
    ),
)


@dataclass(frozen=True)
class Term:
    """An expression, and the variables whose gradient it carries; ``net`` stands for the
    parameters."""

    text: str
    points: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Scope:
    """What an expression may read.

    Attributes:
        fields: Variables of shape (batch, 4), the latest last.
        depth: How many lambdas are around.
        order: How many derivatives more there may be.
    """

    fields: tuple[Term, ...]
    depth: int
    order: int


class _Writer:
    """Writes the body of a loss, one statement at a time."""

    def __init__(self, draw: Draw, forms: Sequence[Form], statements: Sequence[str]) -> None:
        self.draw, self.forms, self.statements = draw, tuple(forms), tuple(statements)
        self.lines: list[str] = []
        self.scalars: list[Term] = []
        self.names = {"p": 0, "g": 0, "v": 0}
        self.calls = 5
        self.order: dict[str, int] = {}

    # choices

    def one(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(tuple(options)))

    def chance(self, percent: int) -> bool:
        """Whether to do something; not, as an example shrinks."""
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def fresh(self, letter: str) -> str:
        count = self.names[letter]
        self.names[letter] += 1
        return f"{letter}{count}"

    # expressions

    def field(self, scope: Scope, size: int) -> Term:
        """Write an expression of shape (batch, 4)."""
        if size <= 0:
            return self.one(tuple(reversed(scope.fields)))
        kind = self.draw(st.integers(0, 9))
        if kind <= 3 and self.calls:
            self.calls -= 1
            inner = self.field(scope, size - 2)
            return Term(f"net({inner.text})", inner.points | {"net"})
        if kind == 9 and self.forms and scope.order and scope.depth < 3:
            return self.derivative(scope, size)
        if kind >= 7:
            return self.made(
                self.one(BINARY), a=self.field(scope, size - 2), b=self.field(scope, 0)
            )
        if kind >= 5:
            return self.made(self.one(UNARY), a=self.field(scope, size - 1))
        return self.one(tuple(reversed(scope.fields)))

    def network_of(self, scope: Scope) -> Term:
        """Write a value of the network: what derivatives are usually taken of."""
        if not self.calls:
            return self.field(scope, 1)
        self.calls -= 1
        inner = scope.fields[-1] if self.chance(70) else self.field(scope, 1)
        value = Term(f"net({inner.text})", inner.points | {"net"})
        if self.chance(30):
            value = self.made(self.one(UNARY), a=value)
        if self.chance(30):
            value = self.made(self.one(BINARY), a=value, b=self.field(scope, 1))
        return value

    def scalar(self, scope: Scope, of: Term) -> Term:
        return self.made(self.one(SCALAR), a=of, b=self.field(scope, 1))

    def made(self, template: str, **parts: Term) -> Term:
        used = {name: part for name, part in parts.items() if "{" + name + "}" in template}
        points = frozenset[str]().union(*(part.points for part in used.values()))
        texts = {name: _factor(part.text) for name, part in used.items()}
        return Term(template.format(**texts), points)

    def derivative(self, scope: Scope, size: int) -> Term:
        """Write a derivative as an expression."""
        allowed = [f for f in self.forms if f.order <= scope.order]
        if not allowed:
            return self.field(scope, size - 1)
        form: Form = self.one(allowed)
        point, direction = self.field(scope, size - 3), self.field(scope, 0)
        name = f"z{scope.depth}"
        z = Term(f"{name}[None]" if form.sampled else name, frozenset({name}))
        inner = Scope(
            (z,) if form.sampled else (*scope.fields, z),
            scope.depth + 1,
            scope.order - form.order,
        )
        body = self.network_of(inner)
        if name not in body.points:
            body = Term(f"({body.text}) * {z.text}", body.points | {name})
        parts = {"F": f"({body.text})", "z": name, "e": point.text, "d": direction.text}
        points = body.points
        if "{S}" in form.text:
            scalar = self.scalar(inner, body)
            parts["S"], points = scalar.text, scalar.points
        text = form.text.format(**parts)
        points = (points - {name}) | point.points | direction.points
        if form.kind != "field":
            text = self.one(ROWS if form.kind == "rows" else BLOCKS).format(
                J=text, H=text, d=_factor(direction.text)
            )
        return Term(text, points)

    # statements

    def body(self, grad: bool) -> tuple[str, ...]:
        x = Term("x", frozenset({"x"}) if grad else frozenset())
        fields = [Term("y"), x]
        for _ in range(self.draw(st.integers(1, 3))):
            scope = Scope(tuple(fields), 0, 3)
            fields += getattr(self, self.one(self.statements))(scope)
        scope = Scope(tuple(fields), 0, 0)
        ends = [self.scalar(scope, fields[-1])]
        for _ in range(self.draw(st.integers(0, 2))):
            ends.append(self.scalar(scope, self.field(scope, 2)))
        terms = [*(s.text for s in self.scalars), *(end.text for end in ends)]
        return (*self.lines, f"return {' + '.join(terms)}")

    def assign(self, letter: str, value: Term) -> list[Term]:
        name = self.fresh(letter)
        self.lines.append(f"{name} = {value.text}")
        points = value.points | {name} if value.points else value.points
        return [Term(name, points)]

    def value(self, scope: Scope) -> list[Term]:
        return self.assign("v", self.field(scope, 3))

    def expression(self, scope: Scope) -> list[Term]:
        """A derivative written as one expression."""
        return self.assign("g", self.derivative(scope, 3))

    def constant(self, scope: Scope) -> list[Term]:
        name = self.fresh("v")
        self.lines += ["with torch.no_grad():", f"    {name} = {self.field(scope, 2).text}"]
        return [Term(name)]

    def written(self, scope: Scope) -> list[Term]:
        """A value that is changed in place."""
        name, first, second = self.fresh("v"), self.field(scope, 1), self.field(scope, 2)
        how = self.one(("{n} += {b}", "{n}[:, 0] *= {b}[:, 1]", "{n}[:, 1:] = {b}[:, :3]"))
        self.lines += [
            f"{name} = torch.zeros_like(x) + {first.text}",
            how.format(n=name, b=_factor(second.text)),
        ]
        points = first.points | second.points
        return [Term(name, points | {name} if points else points)]

    def leaf(self, scope: Scope) -> list[Term]:
        name, source = self.fresh("p"), self.one(tuple(reversed(scope.fields)))
        how = self.one(
            ("{a}.detach().requires_grad_()", "{a}.detach().clone().requires_grad_(True)")
        )
        self.lines.append(f"{name} = {how.format(a=source.text)}")
        return [Term(name, frozenset({name}))]

    def gradient(self, scope: Scope) -> list[Term]:
        """`torch.autograd.grad` at a variable, or at two."""
        grown: list[Term] = []
        if not any(self.places(f) for f in scope.fields) or self.chance(40):
            grown = self.leaf(scope)
            scope = replace(scope, fields=(*scope.fields, *grown))
        if max((self.order.get(f.text, 0) for f in scope.fields), default=0) >= 3:
            return grown
        output = self.network_of(scope)
        points = sorted(output.points - {"net"})
        if not points:
            place = next(f for f in reversed(scope.fields) if self.places(f))
            output = Term(f"({output.text}) * {place.text}", output.points | place.points)
            points = sorted(output.points - {"net"})
        at = [self.one(tuple(reversed(points)))]
        if len(points) > 1 and self.chance(30):
            at.append(self.one(tuple(p for p in points if p != at[0])))
        keep = "retain_graph=True" if self.chance(10) else "create_graph=True"
        if self.chance(50):
            keep += ", allow_unused=True, materialize_grads=True"
        order = 1 + max(self.order.get(p, 0) for p in output.points)
        names = [self.fresh("g") for _ in at]
        places = at[0] if len(at) == 1 else f"({', '.join(at)})"
        left = f"{', '.join(names)}{',' if len(at) == 1 else ''}"
        seed = self.field(scope, 1)
        kind = self.draw(st.integers(0, 9))
        if kind <= 6:
            end = self.scalar(scope, output)
            self.lines.append(f"{left} = torch.autograd.grad({end.text}, {places}, {keep})")
            reached = output.points | end.points
        elif kind <= 8:
            self.lines.append(
                f"{left} = torch.autograd.grad({output.text}, {places}, {seed.text}, {keep})"
            )
            reached = output.points | seed.points
        else:
            eye = "torch.eye(4, dtype=x.dtype), is_grads_batched=True"
            self.lines.append(
                f"{left} = torch.autograd.grad(({output.text}).sum(0), {places}, {eye}, {keep})"
            )
            for name in names:
                rows = self.one(ROWS).format(J=name, d=_factor(seed.text))
                self.lines.append(f"{name} = {rows}")
            reached = output.points | seed.points
        if "create_graph" not in keep:
            return [*grown, *(Term(name) for name in names)]
        self.order.update(dict.fromkeys(names, order))
        return [*grown, *(Term(name, reached | {name}) for name in names)]

    def places(self, variable: Term) -> frozenset[str]:
        return variable.points - {"net"}

    def parameters(self, scope: Scope) -> list[Term]:
        """The gradient in the parameters, squared."""
        output = self.scalar(scope, self.network_of(scope))
        if "net" not in output.points:
            return []
        name = self.fresh("g")
        self.lines += [
            f"{name} = torch.autograd.grad({output.text}, [q for q in net.parameters() if "
            "q.requires_grad], create_graph=True, allow_unused=True, materialize_grads=True)"
        ]
        self.scalars.append(Term(f"sum(q.square().sum() for q in {name})"))
        return []


def _factor(text: str) -> str:
    """Put an expression in brackets where an operator may follow."""
    return text if text.replace(".", "a").replace("_", "a").isalnum() else f"({text})"


@dataclass(frozen=True)
class Family:
    """A kind of programs.

    Attributes:
        layers: The layers of its networks.
        forms: The derivatives that it writes as expressions.
        statements: The statements of its losses, by the names of `_Writer`'s methods.
        dtypes: The types it computes in.
        strategies: The strategies that it asks for.
        is_around: Whether the network is decorated, and the loss is eager code around it.
    """

    layers: Sequence[str]
    forms: Sequence[Form] = ()
    statements: Sequence[str] = ()
    dtypes: Sequence[str] = ("float64",)
    strategies: Sequence[str] = ("auto",)
    is_around: bool = False


_PLAIN = ("value", "constant", "written")
FAMILIES = {
    "autograd": Family(
        (*LAYERS, *WRITERS, *DRAWERS),
        statements=("gradient", "gradient", "gradient", "leaf", *_PLAIN, "parameters"),
    ),
    "transforms": Family(
        (*LAYERS, *DRAWERS), TRANSFORMS, ("expression", "expression", "expression", *_PLAIN)
    ),
    "batched": Family(LAYERS, (*TRANSFORMS, *BATCHED), ("expression", "expression", *_PLAIN)),
    "functional": Family(
        (*LAYERS, *DRAWERS), FUNCTIONAL, ("expression", "expression", "gradient", *_PLAIN)
    ),
    "mixed": Family(
        LAYERS, (*TRANSFORMS, *BATCHED), ("gradient", "expression", "gradient", *_PLAIN, "leaf")
    ),
    "narrow": Family(
        (*LAYERS, *WRITERS), statements=("gradient", "gradient", "value"), dtypes=("float32",)
    ),
    "forced": Family(
        (*LAYERS, *WRITERS, *DRAWERS),
        statements=("gradient", "gradient", "leaf", "value", "parameters"),
        strategies=("jvp_over_gradient", "reverse", "as written"),
    ),
    "around": Family(
        (*LAYERS, *WRITERS),
        (*TRANSFORMS, *BATCHED),
        ("gradient", "expression", "gradient", *_PLAIN, "parameters"),
        is_around=True,
    ),
}


@st.composite
def programs(draw: Draw, family: str) -> Program:
    """Draw a program of a family."""
    kind = FAMILIES[family]
    net = _Networks(draw, kind.layers).network()
    grad = draw(st.booleans())
    writer = _Writer(draw, kind.forms, kind.statements)
    lines = writer.body(grad)
    strategy = draw(st.sampled_from(tuple(kind.strategies)))
    options: list[tuple[str, Any]] = [] if strategy == "auto" else [("strategy", strategy)]
    if kind.is_around:
        options.append(("is_around", True))
    if kind.forms is FUNCTIONAL:
        options.append(("absent_is_zero", True))
    then = draw(st.sampled_from((None, None, None, None, None, None, None, 5)))
    if then is not None and draw(st.booleans()):
        options.append(("dynamic", True))
    return Program(
        net,
        lines,
        batch=draw(st.sampled_from((3, 3, 3, 2, 1, 0))),
        dtype=draw(st.sampled_from(tuple(kind.dtypes))),
        training=draw(st.sampled_from((True, True, False))),
        grad=grad,
        options=tuple(options),
        then=then,
    )
