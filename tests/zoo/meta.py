"""Meta-learning: unrolled steps, clones of networks, implicit gradients."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.row import RECORDED, Batch, Loss


def _task(ways: int = 3, shots: int = 4, dim: int = 5) -> tuple[Tensor, ...]:
    n = ways * shots
    return (
        torch.randn(n, dim), torch.randint(ways, (n,)), torch.randn(n, dim),
        torch.randint(ways, (n,)),
    )  # fmt: skip


class _Meta(nn.Module):
    """MAML over a list of weights, after the code most people start from."""

    def __init__(self) -> None:
        super().__init__()
        self.vars = nn.ParameterList()
        for m, n in ((5, 8), (8, 3)):
            w = nn.Parameter(torch.ones(n, m))
            nn.init.kaiming_normal_(w)
            self.vars.append(w)
            self.vars.append(nn.Parameter(torch.zeros(n)))
        self.update_lr, self.update_step = 0.4, 2

    def net(self, x: Tensor, vars: Any = None) -> Tensor:
        if vars is None:
            vars = self.vars
        idx = 0
        while idx < len(vars):
            x = F.linear(x, vars[idx], vars[idx + 1])
            if idx + 2 < len(vars):
                x = F.relu(x)
            idx += 2
        return x

    def parameters_of_net(self) -> nn.ParameterList:
        return self.vars

    def forward(self, x_spt: Tensor, y_spt: Tensor, x_qry: Tensor, y_qry: Tensor) -> Any:
        task_num = x_spt.size(0)
        losses_q: list[Any] = [0 for _ in range(self.update_step + 1)]
        corrects = [0 for _ in range(self.update_step + 1)]
        for i in range(task_num):
            loss = F.cross_entropy(self.net(x_spt[i], vars=None), y_spt[i])
            grad = torch.autograd.grad(loss, self.parameters_of_net(), create_graph=True)
            fast_weights = list(
                map(lambda p: p[1] - self.update_lr * p[0], zip(grad, self.parameters_of_net()))
            )
            with torch.no_grad():
                pred_q = F.softmax(self.net(x_qry[i], self.parameters_of_net()), dim=1).argmax(1)
                corrects[0] = corrects[0] + torch.eq(pred_q, y_qry[i]).sum().item()
            for k in range(1, self.update_step):
                loss = F.cross_entropy(self.net(x_spt[i], fast_weights), y_spt[i])
                grad = torch.autograd.grad(loss, fast_weights, create_graph=True)
                fast_weights = list(
                    map(lambda p: p[1] - self.update_lr * p[0], zip(grad, fast_weights))
                )
                logits_q = self.net(x_qry[i], fast_weights)
                losses_q[k + 1] += F.cross_entropy(logits_q, y_qry[i])
        return losses_q[-1] / task_num, corrects


def maml_list_of_weights() -> tuple[Any, Batch]:
    """MAML over a list of weights, with map, zip and counts of correct answers by item()."""
    meta = _Meta()

    def batch() -> tuple[Any, ...]:
        tasks = [_task() for _ in range(2)]
        return tuple(torch.stack(part) for part in zip(*tasks, strict=True))

    return lambda *tasks: meta(*tasks), batch


def maml_named_parameters() -> tuple[Any, Batch]:
    """MAML over an OrderedDict of named parameters and a functional call."""
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    def gradient_update_parameters(loss: Tensor, params: Any, step_size: float = 0.5) -> Any:
        grads = torch.autograd.grad(loss, params.values(), create_graph=True)
        updated = OrderedDict()
        for (name, param), grad in zip(params.items(), grads, strict=True):
            updated[name] = param - step_size * grad
        return updated

    def outer(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Tensor:
        params = OrderedDict(model.named_parameters())
        logits = torch.func.functional_call(model, params, (train_x,))
        params = gradient_update_parameters(F.cross_entropy(logits, train_y), params)
        return F.cross_entropy(torch.func.functional_call(model, params, (test_x,)), test_y)

    return outer, _task


def clone_module(module: nn.Module) -> nn.Module:
    """Clone a module with its graph, as learn2learn does."""
    clone = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    clone._parameters = clone._parameters.copy()
    clone._buffers = clone._buffers.copy()
    clone._modules = clone._modules.copy()
    for key in clone._parameters:
        if module._parameters[key] is not None:
            clone._parameters[key] = module._parameters[key].clone()
    for key in clone._buffers:
        if clone._buffers[key] is not None and clone._buffers[key].requires_grad:
            clone._buffers[key] = module._buffers[key].clone()
    for key in clone._modules:
        clone._modules[key] = clone_module(module._modules[key])
    return clone


def _update_module(module: nn.Module, updates: dict[Any, Tensor]) -> nn.Module:
    for key, p in list(module._parameters.items()):
        if p is not None and p in updates:
            module._parameters[key] = p + updates[p]
    for key in module._modules:
        module._modules[key] = _update_module(module._modules[key], updates)
    return module


def maml_cloned_modules() -> tuple[Any, Batch]:
    """MAML over clones of modules that keep their graph, updates in a dictionary by parameter."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def loss(x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        learner = clone_module(model)
        for _ in range(2):
            error = F.cross_entropy(learner(x), y)
            diff = [p for p in learner.parameters() if p.requires_grad]
            grads = torch.autograd.grad(
                error, diff, retain_graph=True, create_graph=True, allow_unused=True
            )
            updates = {p: -0.3 * g for p, g in zip(diff, grads, strict=True) if g is not None}
            learner = _update_module(learner, updates)
        return F.cross_entropy(learner(xq), yq)

    return loss, _task


