"""Physics-informed networks: frameworks with caches and conditions, and research codes."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.zoo.row import BY_LAYER, Batch, Loss


def _mlp(sizes: list[int], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for m, n in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(m, n), activation()]
    return nn.Sequential(*layers[:-1])


# ---- a framework with a cache of Jacobians


class _Jacobian:
    def __init__(self, ys: Tensor, xs: Tensor) -> None:
        self.ys, self.xs = ys, xs
        self.dim_y, self.dim_x = ys.shape[1], xs.shape[1]
        self.J: dict[int, Tensor] = {}

    def __call__(self, i: int = 0, j: int | None = None) -> Tensor:
        if not 0 <= i < self.dim_y:
            raise ValueError(f"i={i} is not valid.")
        if i not in self.J:
            y = self.ys[:, i : i + 1] if self.dim_y > 1 else self.ys
            self.J[i] = torch.autograd.grad(
                y, self.xs, grad_outputs=torch.ones_like(y), create_graph=True
            )[0]
        return self.J[i] if j is None or self.dim_x == 1 else self.J[i][:, j : j + 1]


class _Jacobians:
    def __init__(self) -> None:
        self.Js: dict[Any, _Jacobian] = {}

    def __call__(self, ys: Tensor, xs: Tensor, i: int = 0, j: int | None = None) -> Tensor:
        key = (ys, xs)
        if key not in self.Js:
            self.Js[key] = _Jacobian(ys, xs)
        return self.Js[key](i, j)

    def clear(self) -> None:
        self.Js = {}


def cached_jacobians() -> tuple[Any, Batch]:
    """Burgers' equation in a framework that keeps Jacobians in a dictionary, as DeepXDE does."""
    net = _mlp([2, 12, 12, 1])
    jacobian = _Jacobians()

    def pde(x: Tensor, y: Tensor) -> Tensor:
        dy_x = jacobian(y, x, i=0, j=0)
        dy_t = jacobian(y, x, i=0, j=1)
        dy_xx = jacobian(dy_x, x, i=0, j=0)
        return dy_t + y * dy_x - 0.01 / np.pi * dy_xx

    def outputs_losses(net: nn.Module, inputs: Tensor, targets: Tensor, num_bcs: list[int]) -> Any:
        inputs.requires_grad_()
        outputs = net(inputs)
        bcs_start = np.cumsum([0, *num_bcs])
        error_f = pde(inputs, outputs)[bcs_start[-1] :]
        losses = [torch.mean(torch.square(error_f))]
        for i in range(len(num_bcs)):
            beg, end = bcs_start[i], bcs_start[i + 1]
            losses.append(torch.mean(torch.square(outputs[beg:end] - targets[beg:end])))
        jacobian.clear()
        return torch.sum(torch.stack(losses))

    return outputs_losses, lambda: (net, torch.rand(24, 2), torch.rand(8, 1), [5, 3])


