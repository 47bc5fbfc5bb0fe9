"""Random losses around host code: copied modules, counters, recordings, mixed and complex types.

A program is a module with ``make()``, ``loss(net, x, y)`` and ``between(net, call)``. It is loaded
twice, once to run as written and once decorated; both make the same calls, one after the other,
with steps of an optimiser and other changes between them. After each call value, types, gradients,
buffers, what the modules and the program keep on the host, and all random streams must agree.
"""

from __future__ import annotations

import contextlib
import linecache
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from passes import work
from rewriter import optimize_nested
from tests.oracle import relative_error
from tests.programs import Discarded, IllConditioned

Draw = Callable[[st.SearchStrategy[Any]], Any]

CALLS = 3
# How far a number may be from eager's, by the coarsest type in the program.
TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 6e-2}

_HEADER = """\
import copy
import math
import random
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from tests.blocks import *
from tests.host_blocks import *

COUNT = {"calls": 0, "scale": 1.0}
CACHE = {}
"""


@dataclass(frozen=True)
class HostProgram:
    """A loss, its network, and what happens between its calls.

    Attributes:
        net: The network, an expression.
        lines: The body of ``loss(net, x, y)``.
        between: The body of ``between(net, call)``.
        types: The types of ``x`` and ``y``.
        coarsest: The type that decides how near numbers must be.
        options: Options of the decorator.
        is_around: Whether the network is decorated in place of the loss.
    """

    net: str
    lines: tuple[str, ...]
    between: tuple[str, ...] = ("pass",)
    types: tuple[str, str] = ("float64", "float64")
    coarsest: str = "float64"
    options: tuple[tuple[str, Any], ...] = ()
    is_around: bool = False

    @property
    def source(self) -> str:
        body, after = ("\n".join(f"    {x}" for x in part) for part in (self.lines, self.between))
        return (
            f"{_HEADER}\n\ndef make():\n    return {self.net}\n\n\n"
            f"def loss(net, x, y):\n{body}\n\n\ndef between(net, call):\n{after}\n"
        )

    def __repr__(self) -> str:
        fields = ("net", "lines", "between", "types", "coarsest", "options", "is_around")
        shown = ",\n    ".join(f"{f}={getattr(self, f)!r}" for f in fields)
        return (
            f"\n# {'# '.join(self.source.splitlines(True))}\n"
            "from tests.host_programs import HostProgram, run\n\n"
            f"run(HostProgram(\n    {shown},\n))\n"
        )


@dataclass
class _Side:
    """A program as it was loaded, with its own network and its own random streams."""

    scope: dict[str, Any]
    net: nn.Module
    loss: Callable[..., Any]
    streams: tuple[Any, ...]

    def call(self, args: tuple[Tensor, ...]) -> Tensor:
        """Call the loss, and ``backward()``, from this side's random streams."""
        self.net.zero_grad()
        _set_streams(self.streams)
        value = self.loss(self.net, *args)
        if value.requires_grad:
            value.backward()
        self.streams = _streams()
        return value.detach()

    def host(self) -> dict[str, Any]:
        """Return what is kept on the host: by the modules, and by the program."""
        kept = {
            f"{path}.{name}": item
            for path, module in self.net.named_modules()
            for name, item in vars(module).items()
            if not name.startswith("_") and _is_plain(item)
        }
        return kept | {f"COUNT.{name}": item for name, item in self.scope["COUNT"].items()}


def _is_plain(item: Any) -> bool:
    if isinstance(item, (list, tuple)):
        return all(map(_is_plain, item))
    if isinstance(item, dict):
        return all(map(_is_plain, [*item, *item.values()]))
    return isinstance(item, (int, float, str))


def _streams() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_streams(streams: tuple[Any, ...]) -> None:
    torch.set_rng_state(streams[0])
    np.random.set_state(streams[1])
    random.setstate(streams[2])


@contextlib.contextmanager
def _loaded(program: HostProgram, name: str) -> Iterator[_Side]:
    """Load a program under a module's name; nothing of it stays."""
    file = f"<{name} {id(program)}>"
    source = program.source
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    module = sys.modules[name] = types.ModuleType(name)
    before = _streams()
    try:
        exec(compile(source, file, "exec"), module.__dict__)
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        net = module.make()
        yield _Side(module.__dict__, net, module.loss, _streams())
    finally:
        _set_streams(before)
        del linecache.cache[file], sys.modules[name]


