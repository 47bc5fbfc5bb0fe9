"""Matching gradients: condensation of data sets, leakage from gradients, trajectories."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.row import BY_LAYER, Batch, Loss


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3, affine=True), nn.Sigmoid(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(27, 3),
    )  # fmt: skip


def distance_wb(gwr: Tensor, gws: Tensor) -> Tensor:
    """The distance of condensation by gradient matching, by the kind of the layer."""
    shape = gwr.shape
    if len(shape) == 4:
        gwr = gwr.reshape(shape[0], shape[1] * shape[2] * shape[3])
        gws = gws.reshape(shape[0], shape[1] * shape[2] * shape[3])
    elif len(shape) == 3:
        gwr = gwr.reshape(shape[0], shape[1] * shape[2])
        gws = gws.reshape(shape[0], shape[1] * shape[2])
    elif len(shape) == 1:
        gwr, gws = gwr.reshape(1, shape[0]), gws.reshape(1, shape[0])
        return torch.tensor(0, dtype=torch.float, device=gwr.device)
    return torch.sum(
        1 - torch.sum(gwr * gws, dim=-1)
        / (torch.norm(gwr, dim=-1) * torch.norm(gws, dim=-1) + 0.000001)
    )  # fmt: skip


def match_loss(gw_syn: Any, gw_real: Any, dis_metric: str = "ours") -> Tensor:
    """Sum the distances of the layers."""
    dis = torch.tensor(0.0)
    if dis_metric == "ours":
        for ig in range(len(gw_real)):
            dis += distance_wb(gw_real[ig], gw_syn[ig])
    elif dis_metric == "mse":
        gw_real_vec = torch.cat([g.reshape((-1)) for g in gw_real], dim=0)
        gw_syn_vec = torch.cat([g.reshape((-1)) for g in gw_syn], dim=0)
        dis = torch.sum((gw_syn_vec - gw_real_vec) ** 2)
    else:
        sys.exit(f"unknown distance function: {dis_metric}")
    return dis


def condensation() -> tuple[Any, Batch]:
    """Dataset condensation: gradients of real and synthetic images matched, class by class."""
    net = _net()
    net_parameters = list(net.parameters())
    image_syn = nn.Parameter(torch.randn(6, 1, 6, 6))
    label_syn = torch.tensor([0, 0, 1, 1, 2, 2])

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        total = torch.tensor(0.0)
        for c in range(3):
            img_real, lab_real = images[c * 4 : (c + 1) * 4], labels[c * 4 : (c + 1) * 4]
            loss_real = F.cross_entropy(net(img_real), lab_real)
            gw_real = torch.autograd.grad(loss_real, net_parameters)
            gw_real = list((_.detach().clone() for _ in gw_real))
            img_syn = image_syn[c * 2 : (c + 1) * 2].reshape((2, 1, 6, 6))
            loss_syn = F.cross_entropy(net(img_syn), label_syn[c * 2 : (c + 1) * 2])
            gw_syn = torch.autograd.grad(loss_syn, net_parameters, create_graph=True)
            total += match_loss(gw_syn, gw_real)
        return total

    return loss, lambda: (torch.randn(12, 1, 6, 6), torch.arange(3).repeat_interleave(4))


def siamese_augmentation() -> tuple[Any, Batch]:
    """Gradients matched under one augmentation of both sides, drawn by NumPy (DSA)."""
    net = _net()
    image_syn = nn.Parameter(torch.randn(4, 1, 6, 6))

    def augment(x: Tensor, strategy: str, seed: int) -> Tensor:
        np.random.seed(seed)
        kinds = strategy.split("_")
        kind = kinds[np.random.randint(0, len(kinds))]
        torch.random.manual_seed(seed)
        if kind == "flip":
            randf = torch.rand(x.size(0), 1, 1, 1)
            randf[:] = randf[0]
            return torch.where(randf < 0.5, x.flip(3), x)
        if kind == "brightness":
            randb = torch.rand(x.size(0), 1, 1, 1)
            randb[:] = randb[0]
            return x + (randb - 0.5)
        theta = torch.rand(x.size(0)) * 0.2
        matrix = torch.stack(
            [torch.stack([theta.cos(), -theta.sin(), 0 * theta], 1),
             torch.stack([theta.sin(), theta.cos(), 0 * theta], 1)], 1,
        )  # fmt: skip
        grid = F.affine_grid(matrix, list(x.shape), align_corners=True)
        return F.grid_sample(x, grid, align_corners=True)

    def loss(img_real: Tensor, labels: Tensor) -> Tensor:
        seed = int(time.time() * 1000) % 1  # the code takes the time; one seed, so that it repeats
        real = augment(img_real, "flip_brightness_rotate", seed)
        syn = augment(image_syn, "flip_brightness_rotate", seed)
        gw_real = torch.autograd.grad(F.cross_entropy(net(real), labels), net.parameters())
        gw_real = [g.detach() for g in gw_real]
        gw_syn = torch.autograd.grad(
            F.cross_entropy(net(syn), labels), net.parameters(), create_graph=True
        )
        return match_loss(gw_syn, gw_real, "mse")

    return loss, lambda: (torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0]))


class _Leakage:
    """Deep leakage from gradients: the closure that LBFGS calls."""

    def __init__(self) -> None:
        self.net = _net()
        self.dummy_data = nn.Parameter(torch.randn(1, 1, 6, 6))
        self.dummy_label = nn.Parameter(torch.randn(1, 3))
        self.optimizer = torch.optim.LBFGS([self.dummy_data, self.dummy_label])
        y = self.criterion(self.net(torch.randn(1, 1, 6, 6)), torch.eye(3)[:1])
        dy_dx = torch.autograd.grad(y, self.net.parameters())
        self.original_dy_dx = list((_.detach().clone() for _ in dy_dx))

    @staticmethod
    def criterion(pred: Tensor, target: Tensor) -> Tensor:
        return torch.mean(torch.sum(-target * F.log_softmax(pred, dim=-1), 1))

    def grad_diff(self) -> Tensor:
        pred = self.net(self.dummy_data)
        dummy_onehot_label = F.softmax(self.dummy_label, dim=-1)
        dummy_loss = self.criterion(pred, dummy_onehot_label)
        dummy_dy_dx = torch.autograd.grad(dummy_loss, self.net.parameters(), create_graph=True)
        grad_diff: Any = 0
        for gx, gy in zip(dummy_dy_dx, self.original_dy_dx):
            grad_diff += ((gx - gy) ** 2).sum()
        return grad_diff

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        grad_diff = self.grad_diff()
        grad_diff.backward()
        return grad_diff


def deep_leakage() -> tuple[Any, Batch]:
    """Deep leakage: gradients matched to recover an image and its label."""
    leakage = _Leakage()
    return leakage.grad_diff, lambda: ()


def leakage_closure() -> tuple[Any, Batch]:
    """Deep leakage, the whole closure: zero_grad and backward inside, as LBFGS wants it."""
    leakage = _Leakage()
    return leakage.closure, lambda: ()


def inverting_gradients() -> tuple[Any, Batch]:
    """Cosine distance of gradients, total variation, signs of the image's gradient."""
    model = _net()
    x_trial = nn.Parameter(torch.randn(2, 1, 6, 6))

    def total_variation(x: Tensor) -> Tensor:
        dx = torch.mean(torch.abs(x[:, :, :, :-1] - x[:, :, :, 1:]))
        dy = torch.mean(torch.abs(x[:, :, :-1, :] - x[:, :, 1:, :]))
        return dx + dy

    def reconstruction_costs(gradients: Any, input_gradient: Any, indices: str) -> Tensor:
        indices_ = (
            torch.arange(len(input_gradient)) if indices == "def"
            else torch.topk(torch.stack([p.norm() for p in input_gradient], dim=0), 4)[1]
        )  # fmt: skip
        total_costs = 0
        for trial_gradient in gradients:
            pnorm = [0, 0]
            costs = 0
            for i in indices_:
                costs -= (trial_gradient[i] * input_gradient[i]).sum()
                pnorm[0] += trial_gradient[i].pow(2).sum()
                pnorm[1] += input_gradient[i].pow(2).sum()
            total_costs += 1 + costs / pnorm[0].sqrt() / pnorm[1].sqrt()
        return total_costs / len(gradients)

    def loss(input_data: Tensor, labels: Tensor) -> Tensor:
        target = torch.autograd.grad(F.cross_entropy(model(input_data), labels), model.parameters())
        target = [g.detach() for g in target]
        error = F.cross_entropy(model(x_trial), labels)
        gradient = torch.autograd.grad(error, model.parameters(), create_graph=True)
        rec_loss = reconstruction_costs([gradient], target, "def")
        rec_loss += 1e-2 * total_variation(x_trial)
        return rec_loss

    return loss, lambda: (torch.randn(2, 1, 6, 6), torch.tensor([0, 2]))


