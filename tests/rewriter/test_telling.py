"""What a loss tells people: after the graph, in its order, with the graph's values."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from tests.several_calls import check_calls

grad = torch.autograd.grad
LOGGER = logging.getLogger("optimize_nested.tests.telling")
METRICS: dict[str, Any] = {}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def points(seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, dtype=torch.float64, generator=source)


def penalty(net: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    x = x.detach().requires_grad_()
    (g,) = grad(net(x).sum(), x, create_graph=True)
    loss = g.square().mean()
    return loss, loss.detach().item()


def inner(value: float, **options: Any) -> None:
    print("inner", round(1.5), value * 0 + 2, **options)


def printing(net: nn.Module, x: Tensor) -> Tensor:
    loss, value = penalty(net, x)
    print(f"loss {value:.3e}, {value!r:.4} of {len(x)}", end=";")
    print("%.3f and %d" % (value, 7), x.shape, [x.dim()], sep="|")  # noqa: UP031
    inner(value)
    inner(value, file=sys.stdout)
    print("{:.2f} {}".format(value, "end"))
    print((x > 0).sum().item())
    return loss


def writing(net: nn.Module, x: Tensor) -> Tensor:
    loss, value = penalty(net, x)
    sys.stdout.write("loss %.3f\n" % value)  # noqa: UP031
    sys.stdout.flush()
    sys.stderr.write("to the other\n")
    return loss


@pytest.mark.parametrize("loss", [printing, writing])
def test_printed(loss: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    made, model = optimize_nested(loss, backend="eager", strict=True, verify=False), net()
    for i in range(3):
        loss(model, points(i))
        expected = capsys.readouterr()
        made(model, points(i)).backward()
        found = capsys.readouterr()
        assert expected.out and (found.out, found.err) == (expected.out, expected.err)
    assert len(made.steps) == 1


def test_logged(caplog: pytest.LogCaptureFixture) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        loss, value = penalty(net, x)
        LOGGER.info("loss %.4f", value)
        LOGGER.debug("never %s", value)
        LOGGER.warning(f"at {value:.2f}")
        return loss

    caplog.set_level(logging.INFO, LOGGER.name)
    made, model = optimize_nested(loss, backend="eager", strict=True), net()
    for i in range(3):
        loss(model, points(i))
        expected = caplog.messages
        caplog.clear()
        made(model, points(i)).backward()
        assert expected and caplog.messages == expected
        caplog.clear()
    assert len(made.steps) == 1


def test_nothing_is_told_twice_by_a_call_that_takes_another_branch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        loss, _ = penalty(net, x)
        print("before")
        if x.detach().sum() > 0:
            raise ValueError("positive")
        print("after")
        return loss

    made, model = optimize_nested(loss, backend="eager", strict=True), net()
    made(model, -points(0).abs())
    assert capsys.readouterr().out == "before\nafter\n"
    with pytest.raises(ValueError, match="positive"):
        made(model, points(0).abs())
    assert capsys.readouterr().out == "before\n"


def counting(net: nn.Module, x: Tensor) -> Tensor:
    loss, value = penalty(net, x)
    METRICS.update(loss=value, hits=(x > 0).sum().item(), rate=(x > 0).sum().item() / len(x))
    METRICS["calls"] = METRICS.get("calls", 0) + 1
    METRICS["array"] = x.sum(0).numpy()
    return loss


def test_metrics_are_pythons_numbers() -> None:
    made, model, kept = optimize_nested(counting, backend="eager", strict=True), net(), []
    for form in (counting, made):
        METRICS.clear()
        for i in range(4):
            form(model, points(i))
            kept.append(dict(METRICS))
    for mine, expected in zip(kept[4:], kept[:4], strict=True):
        assert [type(mine[name]) for name in expected] == [type(x) for x in expected.values()]
        assert mine["hits"] == expected["hits"] and mine["rate"] == expected["rate"]
        assert mine["calls"] == expected["calls"]
        np.testing.assert_allclose(mine["array"], expected["array"])
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-12)


def test_clocks(capsys: pytest.CaptureFixture[str]) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        start = time.time()
        loss, _ = penalty(net, x)
        print(start, time.perf_counter() - time.perf_counter() <= 0, time.time() - start < 100)
        return loss

    made, model = optimize_nested(loss, backend="eager", strict=True), net()
    for _ in range(2):
        begun = time.time()
        made(model, points(1)).backward()
        start, *found = capsys.readouterr().out.split()
        assert begun <= float(start) <= time.time() and found == ["True", "True"]


def of_constants(net: nn.Module, x: Tensor) -> Tensor:
    """NumPy on sizes and constants, whose numbers cut a tensor."""
    x = x.detach().requires_grad_()
    (g,) = grad(net(x).sum(), x, create_graph=True)
    ends = np.cumsum([0, 1, len(x) - 1])
    parts = [g[a:b].square().mean() for a, b in zip(ends[:-1], ends[1:])]  # noqa: RUF007, B905
    return parts[0] * 2 + parts[1]


def test_numpy_on_constants_cuts_a_tensor() -> None:
    made = check_calls(of_constants, [net()], [(points(i),) for i in range(3)], strict=True)
    assert len(made.steps) == 1 and made.branching.misses == 0


def test_a_stream_that_is_asked_for_something_is_refused() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        loss, _ = penalty(net, x)
        return loss if sys.stdout.seekable() else loss * 2

    made, model = optimize_nested(loss, backend="eager"), net()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.testing.assert_close(made(model, points(1)), loss(model, points(1)))
    assert "whose result or arguments are needed" in str(said[0].message)