def run(program: HostProgram) -> bool:
    """Compare a program, decorated, with itself as written; return whether it was captured whole.

    Raises:
        AssertionError: Something differs.
        Discarded: There is nothing to compare.
    """
    refused: list[str] = []
    with (
        _loaded(program, "plain_program") as plain,
        _loaded(program, "decorated_program") as mine,
        mock.patch.object(work, "_PER_CALL", 0.0),  # a tower for everything
    ):
        options = {"backend": "eager", **dict(program.options)}
        if program.is_around:
            mine.net = optimize_nested(mine.net, **options)
        else:
            mine.loss = optimize_nested(mine.loss, **options)
        for call in range(CALLS):
            args = _arguments(program, call)
            theirs = _eager(plain, args)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                value = mine.call(_copies(args))
            messages = [str(warning.message) for warning in said]
            for message in messages:
                faults = ("internal error", "Please report")
                assert not any(fault in message for fault in faults), message
            refused += [m for m in messages if "runs as written" in m or "by layer" in m]
            try:
                _compare(program, call, (plain, theirs), (mine, value))
            except AssertionError as difference:
                _refuse_if_ill_conditioned(program, call, difference)
                raise
            plain.scope["between"](plain.net, call)
            mine.scope["between"](mine.net, call)
    return not refused


def _refuse_if_ill_conditioned(program: HostProgram, last: int, difference: AssertionError) -> None:
    """Run the program as written twice, the second time on data that differ by rounding: if it
    changes by a part of what is allowed, its own numbers say nothing.

    Raises:
        IllConditioned: It does.
    """
    with _loaded(program, "program_again") as plain, _loaded(program, "program_moved") as moved:
        for call in range(last):
            _eager(plain, _arguments(program, call))
            _eager(moved, _moved(program, call))
            plain.scope["between"](plain.net, call)
            moved.scope["between"](moved.net, call)
        values = _eager(plain, _arguments(program, last)), _eager(moved, _moved(program, last))
        try:
            _compare(program, last, (plain, values[0]), (moved, values[1]), 0.05)
        except AssertionError as own:
            raise IllConditioned(f"ill-conditioned: {own}") from difference


def _moved(program: HostProgram, call: int) -> tuple[Tensor, ...]:
    """A call's arguments, moved in their last places."""
    ulp = 4 * torch.finfo(getattr(torch, program.coarsest)).eps
    generator = torch.Generator().manual_seed(call)
    return tuple(
        (x.double() * (1 + ulp * torch.randn(x.shape, generator=generator))).to(x.dtype)
        if x.is_floating_point()
        else x
        for x in _arguments(program, call)
    )


def _arguments(program: HostProgram, call: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7 + call)
    return tuple(
        torch.randn(3, 4, generator=generator, dtype=torch.float64).mul(2).to(getattr(torch, kind))
        if kind != "bool"
        else torch.randn(3, 4, generator=generator) > 0
        for kind in program.types
    )


def _copies(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in args)


def _eager(side: _Side, args: tuple[Tensor, ...]) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = side.call(_copies(args))
    except Exception as error:  # whatever it is, there is nothing to compare with
        raise Discarded(f"eager: {(str(error) or repr(error)).splitlines()[0]}") from error
    numbers = [value, *(p.grad for p in side.net.parameters() if p.grad is not None)]
    if not all(x.isfinite().all() and (not x.numel() or x.abs().max() < 1e6) for x in numbers):
        raise Discarded("not finite")
    return value


