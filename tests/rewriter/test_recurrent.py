"""Recurrent layers inside of an inner derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rewriter import optimize_nested
from tests.oracle import assert_same, check, outcome

D = torch.float64


def penalty(net: nn.Module, x: Tensor, *state: Any) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p, *state)
    (g,) = grad(u.sum(), p, create_graph=True)
    return g.square().sum() + u.square().mean()


class Readout(nn.Module):
    """A recurrent layer, its outputs and its last state."""

    def __init__(self, kind: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = kind(3, 4, **options)
        wide = 8 if options.get("bidirectional") else 4
        self.readout = nn.Linear(options.get("proj_size", 0) or wide, 1)

    def forward(self, x: Tensor, *state: Any) -> Tensor:
        outputs, last = self.layer(x, *state)
        hidden = last[0] if isinstance(last, tuple) else last
        return self.readout(outputs).sum((0, 1)) + hidden.square().sum()


def make(kind: Callable[..., nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Readout(kind, **options).double()


def points(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=D)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.RNN, {"batch_first": True}),
        (nn.LSTM, {"batch_first": True}),
        (nn.GRU, {}),
        (nn.GRU, {"num_layers": 2, "dropout": 0.5}),
        (nn.RNN, {"num_layers": 2, "dropout": 0.5, "bidirectional": True, "bias": False}),
        (nn.LSTM, {"proj_size": 2}),
        (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "dropout": 0.5}),
    ],
    ids=lambda item: item.__name__ if isinstance(item, type) else "-".join(item) or "plain",
)
def test_layer(kind: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    check(penalty, [make(kind, **options)], points(2, 2, 3))


@pytest.mark.parametrize("strategy", ["as written", "reverse", "jvp_over_gradient"])
def test_dropout_in_every_form(strategy: str) -> None:
    """PyTorch's decomposition has no dropout."""
    check(penalty, [make(nn.LSTM, num_layers=2, dropout=0.5)], points(2, 2, 3), strategy=strategy)


def test_eval() -> None:
    check(penalty, [make(nn.RNN, num_layers=2, dropout=0.5).eval()], points(2, 2, 3))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=lambda k: k.__name__)
def test_initial_state(kind: Callable[..., nn.Module]) -> None:
    """The state is differentiated by the outer gradient."""
    state = points(1, 2, 4).cos().requires_grad_()

    def loss(net: nn.Module, x: Tensor, h: Tensor) -> Tensor:
        return penalty(net, x, (h, h.sin()) if kind is nn.LSTM else h)

    check(loss, [make(kind)], points(2, 2, 3), state)


def test_unbatched() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0].square()

    torch.manual_seed(0)
    check(penalty, [Single().double()], points(2, 3))


class Cells(nn.Module):
    """Three cells, called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(3, 4), nn.GRUCell(3, 4), nn.RNNCell(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        h = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for step in x:
            state = self.lstm(step, state)
            h = self.rnn(self.gru(step, h), state[0])
        return h


def test_cells() -> None:
    torch.manual_seed(0)
    check(penalty, [Cells().double()], points(2, 2, 3))


def test_under_func() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: net(z).sum())(x).square().sum()

    check(loss, [make(nn.GRU, batch_first=True)], points(2, 2, 3))


def test_packed_sequence() -> None:
    """Captured or as written: right."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, [2, 1], batch_first=True)
            return pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].square()

    torch.manual_seed(0)
    net, x = Packed().double(), points(2, 2, 3)
    expected = outcome(penalty, [net], (x,), {})
    decorated = optimize_nested(penalty, backend="eager")
    with pytest.warns(Warning, match="runs as written"):
        assert_same(outcome(decorated, [net], (x,), {}), expected)