def maml_batch_norm() -> tuple[Any, Batch]:
    """First-order and second-order terms through BatchNorm in train mode, by a generator."""
    features = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    head = nn.Linear(8, 3)

    def loss(x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        inner = F.cross_entropy(head(features(x)), y)
        names = [n for n, _ in head.named_parameters()]
        grads = torch.autograd.grad(inner, head.parameters(), create_graph=True)
        fast = {n: p - 0.5 * g for n, p, g in zip(names, head.parameters(), grads, strict=True)}
        logits = torch.func.functional_call(head, fast, features(xq))
        return F.cross_entropy(logits, yq)

    return loss, _task


def anil_frozen_body() -> tuple[Any, Batch]:
    """The body is frozen for the inner step and thawed for the outer one."""
    body, head = nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, 3)

    def freeze(module: nn.Module, flag: bool) -> None:
        for p in module.parameters():
            p.requires_grad_(flag)

    def loss(x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        freeze(body, False)
        inner = F.cross_entropy(head(body(x)), y)
        g_w, g_b = torch.autograd.grad(inner, [head.weight, head.bias], create_graph=True)
        freeze(body, True)
        w, b = head.weight - 0.3 * g_w, head.bias - 0.3 * g_b
        return F.cross_entropy(F.linear(body(xq), w, b), yq)

    return loss, _task


def implicit_gradients() -> tuple[Any, Batch]:
    """Implicit MAML: conjugate gradients over Hessian-vector products, stopped by a tolerance."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    lam = 2.0

    def flat(grads: Any) -> Tensor:
        return torch.cat([g.contiguous().view(-1) for g in grads])

    def cg(f_Ax: Any, b: Tensor, iters: int = 3, tol: float = 1e-10) -> Tensor:
        x, r, p = torch.zeros_like(b), b.clone(), b.clone()
        rdotr = r.dot(r)
        for _ in range(iters):
            z = f_Ax(p)
            v = rdotr / p.dot(z)
            x += v * p
            r -= v * z
            newrdotr = r.dot(r)
            p = r + newrdotr / rdotr * p
            rdotr = newrdotr
            if rdotr < tol:
                break
        return x

    def loss(x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        params = list(net.parameters())
        train = F.cross_entropy(net(x), y)
        g = flat(torch.autograd.grad(train, net.parameters(), create_graph=True))

        def matrix_evaluator(v: Tensor) -> Tensor:
            hvp = flat(torch.autograd.grad(torch.dot(g, v), params, retain_graph=True))
            return v + hvp / lam

        test = F.cross_entropy(net(xq), yq)
        test_grad = flat(torch.autograd.grad(test, params, retain_graph=True)).detach()
        meta = cg(matrix_evaluator, test_grad).detach()
        theta = torch.cat([p.view(-1) for p in net.parameters()])
        return torch.dot(theta, meta) + 0.0 * test

    return loss, _task


def learned_rates() -> tuple[Any, Batch]:
    """Meta-SGD: a rate for each weight, steps written as a generator over zips."""
    net = nn.Sequential(nn.Linear(5, 8), nn.ELU(), nn.Linear(8, 3))
    rates = nn.ParameterList([nn.Parameter(0.1 * torch.ones_like(p)) for p in net.parameters()])

    def forward(x: Tensor, w: Any) -> Tensor:
        w = list(w)
        return F.linear(F.elu(F.linear(x, w[0], w[1])), w[2], w[3])

    def loss(x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        grads = torch.autograd.grad(
            F.cross_entropy(forward(x, net.parameters()), y), net.parameters(), create_graph=True
        )
        fast = tuple(p - a * g for p, a, g in zip(net.parameters(), rates, grads, strict=True))
        penalty = sum(a.abs().sum() for a in rates)
        return F.cross_entropy(forward(xq, fast), yq) + 1e-3 * penalty

    return loss, _task


class _MetaSGD(torch.optim.SGD):
    """An optimizer whose step keeps the graph (Meta-Weight-Net)."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__(net.parameters(), lr=lr)
        self.net = net

    def set_parameter(self, module: nn.Module, name: str, value: Tensor) -> None:
        del module._parameters[name]
        setattr(module, name, value)

    def meta_step(self, grads: Any) -> None:
        lr = self.param_groups[0]["lr"]
        named = [
            (m, n, p)
            for m in self.net.modules()
            for n, p in list(m._parameters.items())
            if p is not None
        ]
        for (module, name, parameter), grad in zip(named, grads, strict=True):
            self.set_parameter(module, name, parameter.detach().add(grad, alpha=-lr))


def virtual_network() -> tuple[Any, Batch]:
    """Weights of examples learned through a step of a network that is built in the loss."""
    make = lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    net = make()
    meta_net = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())

    def loss(x: Tensor, y: Tensor, meta_x: Tensor, meta_y: Tensor) -> Tensor:
        pseudo_net = make()
        pseudo_net.load_state_dict(net.state_dict())
        pseudo_net.train()
        loss_vector = F.cross_entropy(pseudo_net(x), y, reduction="none").reshape(-1, 1)
        weight = meta_net(loss_vector.data)
        pseudo_loss = torch.mean(weight * loss_vector)
        grads = torch.autograd.grad(pseudo_loss, pseudo_net.parameters(), create_graph=True)
        optimizer = _MetaSGD(pseudo_net, lr=0.5)
        optimizer.meta_step(grads)
        del grads
        return F.cross_entropy(pseudo_net(meta_x), meta_y)

    return loss, _task