def _compare(
    program: HostProgram,
    call: int,
    plain: tuple[_Side, Tensor],
    mine: tuple[_Side, Tensor],
    part: float = 1.0,
) -> None:
    """Compare what a call left behind, to a part of the tolerance.

    Raises:
        AssertionError: Something differs.
    """
    (theirs, right), (ours, value) = plain, mine
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {"value": (value, right)}
    gradients = dict(ours.net.named_parameters())
    buffers = dict(ours.net.named_buffers())
    for name, parameter in theirs.net.named_parameters():
        pairs[f"gradient of {name}"] = (gradients[name].grad, parameter.grad)
    for name, buffer in theirs.net.named_buffers():
        pairs[f"buffer {name}"] = (buffers[name], buffer)
    sizes = [g.abs().max().item() for _, g in pairs.values() if g is not None and g.numel()]
    tolerance = part * TOLERANCE[program.coarsest]
    floor = (1e-5 if program.coarsest == "float64" else 0.1) * max(sizes, default=0.0)
    for name, (found, expected) in pairs.items():
        if found is None and expected is not None and not expected.any():
            continue
        if expected is None and found is not None and not found.any():
            continue
        error = relative_error(found, expected, floor)
        assert error <= tolerance, f"call {call}, {name}: {error:.3g}, {found}, {expected}"
        if found is not None and expected is not None:
            assert found.dtype is expected.dtype, f"call {call}, {name}: {found.dtype}"
    assert ours.host() == theirs.host(), f"call {call}: {ours.host()}, {theirs.host()}"
    same = torch.equal(ours.streams[0], theirs.streams[0])
    assert same, f"call {call}: torch's generator ends elsewhere"
    left, other = ours.streams[1], theirs.streams[1]
    same = np.array_equal(left[1], other[1]) and left[2:] == other[2:]
    assert same, f"call {call}: NumPy's generator ends elsewhere"
    assert ours.streams[2] == theirs.streams[2], f"call {call}: random ends elsewhere"


# The grammar

