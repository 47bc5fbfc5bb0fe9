"""Complex tensors inside of derivatives: Fourier layers, writes to a part of a spectrum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import optimize_nested
from tests.host_blocks import Spectral
from tests.oracle import check

D, C = torch.float64, torch.complex128


class Spectral1d(nn.Module):
    """A Fourier layer: the lowest modes are mixed, all others are zero."""

    def __init__(self, modes: int = 3, channels: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.modes = modes
        self.mix = nn.Parameter(torch.randn(channels, channels, modes, dtype=C) / channels)
        self.lift, self.out = nn.Linear(1, channels).to(D), nn.Linear(channels, 1).to(D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).transpose(1, 2)
        spectrum = torch.fft.rfft(h)
        kept = torch.zeros_like(spectrum)
        low = spectrum[:, :, : self.modes]
        kept[:, :, : self.modes] = torch.einsum("bim,iom->bom", low, self.mix)
        h = torch.fft.irfft(kept, n=h.shape[-1]) + h
        return self.out(F.gelu(h).transpose(1, 2))


class Spectral2d(nn.Module):
    """The same in two dimensions: two corners of the spectrum are mixed."""

    def __init__(self, modes: int = 2, channels: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.modes = modes
        shape = 2, channels, channels, modes, modes
        self.mix = nn.Parameter(torch.randn(*shape, dtype=C) / channels)
        self.lift, self.out = nn.Conv2d(1, channels, 1).to(D), nn.Conv2d(channels, 1, 1).to(D)

    def forward(self, x: Tensor) -> Tensor:
        h, m = self.lift(x), self.modes
        spectrum = torch.fft.rfft2(h)
        kept = torch.zeros_like(spectrum)
        for part, rows in zip(self.mix, (slice(None, m), slice(-m, None)), strict=True):
            mixed = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, rows, :m], part)
            kept[:, :, rows, :m] = mixed
        return self.out(torch.tanh(torch.fft.irfft2(kept, s=h.shape[-2:]) + h))


class Complexed(nn.Module):
    """A network with a complex step in the middle."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step = step
        self.first, self.last = nn.Linear(6, 6).to(D), nn.Linear(6, 1).to(D)
        self.w = nn.Parameter(torch.randn(6, dtype=C))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.step(torch.tanh(self.first(x)), self.w)))


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    return grad(net(p).square().sum(), p, create_graph=True)[0].square().sum()


def of_parameters(net: nn.Module, x: Tensor) -> Tensor:
    grads = grad(net(x).square().sum(), list(net.parameters()), create_graph=True)
    return torch.stack([g.abs().square().sum() for g in grads]).sum()


def along(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(net, (x,), (x.cos(),))[1].square().sum()


def twice(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = grad(net(p).square().sum(), p, create_graph=True)
    return grad((g * x.sin()).sum(), p, create_graph=True)[0].square().sum()


LOSSES: list[Any] = [penalty, of_parameters, along, twice]


@pytest.mark.parametrize("loss", LOSSES)
def test_fourier_layer(loss: Callable[..., Tensor]) -> None:
    check(loss, [Spectral1d()], torch.linspace(0, 1, 14, dtype=D).reshape(2, 7, 1).sin())


def test_fourier_layer_of_two_dimensions() -> None:
    check(penalty, [Spectral2d()], torch.linspace(0, 1, 50, dtype=D).reshape(2, 1, 5, 5).sin())


def written(h: Tensor, w: Tensor) -> Tensor:
    spectrum = torch.fft.fft(h)
    kept = torch.zeros_like(spectrum)
    kept[:, 2] = spectrum[:, 1] * w[1]
    kept[:, :2] += spectrum[:, 3:5] * w[:2]
    kept[:, torch.tensor([3, 5])] = spectrum[:, torch.tensor([1, 4])].conj()
    return torch.fft.ifft(kept).real


def joined(h: Tensor, w: Tensor) -> Tensor:
    spectrum = torch.fft.fft(h)
    cat = torch.cat([spectrum[:, :3] * w[:3], spectrum[:, 3:].conj()], -1)
    return torch.stack([cat, torch.polar(h**2 + 1, h)], -1).sum(-1).abs()


def viewed(h: Tensor, w: Tensor) -> Tensor:
    z = torch.view_as_complex(torch.stack([h + 3, h**2], -1)) * w
    z = z.clone()
    z.real[:, 1] = h[:, 0]
    return torch.view_as_real(z * w.conj()).square().sum(-1) + z.angle()


def of_an_exponential(h: Tensor, w: Tensor) -> Tensor:
    return torch.exp(1j * h * w).real


@pytest.mark.parametrize("loss", [penalty, along])
@pytest.mark.parametrize("step", [written, joined, viewed, of_an_exponential])
def test_complex_step(step: Callable[..., Tensor], loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(1)
    check(loss, [Complexed(step)], torch.randn(3, 6, dtype=D))


def test_spectra_between_levels() -> None:
    """Autograd hands a layer's derivatives spectra whose conjugation is put off."""

    def penalty(net: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        z = torch.fft.rfft(g, dim=1)
        g = g + torch.fft.irfft(z * 1j * torch.arange(3), n=4, dim=1)
        return g.square().mean()

    torch.manual_seed(0)
    net = nn.Sequential(Spectral(), nn.GELU(), Spectral()).double()
    x = torch.randn(5, 4, dtype=D)
    expected = torch.autograd.grad(penalty(net, x), net.parameters())
    for layer in net:
        optimize_nested(layer, backend="eager", verify=False)
    found = torch.autograd.grad(penalty(net, x), net.parameters())
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)