def gradient_by_key() -> tuple[Any, Batch]:
    """A cache of derivatives keyed by addresses, looked up with try and except KeyError."""
    net = _mlp([2, 10, 10, 2])
    cache: dict[Any, Tensor] = {}

    def D(y: Tensor, x: Tensor) -> Tensor:
        key = (y.data_ptr(), x.data_ptr(), id(y))
        try:
            return cache[key]
        except KeyError:
            cache[key] = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        return cache[key]

    def loss(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        out = net(x)
        u, v = out[:, 0:1], out[:, 1:2]
        continuity = D(u, x)[:, 0:1] + D(v, x)[:, 1:2]
        vorticity = D(v, x)[:, 0:1] - D(u, x)[:, 1:2]
        laplace = D(D(u, x)[:, 0:1], x)[:, 0:1] + D(D(u, x)[:, 1:2], x)[:, 1:2]
        cache.clear()
        return (continuity**2 + (vorticity - 1) ** 2 + laplace**2).mean()

    return loss, lambda: (torch.rand(16, 2),)


# ---- tensors that carry labels


class LabelTensor(Tensor):
    """A tensor whose columns have names."""

    @staticmethod
    def __new__(cls, x: Tensor, labels: list[str]) -> LabelTensor:
        return x.as_subclass(cls)

    def __init__(self, x: Tensor, labels: list[str]) -> None:
        self._labels = list(labels)

    @property
    def labels(self) -> list[str]:
        return getattr(self, "_labels", [])

    def extract(self, label: str | list[str]) -> LabelTensor:
        labels = [label] if isinstance(label, str) else label
        columns = [self.labels.index(name) for name in labels]
        return LabelTensor(self.as_subclass(Tensor)[:, columns], labels)


def labelled_conditions() -> tuple[Any, Batch]:
    """Poisson's equation by conditions on tensors with labels, as in PINA."""
    net = _mlp([2, 12, 1])

    def grad(output: LabelTensor, point: LabelTensor, wrt: list[str]) -> LabelTensor:
        (g,) = torch.autograd.grad(
            output, point, grad_outputs=torch.ones_like(output), create_graph=True
        )
        names = [f"d{output.labels[0]}d{i}" for i in point.labels]
        return LabelTensor(g.as_subclass(Tensor), names).extract(
            [f"d{output.labels[0]}d{i}" for i in wrt]
        )

    def laplace(point: LabelTensor, u: LabelTensor) -> Tensor:
        force = torch.sin(point.extract("x") * torch.pi) * torch.sin(point.extract("y") * torch.pi)
        delta = 0
        first = grad(u, point, ["x", "y"])
        for name, axis in (("dudx", "x"), ("dudy", "y")):
            delta = delta + grad(first.extract(name), point, [axis])
        return delta - force

    def boundary(point: LabelTensor, u: LabelTensor) -> Tensor:
        return u.extract("u")

    conditions = {"D": laplace, "gamma1": boundary}

    def training_step(batch: dict[str, Tensor]) -> Tensor:
        losses = {}
        for name, raw in batch.items():
            point = LabelTensor(raw, ["x", "y"])
            point.requires_grad_()
            u = LabelTensor(net(point.as_subclass(Tensor)), ["u"])
            residual = conditions[name](point, u)
            losses[name] = residual.as_subclass(Tensor).pow(2).mean()
        return sum(losses.values())

    return training_step, lambda: ({"D": torch.rand(12, 2), "gamma1": torch.rand(5, 2)},)


# ---- differential operators that check their arguments


class _IVP:
    def __init__(self, t_0: float, u_0: float) -> None:
        self.t_0, self.u_0 = t_0, u_0

    def enforce(self, net: nn.Module, t: Tensor) -> Tensor:
        return self.u_0 + (1 - torch.exp(-t + self.t_0)) * net(t)


def safe_diff(u: Tensor, t: Tensor, order: int = 1) -> Tensor:
    """Return a derivative of a column in a column, the shapes checked."""
    if len(u.shape) != 2 or u.shape != t.shape:
        raise ValueError(f"u.shape={u.shape} and t.shape={t.shape}")
    ones = torch.ones_like(u)
    der = torch.cat(
        [torch.autograd.grad(ui, t, grad_outputs=ones, create_graph=True)[0] for ui in [u]], dim=1
    )
    for _ in range(1, order):
        (der,) = torch.autograd.grad(der, t, grad_outputs=ones, create_graph=True)
    return der


def enforced_conditions() -> tuple[Any, Batch]:
    """A system of ordinary equations with enforced conditions and metrics, as in neurodiffeq."""
    nets = nn.ModuleList([_mlp([1, 10, 10, 1]) for _ in range(2)])
    conditions = [_IVP(0.0, 1.5), _IVP(0.0, 1.0)]
    history: dict[str, list[float]] = defaultdict(list)

    def diff_eqs(u: Tensor, v: Tensor, t: Tensor) -> list[Tensor]:
        return [safe_diff(u, t) - (u - u * v), safe_diff(v, t, order=2) - (u * v - v)]

    def run_batch(t: Tensor) -> Tensor:
        batch = [t.reshape(-1, 1).requires_grad_(True)]
        funcs = [con.enforce(net, *batch) for net, con in zip(nets, conditions, strict=True)]
        residuals = torch.cat(diff_eqs(*funcs, *batch), dim=1)
        loss = (residuals**2).mean()
        history["train_loss"].append(loss.item())
        return loss

    return run_batch, lambda: (torch.linspace(0.0, 1.0, 14) + 0.05 * torch.rand(14),)


# ---- derivatives asked for by name


class _Derivatives(nn.Module):
    """Fills in derivatives by their names: ``u__x__x``."""

    def __init__(self, wanted: list[str]) -> None:
        super().__init__()
        self.wanted = sorted(wanted, key=lambda name: name.count("__"))
        self.cache: list[Tensor] = []

    def forward(self, known: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        by_base: dict[str, list[str]] = defaultdict(list)
        for name in self.wanted:
            base, _, var = name.rpartition("__")
            by_base[base].append(var)
        for base, variables in by_base.items():
            y = {**known, **out}[base]
            ones: list[Tensor | None] = [torch.ones_like(y, device=y.device)]
            grads = torch.autograd.grad(
                [y], [known[v] for v in variables], grad_outputs=ones, create_graph=True,
                allow_unused=True,
            )  # fmt: skip
            for v, g in zip(variables, grads, strict=True):
                out[f"{base}__{v}"] = torch.zeros_like(known[v]) if g is None else g
        return out


def graph_of_nodes() -> tuple[Any, Batch]:
    """The wave equation as a graph of nodes that are evaluated by name, as in Modulus."""
    net = _mlp([2, 12, 12, 1], nn.SiLU)
    derivatives = _Derivatives(["u__x", "u__x__x", "u__t", "u__t__t"])

    def net_node(v: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"u": net(torch.cat([v["x"], v["t"]], dim=1))}

    def wave(v: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"wave": v["u__t__t"] - v["c"] ** 2 * v["u__x__x"]}

    evaluation_order = [net_node, derivatives, wave]

    def constraint_loss(invar: dict[str, Tensor], outvar: dict[str, Tensor], step: int) -> Any:
        invar = {k: v.detach().clone() for k, v in invar.items()}
        for key in ("x", "t"):
            invar[key].requires_grad_(True)
        for node in evaluation_order:
            invar.update(node(invar))
        losses = {}
        for key, value in outvar.items():
            l = (invar[key] - value).pow(2)
            if "lambda_" + key in invar:
                l = invar["lambda_" + key] * l
            losses[key] = l.mean()
        if step % 100 == 0:
            print(f"[step: {step:10d}] losses: {sorted(losses)}")
        return torch.stack(list(losses.values())).sum()

    def batch() -> tuple[Any, ...]:
        invar = {k: torch.rand(14, 1) for k in ("x", "t", "lambda_wave")}
        invar["c"] = torch.full((14, 1), 1.2)
        return invar, {"wave": torch.zeros(14, 1), "u": torch.zeros(14, 1)}, 7

    return constraint_loss, batch


# ---- weights that balance the terms


class _Balanced:
    """Terms weighted by statistics of their gradients (Wang, Teng and Perdikaris)."""

    def __init__(self) -> None:
        self.net = _mlp([2, 10, 10, 1])
        self.adaptive_constant = torch.tensor(1.0)
        self.beta = 0.9
        self.logs: dict[str, list[float]] = {"constant": []}

    def loss(self, x_r: Tensor, x_b: Tensor, u_b: Tensor) -> Tensor:
        x_r.requires_grad_(True)
        u = self.net(x_r)
        du = torch.autograd.grad(u.sum(), x_r, create_graph=True)[0]
        du_xx = torch.autograd.grad(du[:, 0].sum(), x_r, create_graph=True)[0][:, 0]
        du_yy = torch.autograd.grad(du[:, 1].sum(), x_r, create_graph=True)[0][:, 1]
        loss_r = torch.mean((du_xx + du_yy + u.squeeze()) ** 2)
        loss_u = torch.mean((self.net(x_b) - u_b) ** 2)
        grad_r = torch.autograd.grad(loss_r, self.net.parameters(), retain_graph=True,
                                     allow_unused=True)  # fmt: skip
        grad_u = torch.autograd.grad(loss_u, self.net.parameters(), retain_graph=True,
                                     allow_unused=True)  # fmt: skip
        max_r = torch.max(torch.stack([g.abs().max() for g in grad_r if g is not None]))
        mean_u = torch.mean(torch.cat([g.abs().flatten() for g in grad_u if g is not None]))
        new = (max_r / mean_u).detach()
        self.adaptive_constant = self.beta * self.adaptive_constant + (1 - self.beta) * new
        self.logs["constant"].append(self.adaptive_constant.item())
        return loss_r + self.adaptive_constant * loss_u


def learning_rate_annealing() -> tuple[Any, Batch]:
    """Terms weighted by the largest and the mean gradients of the parameters."""
    model = _Balanced()
    return model.loss, lambda: (torch.rand(12, 2), torch.rand(6, 2), torch.rand(6, 1))


def neural_tangent_weights() -> tuple[Any, Batch]:
    """Terms weighted by traces of the neural tangent kernel, row by row."""
    net = _mlp([1, 8, 1])

    def trace_K(out: Tensor) -> Tensor:
        total = 0
        for i in range(out.shape[0]):
            grads = torch.autograd.grad(
                out[i], net.parameters(), retain_graph=True, allow_unused=True
            )
            total = total + sum((g**2).sum() for g in grads if g is not None)
        return total

    def loss(x: Tensor, xb: Tensor) -> Tensor:
        x = x.requires_grad_()
        u = net(x)
        u_x = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]
        r = u_x + 2 * u
        ub = net(xb)
        with torch.no_grad():
            pass
        tr_r, tr_u = trace_K(r).detach(), trace_K(ub).detach()
        total = tr_r + tr_u
        return total / tr_r * (r**2).mean() + total / tr_u * ((ub - 1) ** 2).mean()

    return loss, lambda: (torch.rand(5, 1), torch.rand(3, 1))


def causal_weights() -> tuple[Any, Batch]:
    """The Allen–Cahn equation with weights that respect causality; matrices made by NumPy."""
    net = _mlp([2, 10, 10, 1])
    n_t, tol = 4, 1.0
    M = torch.from_numpy(np.triu(np.ones((n_t, n_t)), k=1).T)

    def residual(tx: Tensor) -> Tensor:
        u = net(tx)
        g = torch.autograd.grad(u, tx, torch.ones_like(u), create_graph=True)[0]
        u_t, u_x = g[:, 0:1], g[:, 1:2]
        u_xx = torch.autograd.grad(u_x, tx, torch.ones_like(u_x), create_graph=True)[0][:, 1:2]
        return u_t - 0.0001 * u_xx + 5 * u**3 - 5 * u

    def loss(tx: Tensor) -> tuple[Tensor, dict[str, float]]:
        tx = tx.detach().requires_grad_(True)
        order = torch.argsort(tx[:, 0].detach())
        r = residual(tx)[order].reshape(n_t, -1)
        l_t = torch.mean(r**2, dim=1)
        with torch.no_grad():
            W = torch.exp(-tol * (M @ l_t))
        return torch.mean(W * l_t), {"min weight": W.min().item()}

    return loss, lambda: (torch.rand(16, 2),)


def gradient_enhanced() -> tuple[Any, Batch]:
    """A residual and its own gradient, each dimension by itself (gPINN)."""
    net = _mlp([2, 10, 10, 1])
    start = time.time()

    def loss(x: Tensor, verbose: bool = False) -> Tensor:
        x.requires_grad = True
        u = net(x)
        terms = torch.zeros(1)
        first = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]
        laplacian = 0.0
        for d in range(x.shape[1]):
            second = torch.autograd.grad(first[:, d].sum(), x, create_graph=True)[0]
            laplacian += second[:, d]
        res = laplacian + 1.0
        terms += (res**2).mean()
        dres = torch.autograd.grad(res.sum(), x, create_graph=True)[0]
        for d in range(x.shape[1]):
            terms += 0.01 * (dres[:, d] ** 2).mean()
        if verbose:
            sys.stderr.write(f"{time.time() - start:.1f} s\n")
        return terms.squeeze()

    return loss, lambda: (torch.rand(10, 2),)


