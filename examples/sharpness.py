"""Watch how sharp the minimum is that gradient descent goes to, and ask for a flat one.

The sharpness is the largest eigenvalue of the loss's Hessian in the parameters. Power iteration
finds it from Hessian-vector products. Gradient descent with step η lets it grow until it stays
about 2/η (Cohen et al.: Gradient descent on neural networks typically occurs at the edge of
stability, 2021). A penalty on the norm of the gradient keeps it lower (Zhao, Zhang, Hu, 2022).

Run `python examples/sharpness.py --quick`, or leave out `--quick` for a longer training. You will
see the reports on the penalised loss and on the Hessian-vector product, a table with the former's
time as written, under torch.compile and under optimize_nested, and two trainings. The picture
`sharpness.png` shows sharpness and error along both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pictures
import side_by_side
import torch
from side_by_side import console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from rewriter import optimize_nested

RATE = 0.1  # η of gradient descent
WEIGHT = 0.02  # of the penalty
Parameters = dict[str, Tensor]


def error(net: nn.Module, parameters: Parameters, images: Tensor, targets: Tensor) -> Tensor:
    """Return the mean square error of the network with these parameters."""
    return (functional_call(net, parameters, (images,)) - targets).square().sum(dim=1).mean() / 2


@optimize_nested
def loss(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Add to the error the norm of its gradient in the parameters.

    Images have shape (batch, 64), targets (batch, 10).
    """
    value = error(net, dict(net.named_parameters()), images, targets)
    gradient = torch.autograd.grad(value, list(net.parameters()), create_graph=True)
    return value + WEIGHT * torch.sqrt(sum(g.square().sum() for g in gradient))


def usual_loss(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Return the error alone."""
    return error(net, dict(net.named_parameters()), images, targets)


@optimize_nested
def hessian_vector(
    net: nn.Module, parameters: Parameters, direction: Parameters, images: Tensor, targets: Tensor
) -> Parameters:
    """Multiply the error's Hessian in the parameters by a direction, forward over reverse."""
    gradient = grad(lambda p: error(net, p, images, targets))
    return jvp(gradient, (parameters,), (direction,))[1]


def norm(direction: Parameters) -> Tensor:
    """Return the length of a direction."""
    return torch.stack([d.norm() for d in direction.values()]).norm()


def sharpness(
    product: Callable[..., Parameters],
    net: nn.Module,
    direction: Parameters,
    data: Sequence[Tensor],
    rounds: int = 8,
) -> tuple[float, Parameters]:
    """Return the size of the largest eigenvalue and its direction, by power iteration from one."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    value = norm(direction)
    for _ in range(rounds):
        direction = {name: d / value for name, d in direction.items()}
        direction = product(net, parameters, direction, *data)
        value = norm(direction)
    return value.item(), direction


def make_classifier(width: int = 64) -> nn.Sequential:
    """Build the classifier, images (batch, 64) → (batch, 10)."""
    return nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )


def load_images(count: int) -> tuple[Tensor, Tensor]:
    """Load digits, shape (count, 64), centred, and ones at their labels, shape (count, 10)."""
    pixels, labels = load_digits(return_X_y=True)
    dtype = torch.get_default_dtype()
    images = torch.tensor(pixels[:count], dtype=dtype) / 8 - 1
    return images, nn.functional.one_hot(torch.tensor(labels[:count]), 10).to(dtype)


@dataclass
class History:
    """Hold what was recorded at some steps: the error and the sharpness."""

    step: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)


def train(
    name: str,
    objective: Callable[..., Tensor],
    product: Callable[..., Parameters],
    data: Sequence[Tensor],
    steps: int,
) -> History:
    """Take steps of gradient descent on objective(net, *data); watch the sharpness of the error."""
    torch.manual_seed(1)  # every training starts at the same parameters
    net, history = make_classifier(), History()
    direction = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    with side_by_side.progress_bar() as progress:
        task = progress.add_task(name, total=steps, status="")
        for step in range(steps):
            if step % max(steps // 100, 1) == 0:
                value, direction = sharpness(product, net, direction, data)
                history.step.append(step)
                history.sharpness.append(value)
                history.error.append(usual_loss(net, *data).item())
            optimizer.zero_grad()
            objective(net, *data).backward()
            optimizer.step()
            progress.update(task, advance=1, status=f"sharpness {history.sharpness[-1]:.2f}")
    return history


def draw(histories: dict[str, History], path: str) -> None:
    """Draw sharpness and error of the trainings into a file."""
    figure, (left, right) = pictures.panels("Sharpness along gradient descent", (1.6, 1.2))
    for name, history in histories.items():
        left.plot(history.step, history.sharpness, marker=".", markersize=3, label=name)
        right.semilogy(history.step, history.error, label=name)
    left.axhline(2 / RATE, color="black", linestyle="--", linewidth=0.8, label="2/η")
    title = "largest eigenvalue of the Hessian"
    pictures.plain(left, title=title, xlabel="step", ylim=(0, None))
    pictures.plain(right, legend=False, title="error", xlabel="step")
    pictures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the losses, train with and without the penalty, and draw."""
    parser = side_by_side.option_parser("sharpness along gradient descent", "sharpness.png")
    parser.add_argument("--images", type=int, default=500, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    data, net = load_images(options.images), make_classifier()
    fast = optimize_nested(loss.as_written, backend=options.backend)
    product = optimize_nested(hessian_vector.as_written, backend=options.backend)
    side_by_side.compare(
        f"time per step of the penalised loss, {options.images} images",
        *(fast, net.parameters(), net, *data),
        options=options,
    )
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    print(product.explain(net, parameters, parameters, *data))
    steps = options.steps or (600 if options.quick else 2000)
    objectives = {"gradient descent": usual_loss, "with the penalty": fast}
    histories = {
        name: train(name, objective, product, data, steps) for name, objective in objectives.items()
    }
    for name, history in histories.items():
        console.print(f"sharpness at the end, {name}: {history.sharpness[-1]:.2f}")
    draw(histories, options.out)
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
