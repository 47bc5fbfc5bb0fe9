"""Adversarial training of images: penalties of critics, path lengths, unrolled critics."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn
from torch.autograd import Variable

from tests.zoo.row import BY_LAYER, Batch, Loss


def _critic(channels: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(channels, channels, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True),
        nn.Flatten(), nn.Linear(4 * channels, 1),
    )  # fmt: skip


def _images(n: int = 4) -> Tensor:
    return torch.randn(n, 1, 8, 8)


def wgan_gp() -> tuple[Any, Batch]:
    """The gradient penalty of Wasserstein critics, its weights drawn by NumPy."""
    netD = _critic()
    lambda_gp = 10

    def compute_gradient_penalty(D: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        alpha = Tensor(np.random.random((real.size(0), 1, 1, 1))).to(real)
        interpolates = (alpha * real + ((1 - alpha) * fake)).requires_grad_(True)
        d_interpolates = D(interpolates)
        fake_ = Variable(torch.ones(real.shape[0], 1).to(real), requires_grad=False)
        gradients = autograd.grad(
            outputs=d_interpolates, inputs=interpolates, grad_outputs=fake_, create_graph=True,
            retain_graph=True, only_inputs=True,
        )[0]  # fmt: skip
        gradients = gradients.view(gradients.size(0), -1)
        return ((gradients.norm(2, dim=1) - 1) ** 2).mean()

    def d_loss(real: Tensor, fake: Tensor) -> Tensor:
        gp = compute_gradient_penalty(netD, real.data, fake.data)
        return -torch.mean(netD(real)) + torch.mean(netD(fake.detach())) + lambda_gp * gp

    return d_loss, lambda: (_images(), _images())


def interpolates_by_torch() -> tuple[Any, Batch]:
    """A penalty on interpolates drawn by torch, spectral norm, metrics by item()."""
    netD = nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(64, 12)), nn.Softplus(),
        nn.utils.spectral_norm(nn.Linear(12, 1)),
    )  # fmt: skip
    G = nn.Sequential(nn.Linear(3, 64), nn.Tanh())
    loss: dict[str, float] = {}

    def critic_loss(x_real: Tensor) -> Tensor:
        z = torch.randn(x_real.size(0), 3)
        with torch.no_grad():
            x_fake = G(z)
        x_real = x_real.flatten(1)
        alpha = torch.rand(x_real.size(0), 1)
        x_hat = (alpha * x_real.data + (1 - alpha) * x_fake.data).requires_grad_(True)
        out = netD(x_hat)
        weight = torch.ones(out.size())
        dydx = torch.autograd.grad(
            outputs=out, inputs=x_hat, grad_outputs=weight, retain_graph=True, create_graph=True
        )[0]
        dydx_l2norm = torch.sqrt(torch.sum(dydx.view(dydx.size(0), -1) ** 2, dim=1))
        d_loss_real, d_loss_fake = -torch.mean(netD(x_real)), torch.mean(netD(x_fake))
        d_loss_gp = torch.mean((dydx_l2norm - 1) ** 2)
        d_loss = d_loss_real + d_loss_fake + 10 * d_loss_gp
        loss["D/loss_real"] = d_loss_real.item()
        loss["D/loss_gp"] = d_loss_gp.item()
        return d_loss

    return critic_loss, lambda: (_images(),)


def r1_penalty() -> tuple[Any, Batch]:
    """The R1 penalty each few steps, the flag set on the caller's images (StyleGAN2)."""
    discriminator = _critic()
    state = {"i": -1}

    def d_r1_loss(real_pred: Tensor, real_img: Tensor) -> Tensor:
        (grad_real,) = autograd.grad(outputs=real_pred.sum(), inputs=real_img, create_graph=True)
        return grad_real.pow(2).reshape(grad_real.shape[0], -1).sum(1).mean()

    def train_d(real_img: Tensor, fake_img: Tensor, d_reg_every: int = 2) -> Tensor:
        state["i"] += 1
        real_pred, fake_pred = discriminator(real_img), discriminator(fake_img)
        d_loss = F.softplus(-real_pred).mean() + F.softplus(fake_pred).mean()
        if state["i"] % d_reg_every == 0:
            real_img.requires_grad = True
            r1_loss = d_r1_loss(discriminator(real_img), real_img)
            d_loss = d_loss + 10 / 2 * r1_loss * d_reg_every + 0 * real_pred[0].squeeze()
        return d_loss

    return train_d, lambda: (_images(), _images())