def weak_form() -> tuple[Any, Batch]:
    """A weak form, its quadrature and test functions made by NumPy inside the loss (hp-VPINN)."""
    net = _mlp([1, 10, 10, 1])
    n_test = 3

    def loss(f: Tensor) -> Tensor:
        points, weights = np.polynomial.legendre.leggauss(8)
        x = torch.tensor(points).unsqueeze(1).requires_grad_()
        w = torch.as_tensor(weights).unsqueeze(1)
        u = net(x)
        u_x = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)[0]
        total = 0.0
        for k in range(1, n_test + 1):
            basis = np.polynomial.legendre.Legendre.basis(k + 1) - (
                np.polynomial.legendre.Legendre.basis(k - 1)
            )
            v_x = torch.from_numpy(basis.deriv()(points)).unsqueeze(1)
            v = torch.from_numpy(basis(points)).unsqueeze(1)
            total = total + (torch.sum(w * u_x * v_x) - torch.sum(w * f * v)) ** 2
        ends = net(torch.tensor([[-1.0], [1.0]]))
        return total / n_test + ends.pow(2).mean()

    return loss, lambda: (torch.rand(8, 1),)


class _Inverse:
    """Identification of two coefficients, after the code of the first PINN paper."""

    def __init__(self) -> None:
        self.lambda_1 = nn.Parameter(torch.tensor([0.3]))
        self.lambda_2 = nn.Parameter(torch.tensor([-3.0]))
        self.dnn = _mlp([2, 10, 10, 1])
        self.dnn.register_parameter("lambda_1", self.lambda_1)
        self.dnn.register_parameter("lambda_2", self.lambda_2)
        self.iter = 0

    def net_f(self, x: Tensor, t: Tensor) -> Tensor:
        u = self.dnn(torch.cat([x, t], dim=1))
        u_t, u_x = torch.autograd.grad(
            u, [t, x], grad_outputs=torch.ones_like(u), retain_graph=True, create_graph=True
        )
        u_xx = torch.autograd.grad(
            u_x, x, grad_outputs=torch.ones_like(u_x), retain_graph=True, create_graph=True
        )[0]
        return u_t + self.lambda_1 * u * u_x - torch.exp(self.lambda_2) * u_xx

    def loss_func(self, x: Tensor, t: Tensor, u: Tensor) -> Tensor:
        u_pred = self.dnn(torch.cat([x, t], dim=1))
        f_pred = self.net_f(x, t)
        loss = torch.mean((u - u_pred) ** 2) + torch.mean(f_pred**2)
        self.iter += 1
        if self.iter % 2 == 0:
            print(f"Iter {self.iter}, Loss: {loss.item():.5e}, l1: {self.lambda_1.item():.5f}")
        return loss


