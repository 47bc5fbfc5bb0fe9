"""Train a classifier of digits that noise does not fool, by a penalty on its Jacobian.

The mean square of the Jacobian of the logits is estimated by one vector-Jacobian product per image,
in a random direction (Hoffman, Roberts, Yaida: Robust learning with Jacobian regularization, 2019).

Run `python examples/digits.py --quick`, or leave out `--quick` for a longer training. You will see
the report on the loss, a table with its time per step as written, under torch.compile and under
optimize_nested, two trainings, and the accuracy of both under noise. The picture `digits.png` shows
the accuracy for each strength of noise, and what either classifier makes of the same noisy images.
The images are the 8 × 8 digits that come with scikit-learn; nothing is downloaded.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pictures
import side_by_side
import torch
import training
from side_by_side import console
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rewriter import optimize_nested

WEIGHT = 0.02  # of the penalty
STRENGTH = 0.3  # of the noise in the images that are shown
STRENGTHS = np.linspace(0, 0.8, 17)  # of the noise; pixels are in [0, 1]


@optimize_nested
def loss(net: nn.Module, images: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """Add to the cross-entropy the penalty C |vᵀJ|² with the Jacobian J of the C logits.

    Images have shape (batch, 64), labels (batch,), unit vectors v as directions (batch, 10).
    """
    images = images.detach().requires_grad_()
    logits = net(images)
    (rows,) = torch.autograd.grad(logits, images, directions, create_graph=True)
    penalty = logits.shape[1] * rows.square().sum(dim=1).mean()
    return nn.functional.cross_entropy(logits, labels) + WEIGHT * penalty


def usual_loss(net: nn.Module, images: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """Return the cross-entropy alone."""
    return nn.functional.cross_entropy(net(images), labels)


def make_classifier(width: int = 256) -> nn.Sequential:
    """Build the classifier, images (batch, 64) → logits (batch, 10)."""
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def load_images() -> tuple[Tensor, Tensor]:
    """Load the 1797 digits in [0, 1], shape (1797, 64), and what they are, shape (1797,)."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.get_default_dtype()), torch.tensor(labels)


def draw_batch(images: Tensor, labels: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images (batch, 64), their labels (batch,) and unit vectors (batch, 10)."""
    chosen = torch.randint(len(images), (batch,))
    directions = nn.functional.normalize(torch.randn(batch, 10), dim=1)
    return images[chosen], labels[chosen], directions


def train(
    name: str, objective: Callable[..., Tensor], data: tuple[Tensor, Tensor], steps: int, batch: int
) -> nn.Module:
    """Train a classifier on objective(net, images, labels, directions)."""
    net = make_classifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    training.descend(name, optimizer, lambda _: objective(net, *draw_batch(*data, batch)), steps)
    return net


@torch.no_grad()
def is_right(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Say of each image whether the classifier recognises it, shape (…, batch)."""
    return net(images).argmax(dim=-1) == labels


def draw(nets: dict[str, nn.Module], images: Tensor, labels: Tensor, path: str) -> dict[str, float]:
    """Draw accuracies under noise and noisy images; return the accuracies at STRENGTH."""
    noise = torch.randn(20, *images.shape)
    figure, (left, *grids) = pictures.panels(
        "A penalty on the Jacobian makes a classifier robust", (1.3, 1, 1)
    )
    at = {}
    shown = (images[:36] + STRENGTH * noise[0, :36]).clamp(0, 1)
    for grid, (name, net) in zip(grids, nets.items(), strict=True):
        accuracies = [
            is_right(net, images + float(strength) * noise, labels).double().mean().item()
            for strength in STRENGTHS
        ]
        at[name] = float(np.interp(STRENGTH, STRENGTHS, accuracies))
        left.plot(STRENGTHS, accuracies, marker=".", label=name)
        right = is_right(net, images[:36] + STRENGTH * noise[0, :36], labels[:36])
        colours = ["tab:green" if known else "tab:red" for known in right]
        pictures.tiles(grid, shown.reshape(-1, 8, 8).numpy(), columns=6, colours=colours)
        grid.set(title=f"{name}: {int(right.sum())} of 36 right")
    texts = {"xlabel": "standard deviation of the noise", "ylabel": "accuracy on unseen digits"}
    pictures.plain(left, **texts)
    pictures.save(figure, path)
    return at


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the loss, train with and without the penalty, compare under noise, and draw."""
    parser = side_by_side.option_parser("Jacobian regularisation on 8 × 8 digits", "digits.png")
    parser.add_argument("--batch", type=int, default=128, help="images (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    images, labels = load_images()
    seen, unseen = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])
    fast, net = optimize_nested(loss.as_written, backend=options.backend), make_classifier()
    side_by_side.compare(
        f"time per step, {options.batch} images",
        *(fast, net.parameters(), net, *draw_batch(*seen, options.batch)),
        options=options,
    )
    steps = options.steps or (1000 if options.quick else 6000)
    objectives = {"cross-entropy": usual_loss, "with the penalty": fast}
    nets = {name: train(name, f, seen, steps, options.batch) for name, f in objectives.items()}
    for name, accuracy in draw(nets, *unseen, options.out).items():
        console.print(f"accuracy under noise of strength {STRENGTH}, {name}: {accuracy:.1%}")
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
