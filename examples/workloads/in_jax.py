"""The losses of some workloads in JAX, with the networks' own weights: value and gradients as a
user of JAX computes them; `make jax` installs it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

from examples.workloads import directions, jacobians, penalties, physics

Weights = list[tuple[Any, Any]]
Net = Callable[[Weights, Any], Any]


def force_matching(net: Net, weights: Weights, r: Any, forces: Any) -> Any:
    """See `physics.force_matching`."""
    predicted = -jax.vmap(jax.jacrev(lambda r: net(weights, r)[0]))(r)
    return jnp.mean((predicted - forces) ** 2)


def penalty(net: Net, weights: Weights, x: Any) -> Any:
    """See `penalties.penalty`."""
    g = jax.vmap(jax.grad(lambda x: net(weights, x)[0]))(x)
    return jnp.mean((jnp.linalg.norm(g, axis=1) - 1) ** 2)


def with_data(net: Net, weights: Weights, x: Any, y: Any) -> Any:
    """See `penalties.with_data`."""
    return penalty(net, weights, x) + jnp.mean((net(weights, x) - y) ** 2)


def burgers(net: Net, weights: Weights, points: Any) -> Any:
    """See `physics.burgers`."""

    def residual(p: Any) -> Any:
        value, gradient = net(weights, p)[0], jax.grad(lambda p: net(weights, p)[0])
        along_x = jnp.zeros_like(p).at[0].set(1)
        g, second = jax.jvp(gradient, (p,), (along_x,))
        return g[1] + value * g[0] - physics.VISCOSITY * second[0]

    return jnp.mean(jax.vmap(residual)(points) ** 2)


def laplacian(function: Callable[[Any], Any], x: Any, weight: Any) -> Any:
    """Return the weighted Laplacian of a function of one point (dim,), forward over reverse."""

    def along(direction: Any) -> Any:
        return jax.jvp(jax.grad(function), (x,), (direction,))[1] @ direction

    return weight @ jax.vmap(along)(jnp.eye(len(x), dtype=x.dtype))


def laplacian_value(net: Net, weights: Weights, points: Any) -> Any:
    """See `physics.laplacian_value`."""
    one = jnp.ones_like(points[0])
    return jax.vmap(lambda x: laplacian(lambda x: net(weights, x)[0], x, one))(points)


def poisson(net: Net, weights: Weights, points: Any, weight: Any) -> Any:
    """See `physics.poisson`."""
    found = jax.vmap(lambda x: laplacian(lambda x: net(weights, x)[0], x, weight))(points)
    return jnp.mean((found - 1) ** 2)


def biharmonic(net: Net, weights: Weights, points: Any) -> Any:
    """See `physics.biharmonic`."""
    one = jnp.ones_like(points[0])

    def once(x: Any) -> Any:
        return laplacian(lambda x: net(weights, x)[0], x, one)

    return jnp.mean(jax.vmap(lambda x: laplacian(once, x, one))(points) ** 2)


def along(function: Callable[[Any], Any], x: Any, direction: Any, order: int) -> Any:
    """Return a derivative of a function of one point (dim,) along a direction, forward mode nested
    in itself."""
    for _ in range(order):
        function = functools.partial(_slope, function, direction)
    return function(x)


def _slope(function: Callable[[Any], Any], direction: Any, x: Any) -> Any:
    return jax.jvp(function, (x,), (direction,))[1]


def _mean_along(net: Net, weights: Weights, points: Any, directions: Any, order: int) -> Any:
    def at(x: Any, v: Any) -> Any:
        return along(lambda x: net(weights, x)[0], x, v, order)

    return jnp.mean(jax.vmap(jax.vmap(at), (None, 0))(points, directions), axis=0)


def stochastic_laplacian(net: Net, weights: Weights, points: Any, directions: Any) -> Any:
    """See `directions.stochastic_laplacian`."""
    return _mean_along(net, weights, points, directions, 2)


def stochastic_biharmonic(net: Net, weights: Weights, points: Any, directions: Any) -> Any:
    """See `directions.stochastic_biharmonic`."""
    return _mean_along(net, weights, points, directions, 4) / 3


def sampled(net: Net, weights: Weights, points: Any, dims: Any) -> Any:
    """See `directions.sampled`."""
    ones = jax.nn.one_hot(dims, points.shape[1], dtype=points.dtype)

    def estimate(x: Any) -> Any:
        second = jax.vmap(lambda v: along(lambda x: net(weights, x)[0], x, v, 2))(ones)
        return jnp.mean(second) * points.shape[1]

    return jnp.mean((jax.vmap(estimate)(points) - 1) ** 2)


def quadratic_form(net: Net, weights: Weights, points: Any, v: Any) -> Any:
    """See `jacobians.quadratic_form`."""
    found = jax.vmap(jax.jacrev(lambda x: net(weights, x)))(points)
    return jnp.mean(jnp.einsum("ni,nij,nj->n", v, found, v) ** 2)


def norm_of_jacobian(net: Net, weights: Weights, points: Any) -> Any:
    """See `jacobians.func_norm_of_jacobian`."""
    found = jax.vmap(jax.jacrev(lambda x: net(weights, x)))(points)
    return jnp.sum(found**2) / len(points)


def hessian_norm(net: Net, weights: Weights, points: Any) -> Any:
    """See `directions.hessian_norm`."""
    second = jax.vmap(jax.hessian(lambda x: net(weights, x)))(points)
    return jnp.mean(net(weights, points) ** 2) + jnp.mean(second**2)


# Loss in PyTorch → in JAX; the others have no form of their own there.
FORMS: dict[Callable[..., Tensor], Callable[..., Any]] = {
    physics.force_matching: force_matching,
    penalties.penalty: penalty,
    penalties.with_data: with_data,
    penalties.with_data_apart: with_data,
    physics.laplacian_value: laplacian_value,
    physics.poisson: poisson,
    physics.biharmonic: biharmonic,
    physics.burgers: burgers,
    directions.stochastic_laplacian: stochastic_laplacian,
    directions.stochastic_biharmonic: stochastic_biharmonic,
    directions.sampled: sampled,
    directions.hessian_norm: hessian_norm,
    jacobians.quadratic_form: quadratic_form,
    jacobians.quadratic_form_by_rows: quadratic_form,
    jacobians.batch_norm_of_jacobian: norm_of_jacobian,
}

_ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Any]] = {
    nn.Tanh: jnp.tanh,
    nn.ReLU: jax.nn.relu,
    nn.LeakyReLU: jax.nn.leaky_relu,
}


class InJax:
    """A step in JAX, called like the loss in PyTorch that it stands beside.

    The call computes the gradients too, so `backward` of what it returns has nothing to do. After
    the first call it hands them out, to be compared; a user of JAX needs them in no ``.grad``.

    Args:
        loss: One of `FORMS`.
        args: Its arguments, the network first; copied once.
        backward: Whether gradients are computed.
    """

    def __init__(
        self, loss: Callable[..., Tensor], args: tuple[Any, ...], *, backward: bool
    ) -> None:
        jax.config.update("jax_enable_x64", True)  # else there is no float64 at all
        net, *rest = args
        self.leaves = [*net.parameters(), *(x for x in rest if x.requires_grad)]
        self.is_here = rest[0].is_cuda == (jax.default_backend() == "gpu")
        moving = [i for i, x in enumerate(rest) if x.requires_grad]
        values = [_array(x) for x in rest]
        apply = network(net)

        def function(weights: Weights, points: list[Any]) -> Any:
            at = dict(zip(moving, points, strict=True))
            return FORMS[loss](apply, weights, *(at.get(i, x) for i, x in enumerate(values)))

        self.step = jax.jit(jax.value_and_grad(function, (0, 1)) if backward else function)
        layers = [layer for layer in net if isinstance(layer, nn.Linear)]
        weights = [(_array(layer.weight), _array(layer.bias)) for layer in layers]
        self.inputs, self.backward = (weights, [values[i] for i in moving]), backward
        self.is_first = True

    def __call__(self, *args: Any) -> "Done":
        """Take a step at the arguments given before; wait until it is done.

        Raises:
            RuntimeError: PyTorch and JAX compute on different devices.
        """
        if not self.is_here:
            raise RuntimeError(f"this JAX computes on {jax.default_backend()} only")
        found = jax.block_until_ready(self.step(*self.inputs))
        value, grads = found if self.backward else (found, ())
        if self.is_first and self.backward:
            for leaf, grad in zip(self.leaves, jax.tree.leaves(grads), strict=True):
                leaf.grad = _tensor(grad).to(leaf.device)
        self.is_first = False
        return Done(value)


class Done:
    """The value of a step that has its gradients already."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def backward(self) -> None:
        """Do nothing."""

    def detach(self) -> Tensor:
        """Return the value as a tensor."""
        return _tensor(self.value)


def network(net: nn.Sequential) -> Net:
    """Return a network of linear layers and activations as a function of weights and a point, or a
    batch of points."""

    def apply(weights: Weights, x: Any) -> Any:
        remaining = iter(weights)
        for layer in net:
            if isinstance(layer, nn.Linear):
                weight, bias = next(remaining)
                x = x @ weight.T + bias
            else:
                x = _ACTIVATIONS[type(layer)](x)
        return x

    return apply


def _array(x: Tensor) -> Any:
    return jax.device_put(x.detach().cpu().numpy().copy())


def _tensor(x: Any) -> Tensor:
    return torch.from_numpy(jax.device_get(x).copy())
