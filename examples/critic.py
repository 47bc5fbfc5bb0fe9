"""Train a Wasserstein GAN with gradient penalty on handwritten digits; see what the penalty costs.

Run `python examples/critic.py --quick` (about two minutes on two cores), or leave out `--quick` for
a long training. You will see the report on the critic's loss, a table with its time per step as
written, under torch.compile and under optimize_nested, and the training. The picture `critic.png`
shows real digits, generated ones, and the curves of loss and penalty. The images are the 8 × 8
digits that come with scikit-learn; nothing is downloaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pictures
import side_by_side
import torch
from side_by_side import console
from sklearn.datasets import load_digits
from torch import Tensor, nn

from rewriter import optimize_nested

NOISE = 32  # numbers the generator makes an image from
CRITIC_STEPS = 3  # critic steps for each step of the generator


@optimize_nested
def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """Add the penalty on the critic's gradient to the Wasserstein terms (Gulrajani et al., 2017).

    Images have shape (batch, 1, 8, 8), the mixing weights epsilon in [0, 1] (batch, 1, 1, 1).
    """
    mixed = (epsilon * real + (1 - epsilon) * fake).requires_grad_()
    gradient = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)[0]
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + 10 * penalty


def generator_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    """Return the loss of the generator on its images, shape (batch, 1, 8, 8)."""
    return -critic(fake).mean()


def make_critic(width: int = 64) -> nn.Sequential:
    """Build the convolutional critic (batch, 1, 8, 8) → (batch, 1)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * width * 2 * 2, 1),
    )


def make_generator(width: int = 64) -> nn.Sequential:
    """Build the generator, noise (batch, 32) → images (batch, 1, 8, 8) in [-1, 1]."""
    return nn.Sequential(
        nn.Linear(NOISE, 2 * width * 2 * 2),
        nn.Unflatten(1, (2 * width, 2, 2)),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(2 * width, 2 * width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 1, 3, padding=1),
        nn.Tanh(),
    )


def load_images() -> Tensor:
    """Load the 1797 digits, shape (1797, 1, 8, 8), scaled to [-1, 1]."""
    pixels, _ = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1


@dataclass
class History:
    """Hold what was recorded: the critic step, its loss, and the penalty and distance within."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)

    def record(self, step: int, loss: float, distance: float) -> None:
        """Split a critic loss into the Wasserstein `distance` and ten times the penalty."""
        self.step.append(step)
        self.loss.append(loss)
        self.distance.append(distance)
        self.penalty.append(loss + distance)


def draw_batch(images: Tensor, generator: nn.Module, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw real images, generated ones (both (batch, 1, 8, 8)) and mixing weights."""
    real = images[torch.randint(len(images), (batch,))]
    with torch.no_grad():
        fake = generator(torch.randn(batch, NOISE))
    return real, fake, torch.rand(batch, 1, 1, 1)


def train(
    critic: nn.Module,
    generator: nn.Module,
    objective: Callable[..., Tensor],
    images: Tensor,
    steps: int,
    batch: int,
) -> History:
    """Take `steps` steps of the critic on objective(critic, real, fake, epsilon).

    The generator takes one step for each CRITIC_STEPS of them. Every tenth is recorded.
    """
    history = History()
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.0, 0.9))
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.0, 0.9))
    with side_by_side.progress_bar() as progress:
        task = progress.add_task("critic", total=steps, status="")
        for step in range(steps):
            real, fake, epsilon = draw_batch(images, generator, batch)
            critic_optimizer.zero_grad()
            value = objective(critic, real, fake, epsilon)
            value.backward()
            if step % 10 == 0:
                with torch.no_grad():
                    distance = (critic(real).mean() - critic(fake).mean()).item()
                history.record(step, value.item(), distance)
            critic_optimizer.step()
            if step % CRITIC_STEPS == 0:
                generator_optimizer.zero_grad()
                generator_loss(critic, generator(torch.randn(batch, NOISE))).backward()
                generator_optimizer.step()
            progress.update(task, advance=1, status=f"distance {history.distance[-1]:.2f}")
    return history


def draw(real: Tensor, fake: Tensor, history: History, path: str) -> None:
    """Draw real and generated digits, both (64, 1, 8, 8), and the critic's curves into a file."""
    figure, (left, middle, right) = pictures.panels(
        "Wasserstein GAN with gradient penalty on handwritten digits", (1, 1, 1.25)
    )
    for axes, images, title in ((left, real, "real"), (middle, fake, "generated")):
        pictures.tiles(axes, (images[:, 0].numpy() + 1) / 2, columns=8)
        axes.set(title=title)
    right.plot(history.step, history.loss, linewidth=1.0, label="critic loss")
    right.plot(history.step, history.penalty, linewidth=1.0, label="penalty (× 10)")
    pictures.plain(right, title="critic", xlabel="critic step")
    pictures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train critic and generator, time the critic's loss evaluated in three ways, and draw."""
    parser = side_by_side.option_parser("WGAN-GP on 8 × 8 digits", "critic.png")
    parser.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    critic, generator, images = make_critic(), make_generator(), load_images()
    sample = draw_batch(images, generator, options.batch)

    fast = optimize_nested(critic_loss.as_written, backend=options.backend)
    side_by_side.compare(
        f"time per critic step, {options.batch} images",
        *(fast, critic.parameters(), critic, *sample),
        options=options,
    )
    steps = options.steps or (1500 if options.quick else 30000)
    history = train(critic, generator, fast, images, steps, options.batch)
    real, fake, _ = draw_batch(images, generator, 64)
    draw(real, fake, history, options.out)
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