NETS = (
    "nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()",
    "nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4), nn.Softmax(1)).double()",
    "nn.Sequential(Residual(nn.Linear(4, 4)), nn.GELU(), Beside(nn.Linear(4, 4), nn.Tanh()))"
    ".double()",
    "nn.Sequential(nn.Linear(4, 4), Twice(nn.Sequential(nn.Linear(4, 4), nn.Softplus()))).double()",
    "nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 4)).double()",
    "nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()",
    "nn.Sequential(Attention(), nn.Tanh(), nn.Linear(4, 4)).double()",
)
# A gradient ``g`` of something, shape (3, 4).
GRADIENTS = (
    ("x = x.detach().requires_grad_()",
     "(g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)"),
    ("x = x.clone().requires_grad_(True)", "u = net(x)",
     "(g,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)"),
    ("g = grad(lambda z: net(z).sin().sum())(x)",),
    ("g = jvp(net, (x,), (torch.cos(x),))[1]",),
    ("x.requires_grad_()", "u = net(x)",
     "(g,) = torch.autograd.grad((u * u.detach()).sum(), x, create_graph=True)",
     "g = g + 0.1 * u"),
)  # fmt: skip
BRANCHES = (
    ("if not bool(torch.isfinite(g).all()):", "    return g.sum()"),
    ("if torch.any(torch.isnan(g)):", "    g = torch.zeros_like(g)"),
    ("if float(g.detach().norm()) > 1e5:", "    g = g / 2"),
    ("n = int((g.detach() > 0).sum())", "g = g * (1.0 if n >= 0 else 2.0)"),
    ("assert g.detach().numpy().shape == (3, 4)",),
)
INNER = (
    "weights = dict(net.named_parameters())",
    "slopes = torch.autograd.grad(net(x).square().mean() + (net(x) - y).square().sum(), "
    "list(weights.values()), create_graph=True, allow_unused=True)",
    "fast = {n: w - 0.1 * (torch.zeros_like(w) if s is None else s) "
    "for (n, w), s in zip(weights.items(), slopes)}",
)
COPIES = (
    "by_dict", "by_subclass", "by_attributes", "by_copy", "by_call", "by_stateless", "by_deep_copy",
)  # fmt: skip
ENDS = (
    ("return (clone(y) - g).square().mean()",),
    ("return clone(x).square().mean() + net(y).sin().mean() + g.square().mean()",),
    (
        "z = y.detach().requires_grad_()",
        "(h,) = torch.autograd.grad(clone(z).sin().sum(), z, create_graph=True)",
        "return (h * g).sum() + h.square().mean()",
    ),
    ("return (clone(net(x)) * g).mean() + clone(y).square().sum()",),
)
AFTERWARDS = (
    ("stepped(net)",),
    ("stepped(net)",),
    ("reloaded(net)",),
    ("if call == 0:", "    parametrized(net)", "stepped(net)"),
    ("if call == 0:", "    of_another_class(net)"),
    ("if call == 0:", "    with_its_own_forward(net)"),
    ("net.train(call % 2 == 1)",),
    ("copy.deepcopy(net)(torch.randn(3, 4, dtype=torch.float64))", "stepped(net)"),
    ("averaged(net)(torch.randn(3, 4, dtype=torch.float64)).sum().backward()",),
)
KEEPERS = ("Counting", "Scheduled", "Alternating", "Switching", "Listing", "Naming", "Buffered")
HOST_STATE = (
    ("COUNT['calls'] += 1",),
    ("COUNT['scale'] *= 0.5", "g = COUNT['scale'] * g"),
    ("COUNT['calls'] += 1", "g = g / COUNT['calls']"),
    ("net.lam = getattr(net, 'lam', 1.0) * 0.7", "g = g + net.lam * y"),
    ("net.epoch = getattr(net, 'epoch', 0) + 1", "g = g * (net.epoch > 1) + y"),
    ("net.names = [*getattr(net, 'names', []), 'call']", "g = g * len(net.names)"),
    ("net.kind = 'odd' if getattr(net, 'kind', 'even') == 'even' else 'even'",
     "g = g.sin() if net.kind == 'odd' else g"),
)  # fmt: skip
HOST_CODE = (
    ("scale = float(np.prod(x.shape))", "g = g / scale"),
    ("points = np.polynomial.legendre.leggauss(4)[0]", "g = g * torch.from_numpy(points).to(g)"),
    ("if 'mask' not in CACHE:", "    CACHE['mask'] = torch.eye(4, dtype=torch.float64)[:3]",
     "g = g * CACHE['mask']"),
    ("half = torch.tensor(0.5).item()", "g = half * g"),
    ("class Inside:", "    factor = 3", "g = Inside.factor * g"),
    ("g = sum((0.5**i * g.roll(i, 1) for i in range(g.shape[1])), torch.zeros_like(g))",),
    ("noise = torch.randn_like(x)", "g = g + 0.1 * noise * net(x + noise)"),
    ("noise = torch.from_numpy(np.random.randn(3, 4))", "g = g * noise"),
    ("g = g * random.random()",),
    ("g = torch.stack([row * (i + 1) for i, row in enumerate(g)])",),
    ("kept = torch.zeros_like(g)", "kept[:, 1:3] = g[:, :2]", "g = kept + g"),
)  # fmt: skip
NUMBERS = (
    "2", "0.3", "True", "np.float64(0.7)", "np.int64(3)", "torch.tensor(2)", "torch.tensor(0.5)",
    "torch.tensor(0.25, dtype=torch.float64)", "torch.tensor(True)", "math.pi", "int(3)", "-1",
    "torch.tensor(1.5, dtype=torch.bfloat16)", "len(CACHE)", "x.shape[0]", "1 / 3",
)  # fmt: skip
PROMOTIONS = (
    "g = g * {c}", "g = {c} + g", "g = g / ({c} + 1)", "g = {c} - g", "g = g + y",
    "g = torch.where(y > 0, g, {c})", "g = g * (y > 0)", "g = torch.cat([g, y.to(torch.float32)])",
    "g = g ** 2 * {c}", "g = g.to(torch.float64)", "g = g.float() + {c}", "g = g.to(y.dtype) + g",
    "g = torch.maximum(g, torch.zeros_like(g)) + {c}", "g = g + torch.arange(4)",
    "g = g * torch.ones(4, dtype=torch.int32)", "g = torch.stack([g, g * {c}]).sum(0)",
    "g = g.sum() * {c} + g", "g = torch.add(g, g, alpha=2)", "g = g.clamp(-{f}, {f})",
    "g = torch.result_type(g, y) and g", "g = torch.lerp(g, g.sin(), 0.3)", "g = g.type_as(x)",
    "g = torch.full_like(g, {f}) * g", "g = torch.mean(g, 1, keepdim=True, dtype=torch.float64)",
)  # fmt: skip
TYPED_NETS = (
    "nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))",
    "nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4), nn.Softmax(1))",
    "nn.Sequential(Residual(nn.Linear(4, 4)), nn.GELU(), nn.Linear(4, 4))",
)
COMPLEX_NETS = (
    "nn.Sequential(nn.Linear(4, 4), Spectral(), nn.Tanh(), nn.Linear(4, 4)).double()",
    "nn.Sequential(Spectral(), nn.GELU(), Spectral()).double()",
    "nn.Sequential(nn.Linear(4, 4).double(), ComplexLinear(), nn.Tanh())",
    "nn.Sequential(nn.Linear(4, 4).double(), nn.Tanh())",
)
COMPLEX = (
    (
        "z = torch.fft.rfft(g, dim=1)",
        "g = g + torch.fft.irfft(z * 1j * torch.arange(3), n=4, dim=1)",
    ),
    ("z = torch.complex(g, y)", "g = (z * z.conj()).real + z.imag"),
    ("z = torch.complex(g, y)", "g = z.abs() * z.angle().cos()"),
    ("z = torch.fft.fft(g, dim=1)", "g = z.abs().square() / 4"),
    (
        "z = torch.view_as_complex(g.reshape(3, 2, 2))",
        "g = torch.view_as_real(z * z).reshape(3, 4)",
    ),
    (
        "z = torch.fft.fft2(g)",
        "k = torch.zeros_like(z)",
        "k[:2, :2] = z[:2, :2]",
        "g = torch.fft.ifft2(k).real",
    ),
    ("z = torch.polar(g.square() + 0.1, y)", "g = z.real + (z ** 2).imag"),
    ("z = g + 1j * y", "g = torch.einsum('bi,bj->bij', z, z.conj()).sum(2).real"),
    ("z = (g + 0j).exp()", "g = z.real + z.mH.mT.imag"),
    ("z = torch.complex(g, y)", "g = torch.linalg.vector_norm(z, dim=1, keepdim=True) * g"),
    (
        "window = torch.ones(4, dtype=g.dtype)",
        "z = torch.stft(g.flatten(), 4, 2, window=window, return_complex=True)",
        "g = g + z.abs().square().mean()",
    ),
    ("z = torch.complex(g, y)", "g = torch.where(z.real > 0, z, z.conj()).imag + g"),
    ("z = torch.complex(g, y)", "g = (z / (1 + z.abs())).real * z.sgn().imag"),
)
COMPLEX_GRADIENTS = (
    *GRADIENTS[:4],
    ("x = x.detach().requires_grad_()", "z = torch.complex(net(x), x)",
     "(g,) = torch.autograd.grad((z * z.conj()).real.sum() + z.imag.sin().sum(), x, "
     "create_graph=True)"),
    ("z = torch.complex(x, y).detach().requires_grad_()",
     "(w,) = torch.autograd.grad((net(z.real) * net(z.imag)).sum(), z, create_graph=True)",
     "g = w.real + 2 * w.imag"),
)  # fmt: skip
LAST = ("return g.square().mean()", "return (g * net(x)).sum()", "return g.sin().sum() + g.norm()")


