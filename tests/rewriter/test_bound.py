"""A decorated method is used as any bound method is."""

import copy
import inspect
import pickle
import pydoc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from tests.oracle import relative_error


class Trainer:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.scale = 2.0

    @optimize_nested(backend="eager", strict=True)
    def loss(self, x: Tensor, weight: float = 1.0) -> Tensor:
        """Penalise the gradient."""
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return weight * self.scale * g.square().mean()


class Decorated(Trainer):
    @optimize_nested(backend="eager", strict=True)
    def loss(self, x: Tensor, weight: float = 1.0) -> Tensor:
        return 2 * super().loss(x, weight)


class Plain(Trainer):
    def loss(self, x: Tensor, weight: float = 1.0) -> Tensor:
        return 3 * super().loss(x, weight)


class Renamed(Trainer):
    penalty = Trainer.loss


X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)


def written(trainer: Any) -> Tensor:
    return Trainer.loss.as_written(trainer, X).detach()


def test_equality_and_hash() -> None:
    one, other = Trainer(), Trainer()
    assert one.loss == one.loss and hash(one.loss) == hash(one.loss)
    assert one.loss != other.loss and one.loss != Trainer.loss and one.loss != 3
    assert len({one.loss, one.loss, other.loss}) == 2


def test_attributes() -> None:
    trainer = Trainer()
    bound: Any = trainer.loss
    assert bound.__self__ is trainer and bound.__func__ is Trainer.loss
    assert bound.__name__ == "loss" and bound.__qualname__ == "Trainer.loss"
    assert bound.__wrapped__ is Trainer.loss.as_written
    assert bound.steps is Trainer.loss.steps and bound.options.strict
    assert relative_error(bound.as_written(X).detach(), written(trainer)) == 0
    assert repr(bound).startswith("<bound optimize_nested Trainer.loss of <")
    with pytest.raises(AttributeError, match="nothing"):
        _ = bound.nothing


def test_signatures() -> None:
    assert list(inspect.signature(Trainer.loss).parameters) == ["self", "x", "weight"]
    assert list(inspect.signature(Trainer().loss).parameters) == ["x", "weight"]
    module = optimize_nested(nn.Sequential(nn.Linear(2, 1)), backend="eager")
    assert list(inspect.signature(module.forward).parameters) == ["input"]


def test_help() -> None:
    for given in (Trainer.loss, Trainer().loss):
        shown = pydoc.render_doc(given, renderer=pydoc.plaintext)
        assert "weight: float = 1.0" in shown and "Penalise the gradient." in shown
        assert "OptimizedLoss in module" not in shown.splitlines()[2]


def test_pickle() -> None:
    trainer = Trainer()
    again = pickle.loads(pickle.dumps({"trainer": trainer, "loss": trainer.loss}))
    assert again["loss"].__self__ is again["trainer"]
    assert again["loss"] == again["trainer"].loss != trainer.loss


def test_copies() -> None:
    """What is bound to an object is bound to the object's copy, and trains that one's network."""
    trainer: Any = Trainer()
    trainer.kept = trainer.loss
    trainer.own = optimize_nested(trainer.loss, backend="eager")
    twin = copy.deepcopy(trainer)
    for made in (twin.loss, twin.kept, twin.own):
        twin.net.zero_grad()
        made(X).backward()
        assert all(p.grad is None for p in trainer.net.parameters())
        assert twin.net[0].weight.grad is not None
    with torch.no_grad():
        twin.net[0].weight.mul_(2)
    assert relative_error(twin.own(X).detach(), written(twin)) < 1e-12
    assert relative_error(trainer.own(X).detach(), written(trainer)) < 1e-12
    assert copy.copy(trainer.loss) == trainer.loss
    assert copy.deepcopy(trainer.loss).__self__ is not trainer
    assert copy.deepcopy(Trainer.loss) is Trainer.loss


@pytest.mark.parametrize(("kind", "factor"), [(Decorated, 2), (Plain, 3), (Renamed, 1)])
def test_inheritance(kind: type[Trainer], factor: int) -> None:
    """`super().loss()` is captured too, decorated or not; another name of a method works."""
    trainer = kind()
    loss = trainer.penalty if isinstance(trainer, Renamed) else trainer.loss
    for scale in (2.0, 3.0, 3.5):
        trainer.scale = scale
        assert relative_error(loss(X).detach(), factor * written(trainer)) < 1e-12
    if kind is Decorated:
        assert Decorated.loss.steps and not Decorated.loss.refusals


def test_value_and_grad_of_an_overriding_method() -> None:
    value, grads = Decorated().loss.value_and_grad(X)
    assert set(grads) == {"self.net.0.weight", "self.net.0.bias", "self.net.2.weight"}
    assert value.shape == ()
