"""Learn to learn sinusoids from ten points (MAML; Finn, Abbeel, Levine, 2017).

The loss is that of a network after one gradient step of its own on ten points of a task: the
gradient of the loss in the parameters goes through that gradient, for all tasks of a batch at once.

Run `python examples/maml.py --quick`, or leave out `--quick` for a longer training. You will see
the report on the loss, a table with its time per step as written, under torch.compile and under
optimize_nested, the training, and the errors after steps on new tasks, beside a network that was
trained on all sinusoids alike. The picture `maml.png` shows both as they adapt.
"""

import math
from collections.abc import Callable, Sequence

import pictures
import side_by_side
import torch
import training
from side_by_side import console
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from rewriter import optimize_nested

RATE = 0.01  # of the inner gradient steps
SHOTS = 10  # points of a task to learn from, and as many to be judged by
Parameters = dict[str, Tensor]


def error(net: nn.Module, parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean square error of the network with these parameters at x (points, 1)."""
    return (functional_call(net, parameters, (x,)) - y).square().mean()


def adapted(net: nn.Module, parameters: Parameters, x: Tensor, y: Tensor) -> Parameters:
    """Take one gradient step on the error at x (points, 1)."""
    gradient = grad(lambda p: error(net, p, x, y))(parameters)
    return {name: p - RATE * gradient[name] for name, p in parameters.items()}


@optimize_nested
def loss(net: nn.Module, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
    """Return the error at new points after one step on others, all (tasks, points, 1)."""
    parameters = dict(net.named_parameters())

    def task(x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
        return error(net, adapted(net, parameters, x, y), new_x, new_y)

    return vmap(task)(x, y, new_x, new_y).mean()


def usual_loss(net: nn.Module, x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
    """Return the error of one network for all tasks."""
    return (net(x) - y).square().mean() + (net(new_x) - new_y).square().mean()


def make_network(width: int = 40) -> nn.Sequential:
    """Build the network (…, 1) → (…, 1)."""
    return nn.Sequential(
        nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )


def draw_tasks(tasks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw sinusoids of amplitude 0.1 to 5 and any phase; two sets of points of each,
    x, y, x, y, all (tasks, SHOTS, 1)."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), math.pi * torch.rand(tasks, 1, 1)
    x, new_x = (10 * torch.rand(tasks, SHOTS, 1) - 5 for _ in range(2))
    return x, amplitude * torch.sin(x - phase), new_x, amplitude * torch.sin(new_x - phase)


def train(name: str, objective: Callable[..., Tensor], steps: int, tasks: int) -> nn.Module:
    """Train a network on objective(net, *tasks)."""
    net = make_network()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    training.descend(name, optimizer, lambda _: objective(net, *draw_tasks(tasks)), steps)
    return net


def adapt(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> list[Parameters]:
    """Return the parameters before and after each of the steps on points (points, 1)."""
    found = [{name: p.detach() for name, p in net.named_parameters()}]
    for _ in range(steps):
        found.append(adapted(net, found[-1], x, y))
    return found


def errors_after(net: nn.Module, tasks: Sequence[Tensor], steps: int) -> Tensor:
    """Return the mean errors on tasks before and after each of the steps, shape (steps + 1,)."""

    def task(x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
        return torch.stack([error(net, p, new_x, new_y) for p in adapt(net, x, y, steps)])

    return vmap(task)(*tasks).mean(dim=0)


@torch.no_grad()
def draw(nets: dict[str, nn.Module], path: str) -> dict[str, float]:
    """Draw how the networks adapt; return the errors on 200 new tasks after one step."""
    figure, (*plots, right) = pictures.panels("Model-agnostic meta-learning", (1, 1, 1))
    x = torch.linspace(-5, 5, 201)[:, None]
    points = torch.tensor([-4.6, -4.1, -3.3, -2.9, -2.2, -1.7, -1.2, -0.8, -0.5, -0.1])[:, None]
    tasks, after_one = draw_tasks(200), {}
    for plot, (name, net) in zip(plots, nets.items(), strict=True):
        plot.plot(x, 3.5 * torch.sin(x - 1), color="black", linewidth=0.8, label="truth")
        steps = adapt(net, points, 3.5 * torch.sin(points - 1), 10)
        for count, style in ((0, ":"), (1, "--"), (10, "-")):
            label = f"after {count} step{'s' * (count != 1)}"
            plot.plot(x, functional_call(net, steps[count], (x,)), style, label=label)
        plot.plot(points, 3.5 * torch.sin(points - 1), "v", color="black", markersize=5)
        pictures.plain(plot, legend=plot is plots[0], title=name, ylim=(-6, 6))
        means = errors_after(net, tasks, 10)
        right.plot(means, marker=".", label=name)
        after_one[name] = means[1].item()
    right.set_yscale("log")
    pictures.plain(right, title="mean square error, 200 new tasks", xlabel="gradient steps")
    pictures.save(figure, path)
    return after_one


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the loss, train, judge by new tasks, and draw."""
    parser = side_by_side.option_parser("MAML on sinusoids", "maml.png")
    parser.add_argument("--tasks", type=int, default=25, help="in a batch (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    fast, net = optimize_nested(loss.as_written, backend=options.backend), make_network()
    side_by_side.compare(
        f"time per step, {options.tasks} tasks of {SHOTS} + {SHOTS} points",
        *(fast, net.parameters(), net, *draw_tasks(options.tasks)),
        options=options,
    )
    steps = options.steps or (2000 if options.quick else 15000)
    objectives = {"MAML": fast, "trained on all alike": usual_loss}
    nets = {name: train(name, f, steps, options.tasks) for name, f in objectives.items()}
    for name, after_one in draw(nets, options.out).items():
        console.print(f"error on new tasks after one step, {name}: {after_one:.3f}")
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
