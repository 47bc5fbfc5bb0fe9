"""Modules with host state, and the ways in which libraries copy modules, for random programs."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, stateless
from torch.optim.swa_utils import AveragedModel


class Around(nn.Module):
    """A layer around another; those below keep state on the host."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Counting(Around):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class Scheduled(Around):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 0.9 * self.scale
        return self.scale * self.inner(x)


class Alternating(Around):
    turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        return self.inner(x) if self.turn % 2 else self.inner(x).sin()


class Switching(Around):
    mode = "plain"

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.mode == "sine":
            self.mode = "plain"
            return y.sin()
        self.mode = "sine"
        return y


class Listing(Around):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        return self.inner(x)


class Naming(Around):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.seen: dict[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        name = f"width {x.shape[1]}"
        self.seen[name] = self.seen.get(name, 0) + 1
        return self.inner(x)


class Buffered(Around):
    """Counts in a buffer, in place, and averages what it has seen."""

    steps: Tensor
    mean: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.training:
            with torch.no_grad():
                self.steps.add_(1)
                self.mean.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return y - self.mean


class Spectral(nn.Module):
    """A Fourier layer with complex weights for the lowest modes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.view_as_real(torch.randn(2, dtype=torch.complex128)))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x, dim=1)
        kept = torch.zeros_like(modes)
        kept[:, :2] = modes[:, :2] * torch.view_as_complex(self.weight).to(modes.dtype)
        return torch.fft.irfft(kept, n=x.shape[1], dim=1)


class ComplexLinear(nn.Module):
    """A complex linear map of the first two columns as real parts, the last two as imaginary."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(2, 2, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.complex(x[:, :2], x[:, 2:]) @ self.weight
        return torch.cat([z.real, z.imag], 1)


# Copies: each takes a module and the weights it is to compute with, by name.

Weights = Mapping[str, Tensor]


def by_dict(net: nn.Module, weights: Weights, kind: type | None = None) -> Any:
    """A functional clone: another object with the same ``__dict__``, down the tree."""
    clone = object.__new__(kind or type(net))
    clone.__dict__.update(net.__dict__)
    clone.__dict__["_parameters"] = dict(net._parameters)
    clone.__dict__["_modules"] = dict(net._modules)
    for name in net._parameters:
        if name in weights:
            clone.__dict__["_parameters"][name] = weights[name]
    for name, child in net._modules.items():
        below = {n[len(name) + 1 :]: w for n, w in weights.items() if n.startswith(name + ".")}
        if child is not None:
            clone.__dict__["_modules"][name] = by_dict(child, below)
    return clone


def by_subclass(net: nn.Module, weights: Weights) -> Any:
    """The same, of a class that is made for it."""
    return by_dict(net, weights, type("Clone", (type(net),), {}))


def by_attributes(net: nn.Module, weights: Weights) -> Any:
    """A deep copy, whose parameters become plain attributes (monkey-patched fast weights)."""
    clone = copy.deepcopy(net)
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        owner = clone.get_submodule(path)
        del owner._parameters[leaf]
        setattr(owner, leaf, weight)
    return clone


def by_copy(net: nn.Module, weights: Weights) -> Any:
    """`copy.copy` of the module and of what it calls."""
    clone: Any = copy.copy(net)
    clone._parameters = {n: weights.get(n, p) for n, p in net._parameters.items()}
    clone._modules = {
        name: by_copy(
            child,
            {n[len(name) + 1 :]: w for n, w in weights.items() if n.startswith(name + ".")},
        )
        for name, child in net._modules.items()
        if child is not None
    }
    return clone


def by_call(net: nn.Module, weights: Weights) -> Callable[[Tensor], Tensor]:
    return lambda x: functional_call(net, dict(weights), (x,))


def by_stateless(net: nn.Module, weights: Weights) -> Callable[[Tensor], Tensor]:
    return lambda x: stateless.functional_call(net, dict(weights), (x,))


def by_deep_copy(net: nn.Module, weights: Weights) -> Any:
    """A deep copy with values of its own: no gradient reaches the module."""
    clone = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            parameter.copy_(weights.get(name, parameter))
    return clone


# What may be done to a module between two calls.


class Scale(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * x


def parametrized(net: nn.Module) -> None:
    first = next(m for m in net.modules() if isinstance(m, nn.Linear))
    if not parametrize.is_parametrized(first):
        parametrize.register_parametrization(first, "weight", Scale())


def of_another_class(net: nn.Module) -> None:
    above: Any = type(net)

    def forward(self: Any, x: Tensor) -> Tensor:
        return 0.5 * above.forward(self, x)

    kind = type("Halved", (type(net),), {"forward": forward})
    net.__class__ = kind


def with_its_own_forward(net: nn.Module) -> None:
    before = type(net).forward
    net.forward = types.MethodType(lambda self, x: before(self, x) + x, net)  # pyright: ignore


def averaged(net: nn.Module) -> nn.Module:
    return AveragedModel(net)


def stepped(net: nn.Module) -> None:
    """One step of gradient descent."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad


def reloaded(net: nn.Module) -> None:
    net.load_state_dict({name: 0.9 * x for name, x in net.state_dict().items()})