def matching_trajectories() -> tuple[Any, Batch]:
    """Trajectory matching: steps on flat parameters, batches by permutation (MTT)."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    shapes = [(n, p.shape, p.numel()) for n, p in net.named_parameters()]
    image_syn = nn.Parameter(torch.randn(6, 6))
    syn_lr = nn.Parameter(torch.tensor(0.1))
    label_syn = torch.tensor([0, 1, 2, 0, 1, 2])

    def student(x: Tensor, flat_param: Tensor) -> Tensor:
        params = {}
        for (name, shape, _), t in zip(
            shapes, flat_param.split([n for *_, n in shapes]), strict=True
        ):
            params[name] = t.view(shape)
        return torch.func.functional_call(net, params, (x,))

    def loss(starting: Tensor, target_params: Tensor, syn_steps: int = 2) -> Tensor:
        student_params = [
            torch.cat([p.data.reshape(-1) for p in [starting]], 0).requires_grad_(True)
        ]
        param_loss_list, param_dist_list = [], []
        indices_chunks: list[Tensor] = []
        for _ in range(syn_steps):
            if not indices_chunks:
                indices = torch.randperm(len(image_syn))
                indices_chunks = list(torch.split(indices, 3))
            these_indices = indices_chunks.pop()
            x, y = image_syn[these_indices], label_syn[these_indices]
            ce_loss = F.cross_entropy(student(x, student_params[-1]), y)
            grad = torch.autograd.grad(ce_loss, student_params[-1], create_graph=True)[0]
            student_params.append(student_params[-1] - syn_lr * grad)
        param_loss = torch.tensor(0.0)
        param_dist = torch.tensor(0.0)
        param_loss += F.mse_loss(student_params[-1], target_params, reduction="sum")
        param_dist += F.mse_loss(starting, target_params, reduction="sum")
        param_loss_list.append(param_loss)
        param_dist_list.append(param_dist)
        param_loss /= starting.numel()
        param_dist /= starting.numel()
        return param_loss / param_dist

    n = sum(count for *_, count in shapes)
    return loss, lambda: (0.3 * torch.randn(n), 0.3 * torch.randn(n))


LOSSES = (
    Loss(condensation, is_slow=True),
    Loss(siamese_augmentation, way=BY_LAYER),
    Loss(deep_leakage, is_slow=True),
    Loss(leakage_closure, way=BY_LAYER, is_whole_step=True, is_slow=True),
    Loss(inverting_gradients, way=BY_LAYER, is_slow=True),
    Loss(matching_trajectories),
)
