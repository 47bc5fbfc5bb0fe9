"""Run the examples at tiny sizes, and check the exact solution that judges one of them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# The examples are scripts: each finds the helper beside it because its folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import burgers
import critic
import layers
import side_by_side

TINY = ["--backend", "eager", "--rounds", "2", "--seed", "1"]
BURGERS = [*TINY, "--points", "32", "--steps", "6"]
CRITIC = [*TINY, "--batch", "8", "--steps", "4"]


@pytest.fixture(autouse=True)
def clean_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run in a folder of its own, and leave torch's random generator and caches as they were."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("main", "arguments", "picture"),
    [
        pytest.param(burgers.main, BURGERS, "burgers.png", id="burgers"),
        pytest.param(burgers.main, [*BURGERS, "--optimizer", "lbfgs"], "burgers.png", id="lbfgs"),
        pytest.param(critic.main, [*CRITIC, "--out", "digits.png"], "digits.png", id="critic"),
    ],
)
def test_example_runs(main, arguments: list[str], picture: str, capsys) -> None:
    main(arguments)
    printed = capsys.readouterr().out
    for words in ("as written (eager)", "torch.compile", "optimize_nested", f"picture: {picture}"):
        assert words in printed
    if main is burgers.main:
        assert "relative L2 error against the exact solution" in printed
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_layers_run(capsys) -> None:
    layers.main(["--backend", "eager", "--rounds", "2"])
    printed = capsys.readouterr().out
    for words in ("as written (eager)", "optimize_nested(net)", "force matching", "difference"):
        assert words in printed
    assert "did not compile" not in printed


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_training_lowers_the_loss(method: str) -> None:
    torch.manual_seed(0)
    net, data = burgers.make_network(width=8, depth=2), burgers.make_points(64)
    history = burgers.train(net, burgers.loss.as_written, data, method, steps=40)
    assert len(history) >= 40
    assert min(history[-5:]) < 0.8 * history[0]


def test_exact_solution_satisfies_the_equation() -> None:
    """Central differences of second order, at positions outside the shock at x = 0."""
    u, h = burgers.exact_solution, 1e-4
    x = np.concatenate([np.linspace(-0.97, -0.1, 30), np.linspace(0.1, 0.97, 30)])[:, None]
    t = np.linspace(0.05, 0.95, 19)
    u_t = (u(x, t + h) - u(x, t - h)) / (2 * h)
    u_x = (u(x + h, t) - u(x - h, t)) / (2 * h)
    u_xx = (u(x + h, t) - 2 * u(x, t) + u(x - h, t)) / h**2
    residual = u_t + u(x, t) * u_x - burgers.VISCOSITY * u_xx
    assert np.abs(residual).max() < 1e-5 * np.abs(u_t).max()


def test_exact_solution_has_the_known_steepest_slope() -> None:
    """The slope at x = 0 is largest, 152.00516, at πt = 1.6037 (Basdevant et al., 1986)."""
    h = 1e-6
    times = np.array([1.55, 1.6037, 1.65]) / math.pi
    slopes = (burgers.exact_solution(-h, times) - burgers.exact_solution(h, times)) / (2 * h)
    assert slopes[1] == pytest.approx(152.00516, abs=1e-5)
    assert slopes.argmax() == 1


def test_exact_solution_meets_its_conditions() -> None:
    x, t = np.linspace(-1, 1, 41), np.linspace(0, 1, 21)
    assert burgers.exact_solution(x, 0.0) == pytest.approx(-np.sin(math.pi * x), abs=1e-12)
    assert burgers.exact_solution(np.array([[-1.0], [1.0]]), t) == pytest.approx(0.0, abs=1e-12)
    odd = burgers.exact_solution(x[:, None], t) + burgers.exact_solution(-x[:, None], t)
    assert odd == pytest.approx(0.0, abs=1e-12)
    assert burgers.check_exact_solution() < 1e-9


def test_contenders_agree_on_the_gradient() -> None:
    sample = critic.draw_batch(critic.load_images(), critic.make_generator(width=4), batch=4)
    network = critic.make_critic(width=4)
    inputs = list(network.parameters())
    eager = side_by_side.as_written(critic.critic_loss.as_written, inputs)
    ours = critic.optimize_nested(critic.critic_loss.as_written, backend="eager")
    rewritten = side_by_side.optimized(ours, inputs)
    for contender in (eager, rewritten):
        contender.first_step(network, *sample)
        assert not contender.refusal
    torch.testing.assert_close(rewritten.gradients, eager.gradients, rtol=1e-4, atol=1e-5)


def test_a_refusal_stands_in_the_place_of_a_time(capsys) -> None:
    weight = torch.ones(2, requires_grad=True)

    def refused() -> torch.Tensor:
        raise RuntimeError("cannot trace this\nand much more")

    contenders = [
        side_by_side.as_written(weight.sum, [weight]),
        side_by_side.Contender("refused", refused, [weight]),
    ]
    for contender in contenders:
        contender.first_step()
    side_by_side.measure(contenders, rounds=2)
    side_by_side.print_comparison("title", contenders)
    printed = capsys.readouterr().out
    assert "refused did not compile: RuntimeError: cannot trace this" in printed
    assert "much more" not in printed
    assert contenders[1].seconds == []