def _one(draw: Draw, options: Any) -> Any:
    return draw(st.sampled_from(tuple(options)))


def _lines(*parts: Any) -> tuple[str, ...]:
    """Join statements: a string is one, which may have several lines."""
    found: list[str] = []
    for part in parts:
        found += [part] if isinstance(part, str) else list(part)
    return tuple(found)


def _verify(draw: Draw) -> tuple[str, bool]:
    return ("verify", _one(draw, (False, False, True)))


def _copies_program(draw: Draw) -> HostProgram:
    """A loss that cannot be captured whole, with fast weights in a copy of its network."""
    is_around = _one(draw, (False, False, True))
    lines = _lines(
        _one(draw, GRADIENTS[:3]),
        () if is_around and draw(st.booleans()) else _one(draw, BRANCHES),
        INNER,
        f"clone = {_one(draw, COPIES)}(net, fast)",
        _one(draw, ENDS),
    )
    # No third derivatives of norm layers: PyTorch's are wrong.
    nets = [net for net in NETS if "Norm" not in net]
    options = (_verify(draw),)
    if is_around:
        options = (*options, ("strategy", "jvp_over_gradient"))
    return HostProgram(
        _one(draw, nets), lines, _one(draw, AFTERWARDS), options=options, is_around=is_around,
    )  # fmt: skip


