"""Modules with state of their own: hooks, parametrizations, attention, embeddings, sharing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, jacfwd, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from rewriter import NestedGradientWarning, optimize_nested
from tests.cases import with_written_norms
from tests.oracle import assert_same, check, outcome

D = torch.float64


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = grad(u.square().sum(), p, create_graph=True)
    return g.square().sum() + u.mean()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def points(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape or (4, 3), dtype=D)


# parametrizations


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_parametrized(training: bool) -> None:
    """The vectors of a power iteration are buffers; they end where eager's do."""
    torch.manual_seed(0)
    net = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(3, 5)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(5, 4)),
        nn.SiLU(),
        parametrizations.orthogonal(nn.Linear(4, 2)),
    ).double()
    check(penalty, [net.train(training)], points())


@pytest.mark.parametrize("strategy", ["auto", "reverse", "as written"])
def test_gradient_in_parameters_of_weight_norm(strategy: str) -> None:
    """PyTorch's own second derivative with respect to the direction is wrong."""
    torch.manual_seed(0)
    layers = parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)
    net, x = nn.Sequential(*layers).double(), torch.randn(5, 3, dtype=torch.float64)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        grads = grad(net(x).square().sum(), list(net.parameters()), create_graph=True)
        return sum((g.square().sum() for g in grads), torch.zeros(()))

    reference = with_written_norms(copy.deepcopy(net))
    check(loss, [net], x, reference=[reference], strategy=strategy)


def test_old_spectral_norm() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 1))
    net.double()(points())
    with torch.no_grad():
        net[0].weight = net[0].weight.detach()  # what cannot be copied
    check(penalty, [net], points())


# attention


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        found, weights = self.layer(x, x.sin(), x)
        return found if weights is None else found * weights.sum()