class _Mapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.Linear(3, 6), nn.LeakyReLU(0.2))
        self.affine = nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3) / 6)
        self.const = nn.Parameter(torch.randn(1, 4, 6, 6))
        self.to_rgb = nn.Conv2d(4, 1, 1)

    def forward(self, z: Tensor) -> Any:
        w = self.map(F.normalize(z, dim=1))
        w = w.unsqueeze(1).repeat(1, 2, 1)
        style = self.affine(w[:, 0]) + 1
        batch = z.shape[0]
        weight = self.weight[None] * style[:, None, :, None, None]
        demod = torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        weight = (weight * demod).view(batch * 4, 4, 3, 3)
        x = self.const.repeat(batch, 1, 1, 1).view(1, batch * 4, 6, 6)
        x = F.conv2d(x, weight, padding=1, groups=batch).view(batch, 4, 6, 6)
        x = F.leaky_relu(x + self.affine(w[:, 1])[:, :, None, None], 0.2)
        return self.to_rgb(x), w


def path_length() -> tuple[Any, Batch]:
    """Path length regularisation with its moving mean, modulated convolutions by groups."""
    generator = _Mapping()
    state = {"mean": torch.zeros(1), "average": 0.0}

    def g_path_regularize(fake: Tensor, latents: Tensor, mean: Tensor, decay: float = 0.01) -> Any:
        noise = torch.randn_like(fake) / math.sqrt(fake.shape[2] * fake.shape[3])
        (grad,) = autograd.grad(outputs=(fake * noise).sum(), inputs=latents, create_graph=True)
        path_lengths = torch.sqrt(grad.pow(2).sum(2).mean(1))
        path_mean = mean + decay * (path_lengths.mean() - mean)
        path_penalty = (path_lengths - path_mean).pow(2).mean()
        return path_penalty, path_mean.detach(), path_lengths

    def loss(noise: Tensor) -> Tensor:
        fake, latents = generator(noise)
        penalty, state["mean"], lengths = g_path_regularize(fake, latents, state["mean"])
        weighted = 2 * 4 * penalty
        weighted = weighted + 0 * fake[0, 0, 0, 0]
        state["average"] = lengths.mean().item()
        return weighted

    return loss, lambda: (torch.randn(3, 3),)


_weight_gradients_disabled = False


@contextlib.contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Switch a global flag, as StyleGAN's own convolutions read it."""
    global _weight_gradients_disabled
    old = _weight_gradients_disabled
    if disable:
        _weight_gradients_disabled = True
    yield
    _weight_gradients_disabled = old


class _Stats:
    """A collector of statistics: moments by name."""

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}

    def report(self, name: str, value: Any) -> Any:
        elems = torch.as_tensor(value).detach().flatten().to(torch.float64)
        moments = torch.stack([torch.ones_like(elems).sum(), elems.sum(), elems.square().sum()])
        if name not in self.moments:
            self.moments[name] = torch.zeros(3, dtype=torch.float64)
        self.moments[name].add_(moments)
        return value