def _counters_program(draw: Draw) -> HostProgram:
    """Numbers, strings and lists on modules and in globals that change from call to call."""
    net = _one(draw, NETS)
    keeper = _one(draw, KEEPERS)
    net = f"{keeper}({net}).double()"
    lines = _lines(
        _one(draw, GRADIENTS),
        _one(draw, HOST_STATE) if draw(st.booleans()) else (),
        _one(draw, BRANCHES) if draw(st.booleans()) else (),
        _one(draw, HOST_STATE) if draw(st.booleans()) else (),
        _one(draw, LAST),
    )
    return HostProgram(net, lines, _one(draw, AFTERWARDS[:3]), options=(_verify(draw),))


def _recordings_program(draw: Draw) -> HostProgram:
    """Host code whose outcome depends on no value, recorded."""
    lines = _lines(
        _one(draw, GRADIENTS[:4]),
        _one(draw, HOST_CODE),
        _one(draw, HOST_CODE) if draw(st.booleans()) else (),
        _one(draw, LAST),
    )
    options = (_verify(draw), ("capture", "trace"))
    return HostProgram(_one(draw, NETS), lines, _one(draw, AFTERWARDS[:3]), options=options)


def _types_program(draw: Draw) -> HostProgram:
    """Networks, data and numbers of types that differ."""
    kind = _one(draw, ("float32", "float32", "float64", "bfloat16"))
    other = _one(draw, ("float32", "float64", "bfloat16", "int64", "int32", "bool"))
    net = f"{_one(draw, TYPED_NETS)}.to(torch.{kind})"
    steps = [
        _one(draw, PROMOTIONS).format(c=_one(draw, NUMBERS), f=_one(draw, ("1", "0.5", "2.0")))
        for _ in range(draw(st.integers(1, 3)))
    ]
    lines = _lines(
        _one(draw, GRADIENTS[:4]),
        _one(draw, BRANCHES[:4]) if _one(draw, (False, False, True)) else (),
        steps,
        _one(draw, ("return g.square().mean()", "return g.sin().sum()", "return (g * g).sum()")),
    )
    coarsest = "bfloat16" if "bfloat16" in (kind, other, *_words(lines)) else "float32"
    return HostProgram(
        net, lines, _one(draw, AFTERWARDS[:2]), types=(kind, other), coarsest=coarsest,
        options=(_verify(draw),),
    )  # fmt: skip


def _words(lines: tuple[str, ...]) -> list[str]:
    return " ".join(lines).replace(")", " ").replace(".", " ").split()


def _complex_program(draw: Draw) -> HostProgram:
    """Spectra, complex weights, complex points."""
    lines = _lines(
        _one(draw, COMPLEX_GRADIENTS),
        _one(draw, BRANCHES[:4]) if _one(draw, (False, False, True)) else (),
        _one(draw, COMPLEX),
        _one(draw, COMPLEX) if draw(st.booleans()) else (),
        _one(draw, LAST),
    )
    options = (_verify(draw),)
    if _one(draw, (False, False, True)):
        options = (*options, ("capture", "trace"))
    return HostProgram(
        _one(draw, COMPLEX_NETS), lines, _one(draw, AFTERWARDS[:3]), options=options,
    )  # fmt: skip


HOST_FAMILIES: dict[str, Callable[[Draw], HostProgram]] = {
    "copies": _copies_program,
    "counters": _counters_program,
    "recordings": _recordings_program,
    "types": _types_program,
    "complex": _complex_program,
}


@st.composite
def host_programs(draw: Draw, family: str) -> HostProgram:
    """Draw a program of a family."""
    return HOST_FAMILIES[family](draw)