@pytest.mark.parametrize(
    ("make", "training"),
    [
        (lambda: Attention(dropout=0.3, batch_first=True), True),
        (lambda: Attention(add_bias_kv=True, bias=False), False),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), False),
        (
            lambda: nn.TransformerEncoderLayer(
                4, 2, 8, dropout=0.3, norm_first=True, activation="gelu"
            ),
            True,
        ),
    ],
    ids=["attention-train", "bias_kv-eval", "encoder-eval", "norm_first-train"],
)
def test_attention(make: Callable[[], nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    check(penalty, [make().double().train(training)], points(2, 3, 4))


# embeddings


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(6, 3, **options)
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        kinds = torch.tensor([[0, 1], [2, 2], [5, 3], [1, 4]])
        return self.net(x * self.bags(kinds)).tanh()


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag(mode: str) -> None:
    torch.manual_seed(0)
    check(penalty, [Bags(mode=mode).double()], points())


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.words(torch.tensor([0, 2, 2, 5]))).sin()


@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    report = check(penalty, [Words(**options).double()], points()).explain(
        Words(**options).double(), points()
    )
    assert report.sites[0].strategy == "jvp_over_gradient"  # the table is no point


class Sentence(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 3, **options)
        self.last = nn.Linear(3, 1)

    def forward(self, positions: Tensor) -> Tensor:
        return self.last(self.words(positions).tanh()).sum()


def hessian_vector(net: nn.Module, positions: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(positions).square(), net.words.weight, create_graph=True)
    (product,) = torch.autograd.grad(g.sum(), net.words.weight, create_graph=True)
    return product.square().sum()


def jacobian_norm(net: nn.Module, positions: Tensor) -> Tensor:
    parameters = dict(net.named_parameters())

    def output(parameters: dict[str, Tensor], sentence: Tensor) -> Tensor:
        return functional_call(net, parameters, (sentence,)).square()

    per_sample = vmap(jacfwd(output), (None, 0))(parameters, positions)
    return sum(part.square().sum() for part in per_sample.values())


@pytest.mark.parametrize("loss", [hessian_vector, jacobian_norm])
@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_table_that_moves(loss: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Of a padding row PyTorch's forward mode computes what its reverse mode leaves out."""
    torch.manual_seed(0)
    net = Sentence(**options).double()
    with torch.no_grad():
        net.words.weight[2] = 0.7
    positions = torch.tensor([[0, 2, 2, 5], [1, 2, 0, 0]])
    report = check(loss, [net], positions).explain(net, positions)
    strategies = {site.strategy for site in report.sites}
    assert strategies.isdisjoint({"jvp_over_gradient", "contraction", "taylor"})


# hooks


def test_hooks_that_change_values() -> None:
    net = mlp()
    net[0].register_forward_hook(lambda module, inputs, output: output * 2)
    net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    net[2].register_forward_hook(
        lambda module, inputs, kwargs, output: output.sin(), with_kwargs=True
    )
    check(penalty, [net], points())


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.inner.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner(x.sin())


def test_hook_that_counts_in_a_buffer() -> None:
    net = Counter()
    loss = optimize_nested(penalty, backend="eager")
    for calls in (2, 4, 6):
        loss(net, points()).backward()
        assert net.calls == calls


def test_hook_that_counts_in_python() -> None:
    """A Python number that a hook changes guards nothing forever: each call counts."""
    net, counts = mlp(), {"calls": 0}

    def count(*_: Any) -> None:
        counts["calls"] += 1

    net.register_forward_hook(count)
    loss = optimize_nested(penalty, backend="eager")
    for calls in (1, 2, 3):
        loss(net, points()).backward()
        assert counts["calls"] == calls


def test_backward_hook_fires_as_in_eager() -> None:
    def fired(loss: Callable[..., Tensor]) -> tuple[int, list[Tensor]]:
        net, seen = mlp(), []
        net[0].register_full_backward_hook(lambda module, g_in, g_out: seen.append(1))
        loss(net, points()).backward()
        return len(seen), [p.grad for p in net.parameters()]

    expected = fired(penalty)
    with pytest.warns(NestedGradientWarning, match="runs as written"):
        mine = fired(optimize_nested(penalty, backend="eager"))
    assert mine[0] == expected[0] > 0
    for ours, theirs in zip(mine[1], expected[1], strict=True):
        assert torch.equal(ours, theirs)


# sharing and freezing


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_shared_parameter() -> None:
    torch.manual_seed(0)
    check(penalty, [Tied().double()], points())


def test_one_network_passed_twice() -> None:
    net = mlp()
    loss = optimize_nested(lambda a, b, x: penalty(a, x) * penalty(b, x), backend="eager")
    loss(net, net, points()).backward()
    mine = [p.grad for p in net.parameters()]
    net.zero_grad()
    (penalty(net, points()) ** 2).backward()
    for ours, p in zip(mine, net.parameters(), strict=True):
        assert torch.allclose(ours, p.grad, rtol=1e-9)


def test_frozen_layer() -> None:
    net = mlp()
    net[0].requires_grad_(False)
    check(penalty, [net], points())


def eval_then_train(net: nn.Module, x: Tensor) -> Tensor:
    net.eval()
    first = penalty(net, x)
    net.train()
    return first + penalty(net, x)


def test_train_and_eval_inside() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Tanh(), nn.Linear(4, 1)).double()
    check(eval_then_train, [net], points())


def test_statistics_read_before_they_are_written() -> None:
    """By finite differences: the pullback of the layer in eval mode needs the statistics it read.
    Eager's takes those that the later call in train mode has written, without a word (2.13)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()

    def moved(step: float) -> float:
        other = copy.deepcopy(net)
        with torch.no_grad():
            other[0].weight[0, 0] += step
        return eval_then_train(other, points()).item()

    difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
    mine = outcome(optimize_nested(eval_then_train, backend="eager"), [net], (points(),), {})
    stock = outcome(eval_then_train, [net], (points(),), {})
    assert abs(mine.grads["0.0.weight"][0, 0].item() - difference) < 1e-6
    assert abs(stock.grads["0.0.weight"][0, 0].item() - difference) > 1e-3


def test_modes_alternate() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Tanh(), nn.Linear(4, 1)).double()
    loss = optimize_nested(penalty, backend="eager")
    for training in (True, False, True, False):
        net.train(training)
        expected = outcome(penalty, [net], (points(),), {})
        assert_same(outcome(loss, [net], (points(),), {}), expected)
    assert len(loss.steps) == 2


# numbers


def test_complex_network() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return ((x.to(self.weight.dtype) @ self.weight) * 1j).exp().abs()

    torch.manual_seed(0)
    check(penalty, [Wave()], points())


# checkpoints


@pytest.mark.parametrize("preserve", [True, False])
def test_checkpoint_with_dropout(preserve: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 2)).double()
    if not preserve:
        net.eval()

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        part = lambda z: checkpoint(  # noqa: E731
            net, z, use_reentrant=False, preserve_rng_state=preserve
        )
        return penalty(part, x)

    check(loss, [net], points())


def test_copy_of_a_network_after_use() -> None:
    net, loss = mlp(), optimize_nested(penalty, backend="eager")
    loss(net, points()).backward()
    other = copy.deepcopy(net)
    other.zero_grad()
    with torch.no_grad():
        other[0].weight.mul_(2)
    expected = outcome(penalty, [other], (points(),), {})
    assert_same(outcome(loss, [other], (points(),), {}), expected)