def copied_network() -> tuple[Any, Batch]:
    """A step on a deep copy of the network, put back with the graph into its _parameters."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Softplus(), nn.Linear(6, 3))
    temperature = nn.Parameter(torch.tensor(1.2))

    def loss(x: Tensor, y: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        fast = copy.deepcopy(net)
        inner = F.cross_entropy(fast(x) / temperature, y)
        grads = torch.autograd.grad(inner, fast.parameters(), create_graph=True)
        grads = iter(grads)
        for module in fast:
            for name, p in module._parameters.items():
                module._parameters[name] = p - 0.5 * next(grads)
        return F.cross_entropy(fast(xq), yq)

    return loss, _task


class _LearnedOptimizer(nn.Module):
    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.recurs = nn.LSTMCell(1, hidden)
        self.output = nn.Linear(hidden, 1)
        self.hidden = hidden

    def forward(self, inp: Tensor, hidden: Tensor, cell: Tensor) -> Any:
        hidden, cell = self.recurs(inp, (hidden, cell))
        return self.output(hidden), hidden, cell


def learned_optimizer() -> tuple[Any, Batch]:
    """Learning to learn by gradient descent: a recurrent optimizer, unrolled over an optimizee."""
    opt_net = _LearnedOptimizer()

    class QuadraticLoss:
        def __init__(self, W: Tensor, y: Tensor) -> None:
            self.W, self.y = W, y

        def get_loss(self, theta: Tensor) -> Tensor:
            return torch.sum((self.W.matmul(theta) - self.y) ** 2)

    def fit(W: Tensor, y: Tensor, unroll: int = 3) -> Tensor:
        target = QuadraticLoss(W, y)
        theta = torch.zeros(W.shape[1], requires_grad=True)
        hidden, cell = (torch.zeros(W.shape[1], opt_net.hidden) for _ in range(2))
        all_losses: list[Tensor] = []
        all_losses_ever = []
        for _ in range(unroll):
            loss = target.get_loss(theta)
            all_losses.append(loss)
            all_losses_ever.append(loss.data.cpu().numpy())
            (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
            update, hidden, cell = opt_net(grad.detach()[:, None], hidden, cell)
            theta = theta + 0.1 * update.squeeze(1)
        return sum(all_losses)

    return fit, lambda: (torch.randn(4, 4), torch.randn(4))


LOSSES = (
    Loss(maml_list_of_weights, is_slow=True),
    Loss(maml_named_parameters),
    Loss(maml_cloned_modules),
    Loss(maml_batch_norm),
    Loss(anil_frozen_body),
    Loss(implicit_gradients, is_slow=True),
    Loss(learned_rates),
    Loss(virtual_network, way=RECORDED, is_slow=True),
    Loss(copied_network, way=RECORDED, is_slow=True),
    Loss(learned_optimizer),
)
