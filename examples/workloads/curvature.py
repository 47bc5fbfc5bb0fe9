"""Jacobians of classifiers and Hessian-vector products in all parameters."""

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy

from examples.workloads.networks import Encoder, lenet
from examples.workloads.workload import Case, Workload


def projected(net: nn.Module, x: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """Cross-entropy, and ‖vᵀJ‖² of the logits with one direction v (batch, classes) per image;
    images (batch, 1, 28, 28) require grad."""
    logits = net(x)
    (g,) = torch.autograd.grad((logits * directions).sum(), x, create_graph=True)
    return cross_entropy(logits, labels) + g.flatten(1).square().sum(1).mean()


def func_projected(net: nn.Module, x: Tensor, labels: Tensor, directions: Tensor) -> Tensor:
    """`projected` in torch.func."""
    g = torch.func.grad(lambda x: (net(x) * directions).sum())(x)
    return cross_entropy(net(x), labels) + g.flatten(1).square().sum(1).mean()


def frobenius(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, and ‖J‖² of all logits, a row at a time."""
    logits = net(x)
    total = torch.zeros(())
    for k in range(logits.shape[1]):
        (g,) = torch.autograd.grad(logits[:, k].sum(), x, create_graph=True)
        total = total + g.square().sum()
    return cross_entropy(logits, labels) + total / len(x)


def func_frobenius(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """`frobenius` in torch.func."""
    parameters = dict(net.named_parameters())
    jacobian = vmap(jacrev(lambda x: functional_call(net, parameters, (x[None],))[0]))(x)
    return cross_entropy(net(x), labels) + jacobian.square().sum() / len(x)


def hessian_vector(
    net: nn.Module, x: Tensor, labels: Tensor, direction: dict[str, Tensor]
) -> Tensor:
    """⟨∇L, v⟩ for a direction v in all parameters, by name: its gradient is the Hessian times v."""
    loss = cross_entropy(net(x), labels)
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    return sum(((g * v).sum() for g, v in zip(grads, direction.values(), strict=True)), loss * 0)


def jacobian_frobenius(full: bool) -> list[Case]:
    """LeNet on images of the size of MNIST's."""
    net, x = lenet(), torch.randn(100, 1, 28, 28).requires_grad_()
    labels, v = torch.randint(10, (100,)), torch.nn.functional.normalize(torch.randn(100, 10))
    forward = lambda: net(x)  # noqa: E731
    return [
        Case("1 projection", projected, (net, x, labels, v), forward, func_projected, 6.0),
        Case("10 outputs", frobenius, (net, x, labels), forward, func_frobenius, 33.0),
    ]


def parameter_hvp(full: bool) -> list[Case]:
    """Hessian-vector products of transformers of the shapes of BERT and ViT, two layers of each."""
    cases = []
    shapes = (("BERT-like", 64, 256, 4), ("ViT-like", 50, 192, 3))
    for name, length, width, heads in shapes:
        net = Encoder(width, heads, layers=12 if full else 2, classes=10)
        x, labels = torch.randn(4, length, width), torch.randint(10, (4,))
        direction = {n: torch.randn_like(p) for n, p in net.named_parameters()}
        forward = lambda net=net, x=x: net(x)  # noqa: E731
        cases.append(Case(name, hessian_vector, (net, x, labels, direction), forward))
    return cases


WORKLOADS = [
    Workload(
        13, "parameter_hvp", "Hessian · v in all parameters", parameter_hvp, compiles_long=True
    ),
    Workload(14, "jacobian_frobenius", "cross-entropy + ‖J‖²", jacobian_frobenius),
]