def inverse_problem() -> tuple[Any, Batch]:
    """Identification of coefficients, with a counter and a print each few steps."""
    model = _Inverse()

    def batch() -> tuple[Any, ...]:
        x, t = (torch.rand(14, 1).requires_grad_(True) for _ in range(2))
        return x, t, torch.rand(14, 1)

    return model.loss_func, batch


def interfaces_by_mask() -> tuple[Any, Batch]:
    """Two subdomains chosen by a mask of the points, joined at an interface (XPINN)."""
    nets = nn.ModuleList([_mlp([2, 8, 1]), _mlp([2, 8, 1], nn.SiLU)])

    def laplacian(net: nn.Module, x: Tensor) -> Tensor:
        u = net(x)
        g = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        return sum(
            torch.autograd.grad(g[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(2)
        )

    def loss(x: Tensor, x_i: Tensor) -> Tensor:
        inside = x[:, 0] < 0.5
        total = torch.tensor(0.0)
        for net, mask in ((nets[0], inside), (nets[1], ~inside)):
            part = x[mask].detach().requires_grad_(True)
            if part.shape[0] > 0:
                total = total + (laplacian(net, part) - 1).pow(2).mean()
        x_i = x_i.clone().requires_grad_()
        u0, u1 = nets[0](x_i), nets[1](x_i)
        g0 = torch.autograd.grad(u0.sum(), x_i, create_graph=True)[0]
        g1 = torch.autograd.grad(u1.sum(), x_i, create_graph=True)[0]
        return total + (u0 - u1).pow(2).mean() + (g0 - g1)[:, 0].pow(2).mean()

    return loss, lambda: (torch.rand(14, 2), torch.rand(4, 2))


def self_adaptive_weights() -> tuple[Any, Batch]:
    """Trainable weights for each point, and points added where the residual is largest."""
    net = _mlp([2, 10, 1])
    weights = nn.Parameter(torch.rand(16, 1))

    def residual(x: Tensor) -> Tensor:
        x.requires_grad_(True)
        u = net(x)
        (g,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
        return g[:, 1:2] + u * g[:, 0:1]

    def loss(x: Tensor, pool: Tensor) -> Tensor:
        res = residual(pool).abs().detach().squeeze()
        _, idx = torch.topk(res, 4)
        x = torch.cat([x, pool[idx].detach()], dim=0)
        r = residual(x)
        return (weights.sigmoid() * r**2).mean()

    return loss, lambda: (torch.rand(12, 2), torch.rand(20, 2))


def operator_learning() -> tuple[Any, Batch]:
    """A physics-informed operator network on batches that are dictionaries."""
    branch, trunk = _mlp([6, 10, 8]), _mlp([2, 10, 8])
    metrics: dict[str, float] = {}

    def forward(batch: dict[str, Tensor]) -> Tensor:
        return torch.einsum("bi,bi->b", branch(batch["u"]), trunk(batch["y"]))[:, None]

    def step(batch: dict[str, Tensor]) -> Tensor:
        batch["y"].requires_grad_(True)
        s = forward(batch)
        ds = torch.autograd.grad(
            outputs=s, inputs=batch["y"], grad_outputs=torch.ones_like(s),
            create_graph=True, retain_graph=True, only_inputs=True,
        )[0]  # fmt: skip
        s_x, s_t = torch.split(ds, 1, dim=1)
        s_xx = torch.autograd.grad(s_x.sum(), batch["y"], create_graph=True)[0][:, 0:1]
        loss_pde = torch.nn.functional.mse_loss(s_t - 0.01 * s_xx - s**2, batch["f"])
        loss_bc = s.mean() ** 2
        loss = loss_pde + loss_bc
        metrics.update({"loss": loss.item(), "pde": loss_pde.item()})
        if torch.isnan(loss):
            raise ValueError("loss is NaN")
        return loss

    def batch() -> tuple[Any, ...]:
        return ({"u": torch.randn(9, 6), "y": torch.rand(9, 2), "f": torch.rand(9, 1)},)

    return step, batch


LOSSES = (
    Loss(cached_jacobians, is_slow=True),
    Loss(gradient_by_key, is_slow=True),
    Loss(labelled_conditions, way=BY_LAYER),
    Loss(enforced_conditions, is_slow=True),
    Loss(graph_of_nodes, is_slow=True),
    Loss(learning_rate_annealing, is_slow=True),
    Loss(neural_tangent_weights, is_slow=True),
    Loss(causal_weights, is_slow=True),
    Loss(gradient_enhanced, is_slow=True),
    Loss(weak_form, way=BY_LAYER),
    Loss(inverse_problem, is_slow=True),
    Loss(interfaces_by_mask, way=BY_LAYER, is_slow=True),
    Loss(self_adaptive_weights),
    Loss(operator_learning, is_slow=True),
)