def accumulated_phases() -> tuple[Any, Batch]:
    """A phase of a loss class with profiler ranges, statistics and flags (StyleGAN3)."""
    D, training_stats = _critic(), _Stats()

    def accumulate_gradients(phase: str, real_img: Tensor, fake: Tensor, gain: float) -> Tensor:
        assert phase in ["Dmain", "Dreg", "Dboth"]
        loss_Dgen: Any = 0
        if phase in ["Dmain", "Dboth"]:
            with torch.autograd.profiler.record_function("Dgen_forward"):
                gen_logits = D(fake)
                training_stats.report("Loss/scores/fake", gen_logits)
                training_stats.report("Loss/signs/fake", gen_logits.sign())
                loss_Dgen = F.softplus(gen_logits)
        name = "Dreal" if phase == "Dmain" else "Dr1" if phase == "Dreg" else "Dreal_Dr1"
        with torch.autograd.profiler.record_function(name + "_forward"):
            real_img_tmp = real_img.detach().requires_grad_(phase in ["Dreg", "Dboth"])
            real_logits = D(real_img_tmp)
            training_stats.report("Loss/scores/real", real_logits)
            loss_Dr1: Any = 0
            if phase in ["Dreg", "Dboth"]:
                with (
                    torch.autograd.profiler.record_function("r1_grads"), no_weight_gradients(),
                ):  # fmt: skip
                    r1_grads = torch.autograd.grad(
                        outputs=[real_logits.sum()], inputs=[real_img_tmp], create_graph=True,
                        only_inputs=True,
                    )[0]  # fmt: skip
                r1_penalty = r1_grads.square().sum([1, 2, 3])
                loss_Dr1 = r1_penalty * (10 / 2)
                training_stats.report("Loss/r1_penalty", r1_penalty)
        return (F.softplus(-real_logits) + loss_Dgen + loss_Dr1).mean().mul(gain)

    return accumulate_gradients, lambda: ("Dboth", _images(), _images(), 16.0)


def unrolled_critic() -> tuple[Any, Batch]:
    """A generator's loss through steps of a copied critic with an inner optimizer's rule."""
    D = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    G = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    bce = nn.BCEWithLogitsLoss()

    def g_loop(real: Tensor, z: Tensor, unrolled_steps: int = 2) -> Tensor:
        backup = copy.deepcopy(D.state_dict())
        params = {k: v.clone() for k, v in D.named_parameters()}
        for _ in range(unrolled_steps):
            d_real = torch.func.functional_call(D, params, (real,))
            d_fake = torch.func.functional_call(D, params, (G(z),))
            error = bce(d_real, torch.ones_like(d_real)) + bce(d_fake, torch.zeros_like(d_fake))
            grads = torch.autograd.grad(error, list(params.values()), create_graph=True)
            params = {k: p - 0.3 * g for (k, p), g in zip(params.items(), grads, strict=True)}
        fake = torch.func.functional_call(D, params, (G(z),))
        for name, kept in backup.items():
            assert kept.shape == params[name].shape
        return bce(fake, torch.ones_like(fake))

    return g_loop, lambda: (torch.randn(6, 2), torch.randn(6, 2))


def class_conditional() -> tuple[Any, Batch]:
    """A projection critic with labels, zero-centred penalties on both sides, and BatchNorm."""

    class D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Linear(64, 10), nn.BatchNorm1d(10), nn.SiLU(), nn.Linear(10, 6)
            )
            self.out, self.embed = nn.Linear(6, 1), nn.Embedding(4, 6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = self.features(x.flatten(1))
            return self.out(h).squeeze(1) + (self.embed(y) * h).sum(1)

    net = D()

    def zero_centered_gp(samples: Tensor, critics: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(outputs=critics.sum(), inputs=samples, create_graph=True)
        return g.square().sum([1, 2, 3])

    def loss(real: Tensor, fake: Tensor, y: Tensor) -> dict[str, Tensor]:
        real, fake = real.detach().requires_grad_(True), fake.detach().requires_grad_(True)
        real_logits, fake_logits = net(real, y), net(fake, y)
        relativistic = real_logits - fake_logits
        r1, r2 = zero_centered_gp(real, real_logits), zero_centered_gp(fake, fake_logits)
        adversarial = F.softplus(-relativistic)
        total = adversarial + 0.5 * (r1 + r2)
        return {"loss": total.mean(), "r1": r1.mean().detach(), "r2": r2.mean().detach()}

    return loss, lambda: (_images(), _images(), torch.randint(4, (4,)))


LOSSES = (
    Loss(wgan_gp, way=BY_LAYER),
    Loss(interpolates_by_torch, is_slow=True),
    Loss(r1_penalty),
    Loss(path_length, is_slow=True),
    Loss(accumulated_phases, is_slow=True),
    Loss(unrolled_critic, is_slow=True),
    Loss(class_conditional, is_slow=True),
)
