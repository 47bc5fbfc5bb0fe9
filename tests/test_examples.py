"""Run the examples at tiny sizes; compare their losses with themselves as written; check what
judges them."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

from rewriter import optimize_nested
from rewriter.bench import Contender, measure
from tests.oracle import check, relative_error

# The examples are scripts: each finds the helper beside it because its folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import burgers
import critic
import digits
import flow
import flow_exact
import heat_operator
import kuramoto_sivashinsky
import layers
import maml
import overhead
import poisson
import poisson_10d
import scores
import sharpness
import side_by_side
import study
import training

TINY = ["--backend", "eager", "--rounds", "2", "--seed", "1"]


@pytest.fixture(autouse=True)
def clean_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run in a folder of its own, and leave torch's random generator and caches as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow, "STEPS", 1)
    with torch.random.fork_rng():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        pytest.param(
            burgers.main, ["--points", "32", "--steps", "6"], "relative L2 error", id="burgers"
        ),
        pytest.param(critic.main, ["--batch", "8", "--steps", "4"], "critic", id="critic"),
        pytest.param(poisson.main, ["--points", "16", "--steps", "8"], "L-BFGS", id="poisson"),
        pytest.param(digits.main, ["--batch", "8", "--steps", "3"], "under noise", id="digits"),
        pytest.param(flow.main, ["--batch", "4", "--steps", "2"], "4 points", id="flow"),
        pytest.param(maml.main, ["--tasks", "2", "--steps", "3"], "after one step", id="maml"),
        pytest.param(
            sharpness.main, ["--images", "12", "--steps", "3"], "sharpness at", id="sharpness"
        ),
    ],
)
def test_example_runs(
    main: Callable[..., None], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*TINY, *arguments, "--out", "picture.png"])
    printed = capsys.readouterr().out
    stock = [] if main is poisson.main else ["torch.compile"]
    for words in ("nested derivative", "as written (eager)", *stock, "optimize_nested", said):
        assert words in printed
    assert "picture: picture.png" in printed
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("example", "said"),
    [
        pytest.param(poisson_10d, "rewritten (taylor)", id="poisson_10d"),
        pytest.param(kuramoto_sivashinsky, "rewritten (taylor)", id="kuramoto_sivashinsky"),
        pytest.param(scores, "sliced matching", id="scores"),
        pytest.param(flow_exact, "nats", id="flow_exact", marks=pytest.mark.slow),
        pytest.param(
            heat_operator, "for new functions", id="heat_operator", marks=pytest.mark.slow
        ),
    ],
)
def test_study_runs(
    example: Any, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradients are those as written, in float64: `check` compares them."""
    checked = functools.partial(optimize_nested, check=True)
    monkeypatch.setattr(study, "optimize_nested", checked)
    monkeypatch.setattr(flow_exact, "STEPS", 1)
    monkeypatch.setattr(poisson_10d, "DIM", 2)
    monkeypatch.setattr(poisson_10d, "DIRECTION", poisson_10d.DIRECTION[:2])
    example.STUDY.run([*TINY, "--points", "4", "--steps", "2", "--out", "picture.png"])
    printed = capsys.readouterr().out
    for words in ("as written (eager)", "optimize_nested", "picture: picture.png", said):
        assert words in printed
    assert "did not run" not in printed
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    lines = Path(example.__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 100


def test_front_satisfies_the_equation() -> None:
    points = (8 * torch.rand(9, 2).double() - 4).requires_grad_()

    def slopes(u: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(u.sum(), points, create_graph=True)[0]

    u = kuramoto_sivashinsky.exact_solution(points)
    u_x, u_t = slopes(u).split(1, dim=1)
    u_xx = slopes(u_x)[:, :1]
    residual = u_t + u * u_x + u_xx + slopes(slopes(u_xx)[:, :1])[:, :1]
    assert residual.abs().max() < 1e-12


def test_source_in_ten_dimensions_is_that_of_the_solution() -> None:
    x = poisson_10d.draw_points(5)[0].detach().double()
    found = vmap(hessian(poisson_10d.exact_solution))(x).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(found, poisson_10d.source(x))
    on_sphere = torch.nn.functional.normalize(x.float())
    torch.testing.assert_close(poisson_10d.Ball()(on_sphere), torch.zeros(5), rtol=0, atol=1e-6)


def test_score_is_the_gradient_of_a_density_and_the_data_are_its_samples() -> None:
    x, _ = scores.draw_batch(20_000)
    torch.testing.assert_close(scores.exact_score(x).mean(0), torch.zeros(2), rtol=0, atol=0.1)
    # Stein's identity: the mean of s(x) xᵀ is −1 under the density of which s is the score.
    product = scores.exact_score(x).T @ x / len(x)
    torch.testing.assert_close(product, -torch.eye(2), rtol=0, atol=0.1)


def test_densities_of_the_exact_flow_sum_to_one() -> None:
    torch.manual_seed(0)
    velocity = flow_exact.Velocity(width=8).double()
    x = torch.linspace(-9, 9, 121, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, x, indexing="xy"), dim=-1).flatten(0, 1)
    logs = flow_exact.log_density(velocity, grid, 8), flow_exact.exact_log_density(grid)
    for log in logs:
        assert (log.exp().sum() * (x[1] - x[0]) ** 2).item() == pytest.approx(1, abs=1e-3)


def test_heat_solution_satisfies_the_equation() -> None:
    a, x, t = (torch.rand(n).double() for n in (heat_operator.WAVES, 7, 7))
    u = heat_operator.exact_solution
    u_t = vmap(torch.func.grad(lambda x, t: u(a, x, t), 1))(x, t)
    u_xx = vmap(torch.func.grad(torch.func.grad(lambda x, t: u(a, x, t))))(x, t)
    torch.testing.assert_close(u_t, heat_operator.KAPPA * u_xx)
    net, corners = heat_operator.DeepONet(width=4).double(), torch.tensor([0.0, 1.0]).double()
    start = net(a.expand(7, -1), x, torch.zeros_like(x))
    torch.testing.assert_close(start, u(a, x, 0.0))
    sides = net(a.expand(2, -1), corners, t[:2])
    torch.testing.assert_close(sides, torch.zeros(2).double(), rtol=0, atol=1e-12)


def double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in tensors]


