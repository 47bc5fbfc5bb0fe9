"""Second-order and influence methods, balancing of tasks, robustness, invariance."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import Tensor, autograd, nn

from tests.zoo.row import PARTLY, Batch, Loss


def _classifier(dim: int = 5, width: int = 8, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, classes))


def _examples(n: int = 8, dim: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, dim), torch.randint(classes, (n,))


def hvp(y: Tensor, w: list[Tensor], v: Any) -> Any:
    """Multiply a Hessian and a vector, as the code of influence functions does."""
    if len(w) != len(v):
        raise ValueError("w and v must have the same length.")
    first_grads = autograd.grad(y, w, retain_graph=True, create_graph=True)
    elemwise_products: Any = 0
    for grad_elem, v_elem in zip(first_grads, v):
        elemwise_products += torch.sum(grad_elem * v_elem.detach())
    return autograd.grad(elemwise_products, w, create_graph=True)


def influence_by_recursion() -> tuple[Any, Batch]:
    """An influence of weighted examples through LiSSA's recursion, as a function of the weights."""
    net = _classifier()
    log_weights = nn.Parameter(torch.zeros(8))

    def s_test(x_t: Tensor, y_t: Tensor, x: Tensor, y: Tensor) -> Any:
        params = [p for p in net.parameters() if p.requires_grad]
        v = autograd.grad(F.cross_entropy(net(x_t), y_t), params)
        h_estimate = [_v.clone() for _v in v]
        for i in range(2):
            loss = (log_weights.exp() * F.cross_entropy(net(x), y, reduction="none")).mean()
            hv = hvp(loss, params, h_estimate)
            h_estimate = [
                _v + (1 - 0.01) * _h_e - _hv / 25.0 for _v, _h_e, _hv in zip(v, h_estimate, hv)
            ]
        return h_estimate

    def loss(x_t: Tensor, y_t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        s = s_test(x_t, y_t, x, y)
        train = (log_weights.exp() * F.cross_entropy(net(x), y, reduction="none")).mean()
        grads = autograd.grad(train, [p for p in net.parameters()], create_graph=True)
        return -sum((g * h).sum() for g, h in zip(grads, s))

    return loss, lambda: (*_examples(4), *_examples(8))


def balanced_tasks() -> tuple[Any, Batch]:
    """GradNorm: norms of the gradients at a shared layer, ratios by NumPy."""
    shared = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
    heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
    weights = nn.Parameter(torch.ones(2))
    state: dict[str, Any] = {"initial": None}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        h = shared(x)
        task_loss = torch.stack(
            [F.mse_loss(head(h).squeeze(1), y[:, i]) for i, head in enumerate(heads)]
        )
        weighted_task_loss = torch.mul(weights, task_loss)
        if state["initial"] is None:
            state["initial"] = task_loss.data.cpu().numpy()
        loss = torch.sum(weighted_task_loss)
        W = shared[2]
        norms = []
        for i in range(len(task_loss)):
            gygw = torch.autograd.grad(
                task_loss[i], W.parameters(), retain_graph=True, create_graph=True
            )
            norms.append(torch.norm(torch.mul(weights[i], gygw[0])))
        norms = torch.stack(norms)
        loss_ratio = task_loss.data.cpu().numpy() / state["initial"]
        inverse_train_rate = loss_ratio / np.mean(loss_ratio)
        mean_norm = np.mean(norms.data.cpu().numpy())
        constant_term = torch.tensor(mean_norm * (inverse_train_rate**0.1), requires_grad=False)
        return loss + torch.sum(torch.abs(norms - constant_term))

    return loss, lambda: (torch.randn(8, 4), torch.randn(8, 2))


def invariant_risk() -> tuple[Any, Batch]:
    """The penalty of invariant risk: a dummy scale made in the loss, even and odd examples."""
    net = _classifier()
    counters = {"update_count": 0}

    def irm_penalty(logits: Tensor, y: Tensor) -> Tensor:
        scale = torch.tensor(1.0).requires_grad_()
        loss_1 = F.cross_entropy(logits[::2] * scale, y[::2])
        loss_2 = F.cross_entropy(logits[1::2] * scale, y[1::2])
        grad_1 = autograd.grad(loss_1, [scale], create_graph=True)[0]
        grad_2 = autograd.grad(loss_2, [scale], create_graph=True)[0]
        return torch.sum(grad_1 * grad_2)

    def update(minibatches: list[tuple[Tensor, Tensor]]) -> Tensor:
        penalty_weight = 100.0 if counters["update_count"] >= 2 else 1.0
        nll: Any = 0.0
        penalty: Any = 0.0
        all_x = torch.cat([x for x, y in minibatches])
        all_logits = net(all_x)
        all_logits_idx = 0
        for i, (x, y) in enumerate(minibatches):
            logits = all_logits[all_logits_idx : all_logits_idx + x.shape[0]]
            all_logits_idx += x.shape[0]
            nll += F.cross_entropy(logits, y)
            penalty += irm_penalty(logits, y)
        nll /= len(minibatches)
        penalty /= len(minibatches)
        loss = nll + (penalty_weight * penalty)
        counters["update_count"] += 1
        return loss

    return update, lambda: ([_examples(6), _examples(4)],)


class _Fishr:
    """Variances of per-sample gradients, matched across domains, their moving averages kept."""

    def __init__(self) -> None:
        self.featurizer = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.classifier = nn.Linear(6, 3)
        self.update_count = nn.Buffer(torch.tensor([0]))
        self.ema: dict[str, Any] = {}

    def variance(self, features: Tensor, y: Tensor) -> dict[str, Tensor]:
        params = dict(self.classifier.named_parameters())

        def one(params: Any, f: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.classifier, params, (f.unsqueeze(0),))
            return F.cross_entropy(logits, y.unsqueeze(0), reduction="sum")

        grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(params, features, y)
        out = OrderedDict()
        for name, g in grads.items():
            g = g.reshape(g.shape[0], -1)
            out[name] = (g - g.mean(dim=0, keepdim=True)).pow(2).mean(dim=0)
        return out

    def update(self, domains: list[tuple[Tensor, Tensor]]) -> Tensor:
        averaged = []
        nll: Any = 0
        for i, (x, y) in enumerate(domains):
            features = self.featurizer(x)
            nll += F.cross_entropy(self.classifier(features), y)
            averaged.append(self.variance(features, y))
        mean = OrderedDict(
            (name, torch.stack([v[name] for v in averaged], dim=0).mean(dim=0))
            for name in averaged[0]
        )
        penalty = 0
        for v in averaged:
            penalty += (
                (torch.cat([v[n] for n in sorted(v)]) - torch.cat([mean[n] for n in sorted(mean)]))
                .pow(2)
                .mean()
            )
        penalty_weight = 0
        if self.update_count >= 1:
            penalty_weight = 10.0
        self.update_count += 1
        return nll / len(domains) + penalty_weight * penalty / len(domains)


def variance_of_gradients() -> tuple[Any, Batch]:
    """Fishr: variances of per-sample gradients by vmap, a penalty that begins with a counter."""
    algorithm = _Fishr()
    return algorithm.update, lambda: ([_examples(6), _examples(6)],)


def trust_region() -> tuple[Any, Batch]:
    """A policy's surrogate along a natural gradient: Fisher products by a divergence."""
    policy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def flat_grad(y: Tensor, **kw: Any) -> Tensor:
        gs = autograd.grad(y, policy.parameters(), **kw)
        return torch.cat([g.reshape(-1) for g in gs])

    def conjugate_gradient(A: Any, b: Tensor, max_iterations: int = 3, delta: float = 0) -> Tensor:
        x = torch.zeros_like(b)
        r = b.clone()
        p = b.clone()
        i = 0
        while i < max_iterations:
            AVP = A(p)
            dot_old = r @ r
            alpha = dot_old / (p @ AVP)
            x_new = x + alpha * p
            if (x - x_new).norm() <= delta:
                return x
            i += 1
            r = r - alpha * AVP
            beta = (r @ r) / dot_old
            p = r + beta * p
            x = x_new
        return x

    def loss(states: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
        distribution = D.Categorical(logits=policy(states))
        old = D.Categorical(probs=distribution.probs.detach().clone())
        ratio = torch.exp(distribution.log_prob(actions) - old.log_prob(actions))
        L = (ratio * advantages).mean()
        KL = D.kl_divergence(old, distribution).mean()
        g = flat_grad(L, retain_graph=True).detach()
        d_kl = flat_grad(KL, create_graph=True)

        def HVP(v: Tensor) -> Tensor:
            return flat_grad(d_kl @ v, retain_graph=True) + 0.1 * v

        search_dir = conjugate_gradient(HVP, g).detach()
        max_length = torch.sqrt(2 * 0.01 / (search_dir @ HVP(search_dir)))
        return -(L * max_length.detach()) + 0.5 * (d_kl @ search_dir) ** 2

    return loss, lambda: (torch.randn(9, 4), torch.randint(2, (9,)), torch.randn(9))


def sharpness_by_lanczos() -> tuple[Any, Batch]:
    """The largest eigenvalue by power iteration of Hessian products, stopped by a tolerance."""
    net = _classifier()

    def group_product(xs: Any, ys: Any) -> Tensor:
        return sum([torch.sum(x * y) for (x, y) in zip(xs, ys)])

    def normalization(v: list[Tensor]) -> list[Tensor]:
        s = group_product(v, v) ** 0.5
        s = s.cpu().item()
        return [vi / (s + 1e-6) for vi in v]

    def loss(x: Tensor, y: Tensor, max_iter: int = 4, tol: float = 1e-1) -> Tensor:
        params = [p for p in net.parameters() if p.requires_grad]
        error = F.cross_entropy(net(x), y)
        grads = autograd.grad(error, params, create_graph=True)
        v = normalization([torch.randn(p.size()) for p in params])
        eigenvalue = None
        for _ in range(max_iter):
            Hv = autograd.grad(grads, params, grad_outputs=v, only_inputs=True, retain_graph=True)
            tmp_eigenvalue = group_product(Hv, v).cpu().item()
            v = normalization([h.detach() for h in Hv])
            if eigenvalue is None:
                eigenvalue = tmp_eigenvalue
            else:
                if abs(eigenvalue - tmp_eigenvalue) / (abs(eigenvalue) + 1e-6) < tol:
                    break
                eigenvalue = tmp_eigenvalue
        Hv = autograd.grad(grads, params, grad_outputs=v, create_graph=True)
        return error + 0.1 * group_product(Hv, v)

    return loss, lambda: _examples(8)


def gauss_newton_products() -> tuple[Any, Batch]:
    """A Gauss–Newton product by two transposed products with a dummy cotangent, in a norm."""
    net = _classifier()

    def Rop(ys: Tensor, xs: list[Tensor], vs: list[Tensor]) -> Tensor:
        w = torch.zeros_like(ys, requires_grad=True)
        gs = autograd.grad(
            ys, xs, grad_outputs=w, create_graph=True, retain_graph=True, allow_unused=True
        )
        return autograd.grad(gs, w, grad_outputs=vs, create_graph=True, allow_unused=True)[0]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        params = list(net.parameters())
        vs = [torch.randn_like(p) for p in params]
        logits = net(x)
        error = F.cross_entropy(logits, y)
        Jv = Rop(logits, params, vs)
        (dl,) = autograd.grad(error, logits, create_graph=True)
        (HJv,) = autograd.grad(dl, logits, grad_outputs=Jv, create_graph=True)
        GJv = autograd.grad(logits, params, grad_outputs=HJv, create_graph=True)
        return error + 0.1 * sum((g * v).sum() for g, v in zip(GJv, vs))

    return loss, lambda: _examples(8)


def double_backpropagation() -> tuple[Any, Batch]:
    """An adversarial step and a penalty on the gradient of the input, drawn without gradients."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 3)
    )

    def attack(x: Tensor, y: Tensor, eps: float = 0.1, steps: int = 2) -> Tensor:
        net.eval()
        x_adv = x.detach() + 0.001 * torch.randn(x.shape).detach()
        for _ in range(steps):
            x_adv.requires_grad_()
            with torch.enable_grad():
                loss_adv = F.cross_entropy(net(x_adv), y)
            grad = autograd.grad(loss_adv, [x_adv])[0]
            x_adv = x_adv.detach() + 0.05 * torch.sign(grad.detach())
            x_adv = torch.min(torch.max(x_adv, x - eps), x + eps)
        net.train()
        return x_adv

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x_adv = attack(x, y)
        x = x.detach().requires_grad_(True)
        natural = F.cross_entropy(net(x), y)
        (g,) = autograd.grad(natural, x, create_graph=True)
        robust = F.cross_entropy(net(x_adv), y)
        return natural + robust + 0.5 * g.flatten(1).norm(dim=1).pow(2).mean()

    return loss, lambda: (torch.randn(4, 1, 6, 6), torch.randint(3, (4,)))


def jacobian_projections() -> tuple[Any, Batch]:
    """A Jacobian's norm by projections, a class that normalises and tests for its device."""
    net = _classifier(6, 10, 4)

    class JacobianReg(nn.Module):
        def __init__(self, n: int = 1) -> None:
            assert n == -1 or n > 0
            self.n = n
            super().__init__()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            B, C = y.shape
            num_proj = C if self.n == -1 else self.n
            J2: Any = 0
            for ii in range(num_proj):
                if self.n == -1:
                    v = torch.zeros(B, C)
                    v[:, ii] = 1
                else:
                    v = self._random_vector(C=C, B=B)
                if x.is_cuda:
                    v = v.cuda()
                Jv = self._jacobian_vector_product(y, x, v, create_graph=True)
                J2 += C * torch.norm(Jv) ** 2 / (num_proj * B)
            return (1 / 2) * J2

        def _random_vector(self, C: int, B: int) -> Tensor:
            if C == 1:
                return torch.ones(B)
            v = torch.randn(B, C)
            arxilirary_zero = torch.zeros(B, C)
            vnorm = torch.norm(v, 2, 1, True)
            return torch.addcdiv(arxilirary_zero, 1.0, v, vnorm)

        def _jacobian_vector_product(
            self, y: Tensor, x: Tensor, v: Tensor, create_graph: bool
        ) -> Any:
            flat_y, flat_v = y.reshape(-1), v.reshape(-1)
            (grad_x,) = autograd.grad(
                flat_y, x, flat_v, retain_graph=True, create_graph=create_graph
            )
            return grad_x

    reg = JacobianReg(n=2)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x.requires_grad = True
        out = net(x)
        return F.cross_entropy(out, y) + 0.01 * reg(x, out)

    return loss, lambda: _examples(6, 6, 4)


def contractive_autoencoder() -> tuple[Any, Batch]:
    """A contractive autoencoder: a whole Jacobian by functional.jacobian, and by hand."""
    encoder, decoder = nn.Sequential(nn.Linear(6, 3), nn.Sigmoid()), nn.Linear(3, 6)

    def loss(x: Tensor) -> tuple[Tensor, float]:
        x = x.requires_grad_(True)
        h = encoder(x)
        mse = F.mse_loss(decoder(h), x)
        h.backward(torch.ones_like(h), retain_graph=True) if False else None
        J = torch.autograd.functional.jacobian(lambda x: encoder(x).sum(0), x, create_graph=True)
        contractive = J.pow(2).sum() / x.shape[0]
        total = mse + 1e-2 * contractive
        return total, contractive.item()

    return loss, lambda: (torch.rand(7, 6),)


def agreement_of_domains() -> tuple[Any, Batch]:
    """Inner products of the gradients of domains, by a sum over a generator."""
    net = _classifier()

    def loss(batches: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        grads: dict[str, Any] = defaultdict(list)
        total: Any = 0.0
        for name, (x, y) in batches.items():
            error = F.cross_entropy(net(x), y)
            total += error
            for (pname, p), g in zip(
                net.named_parameters(),
                autograd.grad(error, net.parameters(), create_graph=True, retain_graph=True),
            ):
                grads[pname].append(g)
        agreement = sum(torch.sum(a * b) for a, b in (grads[n][:2] for n in grads))
        norm = math.sqrt(sum(p.numel() for p in net.parameters()))
        return total - agreement / norm

    return loss, lambda: ({"photo": _examples(6), "sketch": _examples(6)},)


def differentiable_search() -> tuple[Any, Batch]:
    """Architecture weights through one step of the network's own, by Hessian products (DARTS)."""
    ops = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), a) for a in (nn.ReLU(), nn.Tanh())])
    head = nn.Linear(5, 3)
    alphas = nn.Parameter(1e-3 * torch.randn(2))
    network = nn.ModuleDict({"ops": ops, "head": head})

    def forward(x: Tensor) -> Tensor:
        w = F.softmax(alphas, dim=-1)
        return head(sum(wi * op(x) for wi, op in zip(w, ops)))

    def loss(x: Tensor, y: Tensor, xv: Tensor, yv: Tensor, eta: float = 0.1) -> Tensor:
        weights = [p for n, p in network.named_parameters()]
        train = F.cross_entropy(forward(x), y)
        grads = autograd.grad(train, weights, create_graph=True)
        dw = [g.detach() for g in autograd.grad(F.cross_entropy(forward(xv), yv), weights)]
        implicit = sum((g * d).sum() for g, d in zip(grads, dw))
        return F.cross_entropy(forward(xv), yv) - eta * implicit

    return loss, lambda: (*_examples(8), *_examples(8))


LOSSES = (
    Loss(influence_by_recursion, way=None, is_slow=True),
    Loss(balanced_tasks, way=PARTLY, is_slow=True),
    Loss(invariant_risk, is_slow=True),
    Loss(variance_of_gradients, is_slow=True),
    Loss(trust_region, is_slow=True),
    Loss(sharpness_by_lanczos, is_slow=True),
    Loss(gauss_newton_products, is_slow=True),
    Loss(double_backpropagation, is_slow=True),
    Loss(jacobian_projections),
    Loss(contractive_autoencoder),
    Loss(agreement_of_domains),
    Loss(differentiable_search, is_slow=True),
)
