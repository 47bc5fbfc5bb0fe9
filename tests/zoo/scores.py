"""Score models, flow maps, energies and their samplers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.distributions as D
from torch import Tensor, autograd, nn

from tests.zoo.row import BY_LAYER, Batch, Loss


def _mlp(m: int, n: int, width: int = 10, activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(m, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, n),
    )


def sliced_annealed() -> tuple[Any, Batch]:
    """Sliced score matching at several noise levels, samples repeated (NCSN)."""
    scorenet = _mlp(3, 2)
    sigmas = torch.tensor(np.exp(np.linspace(np.log(1.0), np.log(0.1), 4)))

    def anneal_sliced_score_estimation(samples: Tensor, n_particles: int = 2) -> Tensor:
        labels = torch.randint(0, len(sigmas), (samples.shape[0],), device=samples.device)
        used_sigmas = sigmas[labels].view(samples.shape[0], *([1] * len(samples.shape[1:])))
        perturbed_samples = samples + torch.randn_like(samples) * used_sigmas
        dup_samples = (
            perturbed_samples.unsqueeze(0)
            .expand(n_particles, *samples.shape).contiguous().view(-1, *samples.shape[1:])
        )  # fmt: skip
        dup_sigmas = used_sigmas.repeat(n_particles, 1)
        dup_samples.requires_grad_(True)
        vectors = torch.randn_like(dup_samples)
        grad1 = scorenet(torch.cat([dup_samples, dup_sigmas], 1))
        gradv = torch.sum(grad1 * vectors)
        grad2 = autograd.grad(gradv, dup_samples, create_graph=True)[0]
        grad1 = grad1.view(dup_samples.shape[0], -1)
        loss1 = torch.sum(grad1 * grad1, dim=-1) / 2.0
        loss2 = torch.sum((vectors * grad2).view(dup_samples.shape[0], -1), dim=-1)
        loss1 = loss1.view(n_particles, -1).mean(dim=0)
        loss2 = loss2.view(n_particles, -1).mean(dim=0)
        loss = (loss1 + loss2) * (used_sigmas.squeeze() ** 2)
        return loss.mean(dim=0)

    return anneal_sliced_score_estimation, lambda: (torch.randn(6, 2),)


def normalised_energy() -> tuple[Any, Batch]:
    """Exact score matching of an energy under distributions made inside, arguments validated."""
    energy = _mlp(2, 1)

    def loss(x: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        base = D.Independent(D.Normal(torch.zeros(2), torch.ones(2)), 1)
        logp = -energy(x).squeeze(1) + base.log_prob(x)
        score = autograd.grad(logp.sum(), x, create_graph=True)[0]
        trace = 0.0
        for i in range(x.shape[1]):
            trace = trace + autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i]
        return (0.5 * score.pow(2).sum(1) + trace).mean()

    return loss, lambda: (torch.randn(7, 2),)


def stein_discrepancy() -> tuple[Any, Batch]:
    """A learned Stein critic against a mixture of distributions built in each call."""
    critic = _mlp(2, 2)

    def log_density(x: Tensor) -> Tensor:
        mix = D.Categorical(logits=torch.zeros(3))
        means = torch.tensor([[0.0, 1.0], [1.0, -1.0], [-1.0, 0.0]])
        comp = D.Independent(D.Normal(means, 0.7 * torch.ones(3, 2)), 1)
        return D.MixtureSameFamily(mix, comp).log_prob(x)

    def loss(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        score = autograd.grad(log_density(x).sum(), x)[0]
        f = critic(x)
        probes = torch.randint(0, 2, f.shape).to(f) * 2 - 1
        div = (autograd.grad((f * probes).sum(), x, create_graph=True)[0] * probes).sum(1)
        stats = (score * f).sum(1) + div
        return -stats.mean() + 0.5 * f.square().sum(1).mean()

    return loss, lambda: (torch.randn(8, 2),)


def multivariate_reparametrised() -> tuple[Any, Batch]:
    """A score at samples of a learned multivariate normal, its covariance from a triangle."""
    mean = nn.Parameter(torch.zeros(2))
    scale = nn.Parameter(torch.eye(2) + 0.1)
    net = _mlp(2, 1)

    def loss(n: int) -> Tensor:
        q = D.MultivariateNormal(mean, scale_tril=torch.tril(scale))
        z = q.rsample((n,))
        logp = net(z).squeeze(1)
        score = autograd.grad(logp.sum(), z, create_graph=True)[0]
        entropy = q.entropy()
        kl = D.kl_divergence(q, D.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        return 0.5 * score.square().sum(1).mean() - entropy + 0.1 * kl

    return loss, lambda: (8,)


def mean_flow() -> tuple[Any, Batch]:
    """MeanFlow: a tangent by forward mode for a target that carries no gradient."""
    net = _mlp(4, 2)

    def u_fn(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return net(torch.cat([z, t, r], 1))

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        samples = np.random.randn(x.shape[0], 2).astype(np.float64)
        tr = 1 / (1 + np.exp(-samples))
        t_np, r_np = np.maximum(tr[:, 0], tr[:, 1]), np.minimum(tr[:, 0], tr[:, 1])
        equal = np.random.permutation(x.shape[0])[: x.shape[0] // 2]
        r_np[equal] = t_np[equal]
        t, r = (torch.tensor(a).unsqueeze(1) for a in (t_np, r_np))
        e = torch.randn_like(x)
        z, v = (1 - t) * x + t * e, e - x
        u, dudt = torch.func.jvp(u_fn, (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
        u_tgt = (v - (t - r) * dudt).detach()
        error = u - u_tgt
        delta_sq = torch.mean(error**2, dim=1)
        w = 1.0 / (delta_sq + 1e-3).pow(0.5)
        return (w.detach() * delta_sq).mean(), (error.detach() ** 2).mean()

    return loss, lambda: (torch.randn(8, 2),)


def consistency() -> tuple[Any, Batch]:
    """A continuous-time consistency model: its tangent by jvp under no_grad, normalised (sCM)."""
    net = _mlp(3, 2)
    logvar = nn.Linear(1, 1)

    def loss(x0: Tensor) -> Tensor:
        tau = torch.randn(x0.shape[0], 1) * 1.4 - 1.0
        t = torch.atan(torch.exp(tau) / 0.5)
        z = torch.randn_like(x0) * 0.5
        x_t, dxdt = torch.cos(t) * x0 + torch.sin(t) * z, torch.cos(t) * z - torch.sin(t) * x0

        def model(x: Tensor, t: Tensor) -> Tensor:
            return net(torch.cat([x, t], 1))

        with torch.no_grad():
            v_x, v_t = torch.cos(t) * torch.sin(t) * dxdt / 0.5, torch.cos(t) * torch.sin(t)
            F_theta, F_theta_grad = torch.func.jvp(model, (x_t / 0.5, t), (v_x, v_t))
            g = -(torch.cos(t) ** 2) * (0.5 * F_theta - dxdt)
            g = g - 0.7 * (torch.cos(t) * torch.sin(t) * x_t + 0.5 * F_theta_grad)
            g = g / (torch.linalg.vector_norm(g, dim=1, keepdim=True) + 0.1)
        w = logvar(t)
        error = model(x_t / 0.5, t) - F_theta - g
        return (torch.exp(w) / 2 * error.pow(2) - w).mean()

    return loss, lambda: (torch.randn(8, 2),)


class _Buffer:
    def __init__(self) -> None:
        self.examples = [torch.rand(1, 4) * 2 - 1 for _ in range(6)]


def langevin_samples() -> tuple[Any, Batch]:
    """An energy trained on samples drawn by Langevin steps in the loss, its weights frozen then."""
    model = nn.Sequential(nn.Linear(4, 10), nn.SiLU(), nn.Linear(10, 1))

    def generate_samples(inp_imgs: Tensor, steps: int = 3, step_size: float = 0.1) -> Tensor:
        is_training = model.training
        model.eval()
        for p in model.parameters():
            p.requires_grad = False
        inp_imgs.requires_grad = True
        had_gradients_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        noise = torch.randn(inp_imgs.shape, device=inp_imgs.device)
        for _ in range(steps):
            noise.normal_(0, 0.005)
            inp_imgs.data.add_(noise.data)
            inp_imgs.data.clamp_(min=-1.0, max=1.0)
            out_imgs = -model(inp_imgs)
            (grad,) = torch.autograd.grad(out_imgs.sum(), inp_imgs)
            inp_imgs.data.add_(-step_size * grad.clamp(-0.03, 0.03))
            inp_imgs.data.clamp_(min=-1.0, max=1.0)
        for p in model.parameters():
            p.requires_grad = True
        model.train(is_training)
        torch.set_grad_enabled(had_gradients_enabled)
        return inp_imgs.detach()

    def training_step(real: Tensor) -> Tensor:
        small_noise = torch.randn_like(real) * 0.005
        real = real + small_noise
        fake = generate_samples(torch.rand(real.shape) * 2 - 1)
        real_out, fake_out = model(torch.cat([real, fake], dim=0)).chunk(2, dim=0)
        reg_loss = 0.1 * (real_out**2 + fake_out**2).mean()
        return reg_loss + fake_out.mean() - real_out.mean()

    return training_step, lambda: (torch.rand(6, 4),)


def moving_average_target() -> tuple[Any, Batch]:
    """A score against a moving average of itself, the average a deep copy updated in place."""
    net = _mlp(3, 1)
    ema = copy.deepcopy(net).requires_grad_(False)

    def score(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        return autograd.grad(net(torch.cat([x, t], 1)).sum(), x, create_graph=True)[0]

    def loss(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            for p, q in zip(ema.parameters(), net.parameters()):
                p.lerp_(q, 0.1)
        noise = torch.randn_like(x)
        s = score(net, x + t * noise, t)
        target = score(ema, x.detach() + 0.9 * t * noise, 0.9 * t).detach()
        return ((s * t + noise) ** 2).mean() + ((s - target) ** 2).mean()

    return loss, lambda: (torch.randn(8, 2), torch.rand(8, 1) + 0.1)


def fokker_planck() -> tuple[Any, Batch]:
    """A residual of the Fokker–Planck equation of scores, dimensions by functional.jacobian."""
    net = _mlp(3, 2)

    def loss(x: Tensor, t: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        t = t.clone().requires_grad_(True)
        s = net(torch.cat([x, t], dim=-1))
        div = torch.zeros(x.shape[0])
        for i in range(x.size(-1)):
            div += autograd.grad(s[:, i].sum(), x, create_graph=True)[0][:, i]
        rhs = autograd.grad((0.5 * div + 0.5 * s.square().sum(-1)).sum(), x, create_graph=True)[0]
        lhs = torch.stack(
            [autograd.grad(s[:, i].sum(), t, create_graph=True)[0].squeeze(-1) for i in range(2)],
            -1,
        )
        reg = torch.linalg.norm(lhs - rhs, dim=-1)
        if not torch.isfinite(reg).all():
            raise FloatingPointError("residual")
        return reg.mean()

    return loss, lambda: (torch.randn(7, 2), torch.rand(7, 1))


LOSSES = (
    Loss(sliced_annealed),
    Loss(normalised_energy, is_slow=True),
    Loss(stein_discrepancy),
    Loss(multivariate_reparametrised, way=BY_LAYER),
    Loss(mean_flow, way=BY_LAYER),
    Loss(consistency),
    Loss(langevin_samples, way=BY_LAYER),
    Loss(moving_average_target, way=BY_LAYER, is_slow=True),
    Loss(fokker_planck, is_slow=True),
)
