"""DeepXDE on its PyTorch backend: Burgers' equation, and a beam by an equation of fourth order.

Both are the library's own examples; `dde.grad` differentiates the network by eager autograd.
`make clients` installs it.
"""

import contextlib
import io
import os

os.environ["DDE_BACKEND"] = "pytorch"

import deepxde as dde
import numpy as np
import torch
from client import Client, Line
from deepxde.data.data import Data
from torch import Tensor


def burgers(
    line: Line, dtype: torch.dtype, points: int = 2540, width: int = 20, depth: int = 3
) -> Client:
    """u_t + u u_x = (0.01/π) u_xx on [-1, 1] × [0, 0.99]."""

    def residual(x: Tensor, y: Tensor) -> Tensor:
        dy_x = dde.grad.jacobian(y, x, i=0, j=0)
        dy_t = dde.grad.jacobian(y, x, i=0, j=1)
        dy_xx = dde.grad.hessian(y, x, i=0, j=0)
        return dy_t + y * dy_x - 0.01 / np.pi * dy_xx

    def data() -> Data:
        domain = dde.geometry.GeometryXTime(
            dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99)
        )
        boundary = dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on_boundary: on_boundary)
        initial = dde.icbc.IC(
            domain, lambda x: -np.sin(np.pi * x[:, 0:1]), lambda _, on_initial: on_initial
        )
        conditions = [boundary, initial]
        numbers = {"num_boundary": points // 32 + 1, "num_initial": points // 16 + 1}
        return dde.data.TimePDE(domain, residual, conditions, num_domain=points, **numbers)

    return _client(line, dtype, data, [2, *[width] * depth, 1])


def beam(
    line: Line, dtype: torch.dtype, points: int = 10, width: int = 20, depth: int = 3
) -> Client:
    """The deflection of a beam that is held at one end: u'''' = -1 on [0, 1]."""

    def second(x: Tensor, y: Tensor) -> Tensor:
        return dde.grad.hessian(y, x)

    def third(x: Tensor, y: Tensor) -> Tensor:
        return dde.grad.jacobian(second(x, y), x)

    def residual(x: Tensor, y: Tensor) -> Tensor:
        return dde.grad.hessian(second(x, y), x) + 1

    def left(x: np.ndarray, on_boundary: bool) -> bool:
        return on_boundary and dde.utils.isclose(x[0], 0)

    def right(x: np.ndarray, on_boundary: bool) -> bool:
        return on_boundary and dde.utils.isclose(x[0], 1)

    def data() -> Data:
        span = dde.geometry.Interval(0, 1)
        conditions = [
            dde.icbc.DirichletBC(span, lambda x: 0, left),
            dde.icbc.NeumannBC(span, lambda x: 0, left),
            dde.icbc.OperatorBC(span, lambda x, y, _: second(x, y), right),
            dde.icbc.OperatorBC(span, lambda x, y, _: third(x, y), right),
        ]
        return dde.data.PDE(span, residual, conditions, num_domain=points, num_boundary=2)

    return _client(line, dtype, data, [1, *[width] * depth, 1])


def _client(line: Line, dtype: torch.dtype, make_data, layers: list[int]) -> Client:
    _set_float(torch.float32)  # the same weights in every precision
    dde.config.set_random_seed(0)
    net = dde.nn.FNN(layers, "tanh", "Glorot normal").to(dtype)
    _set_float(dtype)
    data = make_data()

    net = line(net)

    model = dde.Model(data, net)
    model.compile("adam", lr=1e-3, verbose=0)
    batch = data.train_next_batch()

    def train(steps: int) -> list[float]:
        history, _ = model.train(iterations=steps, display_every=1, verbose=0)
        return [float(np.sum(losses)) for losses in history.loss_train[:-1]]

    return Client(net, net, lambda: model.train_step(*batch), train)


def _set_float(dtype: torch.dtype) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        dde.config.set_default_float(str(dtype).removeprefix("torch."))
