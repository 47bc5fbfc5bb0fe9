"""State that is updated in place: the same tensor with a new value, for all who hold it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from rewriter import optimize_nested
from tests.oracle import relative_error
from tests.rewriter.test_binding import penalty, picky

D = torch.float64


class Counting(nn.Module):
    """Buffers updated in every way, one of them replaced."""

    u: Tensor
    v: Tensor
    steps: Tensor
    new: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2, dtype=D)
        self.register_buffer("u", torch.tensor([1.0, 2.0, 3.0], dtype=D))
        self.register_buffer("v", torch.ones(3, dtype=D))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("new", torch.ones(3, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        self.u *= 0.5
        self.steps += 1
        with torch.no_grad():
            self.v = F.normalize(self.u + self.v, dim=0, out=self.v)
        self.new = self.new * 2
        return self.net(x * self.u * self.v + self.new).tanh() * self.steps


def normed(make: Callable[..., Any], layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(make(layer()), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()

    return network


def linear() -> nn.Module:
    return nn.Linear(4, 6)


def convolution() -> nn.Module:
    return nn.Conv1d(2, 3, 2, padding=1)


NETWORKS = {
    "counting": (Counting, (5, 3)),
    "linear": (normed(parametrizations.spectral_norm, linear), (5, 2, 4)),
    "convolution": (normed(parametrizations.spectral_norm, convolution), (5, 2, 3)),
    "linear, by hooks": (normed(spectral_norm, linear), (5, 2, 4)),
}


def plain(f: Any) -> Any:
    return f


def decorated(f: Any) -> Any:
    return optimize_nested(f, backend="eager")


def train(net: nn.Module, loss: Any, x: Tensor) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return all that a `state_dict` holds that was taken before, and which of it is still what the
    module has."""
    held = net.state_dict(keep_vars=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for step in range(3):
        optimizer.zero_grad()
        with torch.set_grad_enabled(step != 1):
            value = loss(net, x)
        if value.requires_grad:
            value.backward()
            optimizer.step()
    now = net.state_dict(keep_vars=True)
    return held | {f"now {name}": x for name, x in now.items()}, {
        n: now[n] is held[n] for n in held
    }


@pytest.mark.filterwarnings("ignore:picky runs as written", "ignore:.*weight_norm:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("loss", "of_loss", "of_net"),
    [(penalty, decorated, plain), (picky, decorated, plain), (penalty, plain, decorated)],
    ids=["loss", "by layer", "module"],
)
def test_in_place(network: str, loss: Any, of_loss: Any, of_net: Any) -> None:
    make, shape = NETWORKS[network]
    x = torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=D).view(shape)
    net = make()
    expected, kept = train(copy.deepcopy(net), grad_on(loss), x)
    fast = of_net(net)
    mine, also_kept = train(fast, grad_on(of_loss(loss)), x)
    assert also_kept == kept
    for name, value in expected.items():
        assert relative_error(mine[name], value) < 1e-9, name


def grad_on(loss: Any) -> Any:
    """The loss has derivatives inside, for which gradients are on where eager needs them."""

    def call(net: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return loss(net, x)
        return net(x).sum()

    return call


def test_what_has_a_history_is_another_tensor() -> None:
    """A buffer that is multiplied by a parameter carries its gradient."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, dtype=D) * 1.5)
            self.register_buffer("u", torch.ones(3, dtype=D))

        def forward(self, x: Tensor) -> Tensor:
            self.u = self.u.detach().clone().mul_(self.weight)
            return (x * self.u).sum()

    nets = Scaled(), Scaled()
    x = torch.ones(2, 3, dtype=D)
    optimize_nested(nets[0], backend="eager")
    for net in nets:
        for _ in range(2):
            (net(x) + net.get_buffer("u").square().sum()).backward()
    assert relative_error(nets[0].weight.grad, nets[1].weight.grad) < 1e-12


def test_an_argument_is_returned() -> None:
    """A function that updates and returns its argument."""

    def loss(state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        state = state.add_(1)
        return state, (weight * state).sum()

    state, weight = torch.zeros(3, dtype=D), torch.ones(3, dtype=D, requires_grad=True)
    for turn in (1.0, 2.0):
        found, value = decorated(loss)(state, weight)
        assert found is state and value.item() == 3 * turn