def critic_arguments() -> list[torch.Tensor]:
    generator = critic.make_generator(width=4)
    return double(*critic.draw_batch(critic.load_images(), generator, batch=4))


# loss, network, the other arguments, whether a derivative takes another form than reverse mode
LOSSES: dict[str, tuple[Any, Callable[[], nn.Module], Callable[[], list[torch.Tensor]], bool]] = {
    "burgers": (
        burgers.loss,
        lambda: burgers.make_network(width=8, depth=2),
        lambda: [x.detach().double() for x in burgers.make_points(16)],
        False,
    ),
    "poisson": (
        poisson.loss,
        lambda: poisson.Membrane(width=8),
        lambda: double(torch.rand(12, 2)),
        False,
    ),
    "critic": (critic.critic_loss, lambda: critic.make_critic(width=4), critic_arguments, True),
    "digits": (
        digits.loss,
        lambda: digits.make_classifier(width=16),
        lambda: double(*digits.draw_batch(*digits.load_images(), 6)),
        True,
    ),
    "flow": (
        flow.loss,
        lambda: flow.Velocity(width=8),
        lambda: double(*flow.draw_batch(6)),
        False,  # reverse mode shares more
    ),
    "maml": (
        maml.loss,
        lambda: maml.make_network(width=8),
        lambda: double(*maml.draw_tasks(3)),
        True,
    ),
    "sharpness": (
        sharpness.loss,
        lambda: sharpness.make_classifier(width=8),
        lambda: double(*sharpness.load_images(6)),
        True,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_the_loss_as_written(name: str) -> None:
    """In float64, value and gradients; never at a higher price."""
    torch.manual_seed(0)
    loss, make_network, make_arguments, is_rewritten = LOSSES[name]
    net, arguments = make_network().double(), make_arguments()
    if name == "burgers":
        arguments[0].requires_grad_()
    report = check(loss.as_written, [net], *arguments).explain(net, *arguments)
    assert report.sites
    assert 0 < report.flops <= report.flops_as_written
    if is_rewritten:
        assert "rewritten" in {site.status for site in report.sites}


def test_hessian_vector_product_is_that_as_written() -> None:
    torch.manual_seed(0)
    net = sharpness.make_classifier(width=8).double()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    arguments = (net, parameters, direction, *double(*sharpness.load_images(6)))
    fast = optimize_nested(sharpness.hessian_vector.as_written, backend="eager")
    expected = sharpness.hessian_vector.as_written(*arguments)
    for name, product in fast(*arguments).items():
        assert relative_error(product, expected[name]) <= 1e-9
    report = fast.explain(*arguments)
    assert {site.status for site in report.sites} == {"rewritten"}
    assert report.flops < 0.8 * report.flops_as_written


def test_sharpness_is_the_largest_eigenvalue() -> None:
    torch.manual_seed(0)
    net = sharpness.make_classifier(width=2).double()
    data = double(*sharpness.load_images(20))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(100):  # to where the largest eigenvalue is also that of largest magnitude
        optimizer.zero_grad()
        sharpness.usual_loss(net, *data).backward()
        optimizer.step()
    start = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    found, _ = sharpness.sharpness(
        sharpness.hessian_vector.as_written, net, start, data, rounds=150
    )
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()

    def error(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in net.parameters()])
        named = zip(net.named_parameters(), parts, strict=True)
        parameters = {name: part.reshape(p.shape) for (name, p), part in named}
        return sharpness.error(net, parameters, *data)

    largest = torch.linalg.eigvalsh(hessian(error)(flat))[-1].item()
    assert found == pytest.approx(largest, rel=1e-3)


def test_penalty_over_all_directions_is_the_square_of_the_jacobian() -> None:
    torch.manual_seed(0)
    net = digits.make_classifier(width=16).double()
    images, labels = double(*digits.load_images())
    image, label = images[:1].expand(10, -1), labels[:1].expand(10)
    directions = torch.eye(10, dtype=torch.float64)
    penalty = digits.loss.as_written(net, image, label, directions)
    penalty = (penalty - digits.usual_loss(net, image, label, directions)) / digits.WEIGHT
    torch.testing.assert_close(penalty, jacrev(net)(images[0]).square().sum())


def test_adapted_network_has_taken_a_step() -> None:
    torch.manual_seed(0)
    net = maml.make_network(width=8)
    x, y, *_ = (tensor[0] for tensor in maml.draw_tasks(1))
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    expected = functional_call(net, maml.adapted(net, parameters, x, y), (x,))
    optimizer = torch.optim.SGD(net.parameters(), lr=maml.RATE)
    (net(x) - y).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(net(x), expected)


def test_density_of_a_flow_sums_to_one() -> None:
    torch.manual_seed(0)
    velocity = flow.Velocity(width=8).double()
    for p in velocity.parameters():
        p.data.mul_(2)
    x = torch.linspace(-12, 12, 121, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(x, x, indexing="xy"), dim=-1).flatten(0, 1)
    total = flow.exact_log_density(velocity, grid, steps=8).exp().sum() * (x[1] - x[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-4)


def test_divergence_of_a_flow_is_estimated_without_bias() -> None:
    """The mean over all four pairs of signs is that of the two that the exact one takes."""
    torch.manual_seed(0)
    velocity, x = flow.Velocity(width=8).double(), torch.randn(5, 2, dtype=torch.float64)
    pairs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()
    logs = [flow.log_density(velocity, x, pair.expand_as(x), steps=4)[0] for pair in pairs]
    assert (logs[0] - logs[1]).abs().max() > 1e-3  # the estimate depends on the direction
    exact = flow.exact_log_density(velocity, x, steps=4)
    torch.testing.assert_close(torch.stack(logs).mean(dim=0), exact)


def test_poisson_source_is_that_of_the_solution() -> None:
    torch.manual_seed(0)
    points = torch.rand(9, 2, dtype=torch.float64)
    laplacians = vmap(hessian(poisson.exact_solution))(points).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(-laplacians, poisson.source(points))
    sides = torch.tensor([[0.0, 0.3], [1.0, 0.6], [0.2, 0.0], [0.7, 1.0]])
    assert not poisson.Membrane()(sides).any()


def test_layers_run(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    few, workloads = functools.partial(layers.microseconds, calls=3), layers.workloads()
    monkeypatch.setattr(layers, "microseconds", few)
    monkeypatch.setattr(layers, "workloads", lambda: workloads[:2])
    layers.main(["--backend", "eager", "--rounds", "2"])
    printed = capsys.readouterr().out
    for words in ("as written (eager)", "optimize_nested(net)", "force matching", "difference"):
        assert words in printed
    assert "did not compile" not in printed


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_training_lowers_the_loss(method: str) -> None:
    torch.manual_seed(0)
    net, data = burgers.make_network(width=8, depth=2), burgers.make_points(64)
    history = training.minimise(net, burgers.loss.as_written, data, method, steps=40)
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
    eager = Contender("as written", critic.critic_loss.as_written, inputs)
    ours = critic.optimize_nested(critic.critic_loss.as_written, backend="eager")
    rewritten = Contender("optimize_nested", ours, inputs)
    for contender in (eager, rewritten):
        contender.first_step(network, *sample)
        assert not contender.refusal
    torch.testing.assert_close(rewritten.gradients, eager.gradients, rtol=1e-4, atol=1e-5)


def test_a_refusal_stands_in_the_place_of_a_time(capsys) -> None:
    weight = torch.ones(2, requires_grad=True)

    def refused() -> torch.Tensor:
        raise RuntimeError("cannot trace this\nand much more")

    contenders = [
        Contender("as written", weight.sum, [weight]),
        Contender("refused", refused, [weight]),
    ]
    for contender in contenders:
        contender.first_step()
    measure(contenders, rounds=2)
    side_by_side.print_comparison("title", contenders)
    printed = capsys.readouterr().out
    assert "refused did not run: RuntimeError: cannot trace this" in printed
    assert "much more" not in printed
    assert contenders[1].seconds == []


def test_overhead_tells_the_pieces_apart(capsys) -> None:
    threads = str(torch.get_num_threads())
    overhead.main(["--rounds", "2", "--backend", "eager", "--threads", threads])
    printed = capsys.readouterr().out
    for row in ("bare graph", "least", "ours", "eager", "guards and call", "backward()"):
        assert row in printed
